"""The normalisation of the images that a checkpoint's weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mskd_plugin.checkpoints.stated_config import stated_config
from mskd_plugin.errors import SettingError

#: Differences up to this share of the standard deviation are roundings of one published number.
TOLERANCE = 0.01
_NAMES = ("mean", "std")


def stated_normalization(checkpoint: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean and std that the config inside a checkpoint of OpenMMLab's states.

    The normalisation of a model goes before that of the run; before MMEngine it was
    ``img_norm_cfg``.

    Args:
        checkpoint: See :func:`mskd_plugin.checkpoints.stated_config.stated_config`.

    Returns:
        ``mean`` and ``std``, one number a channel or one for all; empty where the checkpoint
        states none.

    Example:
        >>> config = "data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])"
        >>> stated_normalization({"meta": {"cfg": config}})
        {'mean': [1.0, 2.0, 3.0], 'std': [4.0, 5.0, 6.0]}
        >>> stated_normalization({})
        {}
    """
    top = stated_config(checkpoint)
    of_model = _settings(top.get("model")).get("data_preprocessor")
    for place in (of_model, top.get("data_preprocessor"), top.get("img_norm_cfg")):
        stated = {name: _numbers(_settings(place).get(name)) for name in _NAMES}
        if all(stated.values()):
            return stated
    return {}


def _settings(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [float(v) for v in values] if all(isinstance(v, (int, float)) for v in values) else []


def check_normalization(
    checkpoint: Mapping[str, Any],
    data_preprocessor: nn.Module,
    source: str | Path,
    *,
    setting: str,
) -> None:
    """Check that images are normalised as the checkpoint's weights know them, where it says so.

    Args:
        checkpoint: See :func:`stated_normalization`.
        data_preprocessor: What normalises the images, with buffers ``mean`` and ``std``; without
            them nothing is checked.
        source: Where the checkpoint comes from, for errors.
        setting: Name of the setting, for errors.

    Raises:
        SettingError: If a mean or std differs by more than :data:`TOLERANCE` of the std.
    """
    stated = stated_normalization(checkpoint)
    given = {
        name: buffer.flatten().tolist()
        for name in _NAMES
        if (buffer := getattr(data_preprocessor, name, None)) is not None
    }
    if not stated or len(given) < len(_NAMES):
        return
    if not all(_close(stated[name], given[name], given["std"]) for name in _NAMES):
        raise SettingError(
            setting,
            "weights trained on images that were normalised as this config's `data_preprocessor` "
            f"does it, with {_told(given)}",
            f"{str(source)!r}, trained with {_told(stated)}",
            "Both networks see the same images: state the teacher's mean and std there.",
        )


def _close(stated: list[float], given: list[float], std: list[float]) -> bool:
    """Compare the numbers of each channel; one number alone is that of all channels."""
    try:
        channels = torch.broadcast_tensors(*map(torch.tensor, (stated, given, std)))
    except RuntimeError:  # of other numbers of channels
        return False
    a, b, s = channels
    return bool(((a - b).abs() <= TOLERANCE * s.abs()).all())


def _told(values: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{name} {[round(v, 4) for v in values[name]]}" for name in _NAMES)
