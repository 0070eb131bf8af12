"""The warm-up of distillation losses, and their names in the log, as algorithm and hook state
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mskd_plugin.errors import SettingError, is_number


def check_warmup(setting: str, warmup: Mapping[str, float] | None) -> dict[str, float]:
    """Return ``warmup`` as a dict, or say what is wrong with it.

    Raises:
        SettingError: If it is no mapping from names to numbers of epochs above 0.
    """
    if warmup is None:
        return {}
    if not isinstance(warmup, Mapping):
        raise SettingError(
            setting,
            "a dict from a distillation loss's name to a number of epochs above 0",
            repr(warmup),
        )
    for name, epochs in warmup.items():
        if not is_number(epochs) or epochs <= 0:
            raise SettingError(f"{setting}.{name}", "a number of epochs above 0", repr(epochs))
    return dict(warmup)


def logged_name(loss: str) -> str:
    """Return a distillation loss's name without "loss", for what is logged beside it.

    MMEngine adds what has "loss" in its name to the sum that trains, and averages it in the log.
    """
    return loss.replace("loss", "").strip("_")


def check_losses_exist(setting: str, warmup: Iterable[str], losses: Iterable[str]) -> None:
    """Check that the losses to warm up are among the distillation losses.

    Raises:
        SettingError: If one is not; lists those that are there.
    """
    known = list(losses)
    for name in warmup:
        if name not in known:
            raise SettingError(
                setting,
                f"names of distillation losses ({', '.join(known) or 'there are none'})",
                repr(name),
            )
