"""The one form of error for settings that cannot work, and checks that many settings share."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class SettingError(ValueError):
    """A setting that cannot work: which one, what was expected, what was got.

    The command line tools print it as one line and exit with status 2.

    Args:
        setting: Name of the argument, config key or command line option.
        expected: What would have worked.
        got: What was found.
        hint: One more sentence, if it helps.

    Attributes:
        setting: As given.

    Example:
        >>> raise SettingError("temperature", "a number above 0", -1)
        Traceback (most recent call last):
        ...
        mskd_plugin.errors.SettingError: Expected `temperature` to be a number above 0, but got -1.
    """

    def __init__(self, setting: str, expected: str, got: object, hint: str = "") -> None:
        told = f"Expected `{setting}` to be {expected}, but got {got}"
        told += "" if told.endswith(".") else "."  # an error that was got may end so
        super().__init__(f"{told} {hint}" if hint else told)
        self.setting = setting
        self._rest = (expected, got, hint)

    def __reduce__(self) -> tuple[type[SettingError], tuple[object, ...]]:
        """Let errors of other processes arrive as they are."""
        return type(self), (self.setting, *self._rest)

    def inside(self, place: str) -> SettingError:
        """Return the same error with the setting's place in the config before its name."""
        return SettingError(f"{place}.{self.setting}", *self._rest)


def check_count(setting: str, value: int, least: int = 1) -> int:
    """Return ``value``, or say that it is no whole number of at least ``least``.

    Raises:
        SettingError: Naming ``setting``.

    Example:
        >>> check_count("class_tokens", 0, least=0)
        0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(setting, f"a whole number of at least {least}", repr(value))
    return value


def check_flag(setting: str, value: bool) -> bool:
    """Return ``value``, or say that it is neither True nor False.

    Words such as ``no`` of a command line would count as True.

    Raises:
        SettingError: Naming ``setting``.
    """
    if not isinstance(value, bool):
        raise SettingError(setting, "True or False", repr(value))
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def check_at_least_zero(setting: str, value: float) -> float:
    """Return ``value``, or say that it is no finite number of at least 0.

    Raises:
        SettingError: Naming ``setting``.
    """
    if not is_number(value) or value < 0:
        raise SettingError(setting, "a number of at least 0", repr(value))
    return float(value)


def check_above_zero(setting: str, value: float) -> float:
    """Return ``value``, or say that it is no finite number above 0.

    Raises:
        SettingError: Naming ``setting``.
    """
    if not is_number(value) or value <= 0:
        raise SettingError(setting, "a number above 0", repr(value))
    return float(value)


def check_file(setting: str, path: str | Path, expected: str) -> Path:
    """Return the path of a file to read, with a ``~`` in front expanded.

    Args:
        setting: Name of the setting that names the file.
        path: The file.
        expected: What it has to be, for the error.

    Raises:
        SettingError: If it is not there, or is a folder.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not there"
        raise SettingError(setting, expected, f"{str(path)!r}, which is {what}")
    return file


def check_output(
    setting: str,
    path: Path,
    *,
    folder: bool = False,
    inputs: Mapping[str, str | Path] = {},
    force: bool = True,
) -> None:
    """Check that a file can be written, before what goes into it is computed.

    Args:
        setting: Name of the setting that names the file.
        path: The file, whose folders may be new.
        folder: Whether it is a folder to write into instead.
        inputs: From names of settings to files that must not be overwritten.
        force: Whether a file that is there may be overwritten; a tool's option ``--force``.

    Raises:
        SettingError: If ``path`` or what is above it is of another kind or cannot be written, or
            ``path`` is one of ``inputs``, by whatever name, or is there without ``force``.
    """
    full = path.absolute()
    for name, given in inputs.items():
        source = Path(given).expanduser()
        if full.exists() and source.exists() and full.samefile(source):
            raise SettingError(setting, f"another name than {name}'s", repr(str(path)))
    there = next(part for part in (full, *full.parents) if os.path.lexists(part))
    got = repr(str(path)) if there == full else f"{str(path)!r} below {str(there)!r}"
    expected = "a folder to write into" if folder else "a file to write"
    needs_folder = folder or there != full
    if there.is_dir() != needs_folder:
        raise SettingError(
            setting, expected, f"{got}, which is {'no' if needs_folder else 'a'} folder"
        )
    if not os.access(there, os.W_OK):
        raise SettingError(setting, expected, f"{got}, which may not be written")
    if path.exists() and not force:
        raise SettingError(
            setting, "a new file, or --force to overwrite it", f"{str(path)!r}, which is there"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the one of ``known`` that is spelt most like ``name``, or nothing.

    Example:
        >>> nearest("mskdd", ["kd", "mskd"])
        "Did you mean 'mskd'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""
