"""What makes a function of a config's base a method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes.assemble import ALONE
from mskd_plugin.recipes.pair import METHOD_SETTINGS, check_method_settings, pair_settings

#: Methods by name, those of other packages too once these are imported.
METHODS: dict[str, Callable[..., dict[str, Any]]] = {}


def method(
    function: Callable[..., dict[str, Any]], *, loss: type | None = None
) -> Callable[..., dict[str, Any]]:
    """Add a function to :data:`METHODS`, and let a pair state what differs from its defaults.

    Settings are taken from the call, else from the pair's ``settings`` under the function's name,
    else from the function's defaults.

    Args:
        function: A method, as :mod:`mskd_plugin.recipes.assemble` describes it: of the base, and of
            settings by keyword.
        loss: Where the function takes any further keywords, the loss that has them as settings.

    Raises:
        SettingError: If another module has a method of that name, or a network alone is called so.
            When the method is called, if it has no setting of a given name, a value is of another
            kind than the setting's annotation, or it reads the images' classes where mixing leaves
            them none or labels are one-hot.
    """
    name = function.__name__
    if name in ALONE or METHODS.get(name, function).__module__ != function.__module__:
        raise SettingError("method", f"a name unlike {', '.join((*ALONE, *METHODS))}", repr(name))
    parameters = list(inspect.signature(function).parameters.values())[1:]
    own = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
    if loss is not None:
        METHOD_SETTINGS[name] = {**own, **inspect.signature(loss).parameters, **own}
    else:
        METHOD_SETTINGS[name] = own if len(own) == len(parameters) else None

    @functools.wraps(function)
    def with_pair_settings(base: dict, **settings: Any) -> dict[str, Any]:
        stated = pair_settings(base, name)
        check_method_settings(name, settings, f"{name}({{}}=...)")
        parts = function(base, **{**stated, **settings})
        _check_labels(base, name, parts)
        return parts

    METHODS[name] = with_pair_settings
    return with_pair_settings


def _check_labels(base: dict, name: str, parts: dict[str, Any]) -> None:
    """Refuse a method that reads class indices where labels are scores: where images of two classes
    are mixed, or labels are one-hot.
    """
    preprocessor = base.get("data_preprocessor", {})
    if preprocessor.get("batch_augments"):
        setting, expected, got = "batch_augments", "None", "a mix of images"
    elif preprocessor.get("to_onehot"):
        setting, expected, got = "to_onehot", "False", "True"
    else:
        return
    mappings = parts.get("loss_forward_mappings", {}).values()
    if any(source["recorder"] == "labels" for loss in mappings for source in loss.values()):
        pair = base["pair"]
        raise SettingError(
            f"data_preprocessor.{setting}",
            f"{expected} with {name}, which reads one class per image",
            f"{got} for {pair['teacher']} to {pair['student']}",
        )
