"""What this project's backbones share."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones.base_backbone import BaseBackbone
from torch import Tensor, nn

#: Convolutions by Kaiming with fan-out, without bias; normalisation layers start as the identity.
KAIMING: list[dict[str, Any]] = [
    {"type": "Kaiming", "layer": "Conv2d", "mode": "fan_out", "nonlinearity": "relu"},
    {"type": "Constant", "layer": "BatchNorm2d", "val": 1, "bias": 0},
]


class Backbone(BaseBackbone):
    """A backbone whose ``train`` returns it, as that of any module; mmpretrain's does not."""

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode and return the network."""
        super().train(mode)
        return self


def conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution without bias that keeps the size but for its stride, a normalisation and
    a ReLU that is not in place, so that recorders find the values before it.
    """
    conv = nn.Conv2d(
        in_channels,
        channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
    )
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


class ChannelShuffle(nn.Module):
    """Interleave the channels of the groups: channel ``g * n + i`` becomes ``i * groups + g``.

    Args:
        groups: Number of groups, of n channels each.

    Shapes:
        (N, groups * n, H, W) to the same.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
