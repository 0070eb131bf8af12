"""The one form of error for settings that cannot work."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting that cannot work: which one, what was expected, what was got.

    The command line tools print it as one line and exit with status 2.

    Args:
        setting: Name of the argument, config key or command line option.
        expected: What would have worked.
        got: What was found.
        hint: One more sentence, if it helps.

    Example:
        >>> raise SettingError("temperature", "a number above 0", -1)
        Traceback (most recent call last):
        ...
        mskd_plugin.errors.SettingError: Expected `temperature` to be a number above 0, but got -1.
    """

    def __init__(self, setting: str, expected: str, got: object, hint: str = "") -> None:
        super().__init__(
            f"Expected `{setting}` to be {expected}, but got {got}." + (f" {hint}" if hint else "")
        )
        self.setting = setting
