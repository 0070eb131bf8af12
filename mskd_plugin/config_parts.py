"""Parts of any config, however they are stated: types, and data sets inside wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def last_name(kind: Any) -> str:
    """Return a type's name without its scope or module; it may be a class or a function itself.

    Example:
        >>> last_name("mmpretrain.ResNet"), last_name(dict)
        ('ResNet', 'dict')
    """
    return getattr(kind, "__name__", str(kind)).split(".")[-1]


def type_name(settings: Mapping[str, Any], default: str = "") -> str:
    """Return the :func:`last_name` of the type that a part of a config states.

    Args:
        settings: The part.
        default: What stands for a type that is not stated.
    """
    return last_name(settings.get("type", default))


def inner_dataset(dataset: Any, key: str = "pipeline") -> Any:
    """Return the data set that states ``key``, of one inside wrappers the first on the way in; the
    innermost where none does.

    Args:
        dataset: Config of a data set.
        key: Name of a setting.

    Example:
        >>> inner_dataset(dict(type="RepeatDataset", dataset=dict(type="Digits", pipeline=[])))
        {'type': 'Digits', 'pipeline': []}
    """
    while key not in dataset and isinstance(dataset.get("dataset"), dict):
        dataset = dataset["dataset"]
    return dataset
