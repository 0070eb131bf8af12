"""Checks that losses on several feature maps share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from mskd_plugin.errors import SettingError
from mskd_plugin.losses.feature_loss import shape_or_type


def check_maps(**maps: Tensor) -> None:
    """Check that every argument is a batch of maps, and all batches are of one size.

    Raises:
        SettingError: If one is not of the shape (N, C, H, W), or the N differ.
    """
    for name, value in maps.items():
        if not isinstance(value, Tensor) or value.dim() != 4:
            raise SettingError(name, "maps of the shape (N, C, H, W)", shape_or_type(value))
    sizes = {name: len(value) for name, value in maps.items()}
    if len(set(sizes.values())) > 1:
        raise SettingError(" and ".join(maps), "maps of the same images", f"batches of {sizes}")


def check_channels(name: str, value: Tensor, channels: int, of: str) -> None:
    """Check the channels of a map or of vectors.

    Raises:
        SettingError: If ``value`` does not have as many channels as ``of`` says.
    """
    if value.shape[1] != channels:
        raise SettingError(name, f"of {channels} channels, {of}", f"{value.shape[1]}")


def check_counts(name: str, value: Iterable[int]) -> tuple[int, ...]:
    """Return numbers of channels as a tuple.

    Raises:
        SettingError: If they are no positive whole numbers.
    """
    counts = tuple(value) if isinstance(value, Sequence) else ()
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise SettingError(name, "positive whole numbers", repr(value))
    return counts
