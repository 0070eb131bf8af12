"""What a pair of networks may state, and what methods may be told by it and by their calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from typing import Any

from mskd_plugin.errors import SettingError, check_count, is_number, nearest

#: What a pair may state, as annotations; the first three it must.
PAIR_SETTINGS = {
    "teacher": "str",
    "student": "str",
    "num_classes": "int",
    "teacher_ckpt": "str | None",
    "teacher_lr": "float",
    "label_smoothing": "float",
    "image_side": "int",
    "settings": "dict",
}
#: The settings of each method, by their names; None for a method that takes any.
METHOD_SETTINGS: dict[str, Mapping[str, Parameter] | None] = {}


def checked_pair(base: dict) -> dict[str, Any]:
    """Return the pair of a config's base.

    Raises:
        SettingError: If there is none, it lacks a network or the number of classes, it states what
            nobody reads, or settings of a method that does not have them.
    """
    pair: Any = base.get("pair")
    _check_kind("pair", "dict", pair)
    _check_names(pair, PAIR_SETTINGS, "settings of a pair", "pair.{}")
    stated = {"teacher": None, "student": None, "num_classes": None, **pair}
    for setting, value in stated.items():
        _check_kind(f"pair.{setting}", PAIR_SETTINGS[setting], value)
    for setting in ("num_classes", "image_side"):
        if setting in pair:
            check_count(f"pair.{setting}", pair[setting])
    of_methods = pair.get("settings", {})
    _check_names(of_methods, METHOD_SETTINGS, "methods", "pair.settings.{}")
    for method, settings in of_methods.items():
        setting = f"pair.settings.{method}"
        _check_kind(setting, "dict", settings)
        check_method_settings(method, settings, f"{setting}.{{}}")
    return pair


def pair_settings(base: dict, method: str) -> dict[str, Any]:
    """Return what the pair states for a method where the method's defaults do not fit it.

    A pair may hold ``settings``, a dict from a method's name to the arguments of its function that
    differ for this pair, DKD's ``beta`` for one. Those of other methods are left alone: a pair
    states the published ones of many.

    Raises:
        SettingError: See :func:`checked_pair`.
    """
    return dict(checked_pair(base).get("settings", {}).get(method, {}))


def check_method_settings(method: str, settings: Mapping[str, Any], told: str) -> None:
    """Check that a method has settings of these names, and that the values are of their kind.

    Args:
        method: Name of the method.
        settings: What it is told.
        told: How errors name a setting, with ``{}`` in the place of its name.

    Raises:
        SettingError: With the first one that is not.
    """
    known = METHOD_SETTINGS[method]
    if known is None:
        return
    _check_names(settings, known, f"settings of {method}", told)
    for setting, value in settings.items():
        _check_kind(told.format(setting), str(known[setting].annotation), value)


def _check_kind(setting: str, annotation: str, value: Any) -> None:
    kinds = annotation.split(" | ")
    # A method of one's own may be annotated otherwise, or not at all.
    if all(kind in KINDS for kind in kinds) and not any(KINDS[kind][1](value) for kind in kinds):
        raise SettingError(setting, " or ".join(KINDS[kind][0] for kind in kinds), repr(value))


def _check_names(given: Mapping[str, Any], known: Collection[str], what: str, told: str) -> None:
    for name, value in given.items():
        if name not in known:
            raise SettingError(
                told.format(name),
                f"among the {what}: {', '.join(known)}",
                repr(value),
                nearest(str(name), known),
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and all(map(item, value))


#: What a setting's annotation asks for, in words and as a check.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "None": ("None", lambda value: value is None),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "int": ("a whole number", _is_int),
    "float": ("a number", is_number),
    "dict": ("a dict", lambda value: isinstance(value, dict)),
    "str": ("a string", lambda value: isinstance(value, str)),
    "Sequence[int]": ("a list of whole numbers", _list_of(_is_int)),
    "Sequence[float]": ("a list of numbers", _list_of(is_number)),
}
