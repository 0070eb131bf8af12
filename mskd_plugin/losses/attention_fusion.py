"""ReviewKD's chain of attention-based fusions (ABF)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class AttentionFusion(nn.Module):
    """Bring one student map to the teacher's channels, together with what the deeper stages had.

    x = BN(1x1 conv(map)); where the stage fuses, with the deeper stage's residual y resized to x:
    two attention maps z = sigmoid(1x1 conv with bias([x, y])), and x becomes x z_0 + y z_1. Then x
    is resized to the teacher's size. Output BN(3x3 conv(x)), and x as the residual of the next
    stage. The other convolutions have no bias; all resizing is by nearest neighbour.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of x and y.
        out_channels: Channels of the teacher's map.
        fuses: Whether there is a deeper stage.

    Shapes:
        Map (N, in_channels, H, W) and residual (N, mid_channels, H', W') to an output (N,
        out_channels, *size) and a residual (N, mid_channels, *size).
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuses: bool) -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        last = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(first, nn.BatchNorm2d(mid_channels))
        self.conv2 = nn.Sequential(last, nn.BatchNorm2d(out_channels))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuses else None
        for convolution in (first, last):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(
        self, feature: Tensor, residual: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the residual, both of height and width ``size``."""
        x = self.conv1(feature)
        if self.attention is not None and residual is not None:
            y = _resized(residual, (x.shape[2], x.shape[3]))
            z = torch.sigmoid(self.attention(torch.cat([x, y], dim=1)))
            x = x * z[:, :1] + y * z[:, 1:]
        x = _resized(x, size)
        return self.conv2(x), x


def _resized(value: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(value.shape[2:]) == size:
        return value
    return functional.interpolate(value, size, mode="nearest")


class AttentionFusionChain(nn.Module):
    """Fuse a student's maps from the deepest to the first.

    Args:
        in_channels: Channels of the student's maps, the first stage first.
        out_channels: Channels of the teacher's maps, as many.
        mid_channels: Channels in which the maps are fused.

    Shapes:
        A sequence of maps (N, C_i, H_i, W_i), the first stage first, and one (height, width) for
        each; the outputs have the teacher's channels and those sizes, in the same order.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044,
    with the layers and their initialisation of dvlab-research/ReviewKD. Sizes are those of the maps
    at hand, where that code has a table of them per pair of networks.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], mid_channels: int
    ) -> None:
        super().__init__()
        deepest = len(in_channels) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(given, mid_channels, wanted, fuses=index < deepest)
            for index, (given, wanted) in enumerate(zip(in_channels, out_channels))
        )

    def forward(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the outputs, the first stage first."""
        outputs: list[Tensor] = []
        residual = None
        stages = list(zip(self.fusions, features, sizes))
        for fusion, feature, size in reversed(stages):
            output, residual = fusion(feature, residual, size)
            outputs.insert(0, output)
        return outputs
