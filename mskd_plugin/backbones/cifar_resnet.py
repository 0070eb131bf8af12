"""The 6n+2 residual networks for 32 x 32 images, plain and four times as wide."""

from __future__ import annotations

from collections.abc import Sequence

from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.backbones.base import KAIMING, Backbone
from mskd_plugin.errors import SettingError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    The sum passes ``preact``, an identity, on its way to the last ReLU, which is not in place:
    ``preact`` records the values before that ReLU, ``relu`` (or the block) those after it.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.

    Shapes:
        (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.preact = nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self.preact(out + shortcut))


@MODELS.register_module()
class CIFARResNet(Backbone):
    """Residual network with 6n+2 layers: a 3x3 stem and three stages of n basic blocks.

    ``resnet8`` to ``resnet110`` have the default widths, the ``x4`` networks ``(32, 64, 128,
    256)``. Module names are those of the CRD benchmark's networks, so that its checkpoints fit
    under ``backbone.`` (and ``head.fc.`` for the classifier).

    For recorders inside a classifier: ``backbone.relu`` is the stem's map, ``backbone.layer3`` the
    last stage's map after the ReLU, and ``backbone.layer3.<last block>.preact`` the same map before
    it.

    Args:
        depth: Number of layers, 6n+2: 8, 14, 20, 32, 44, 56, 110 and so on.
        widths: Channels of the stem and of the three stages.
        out_indices: Stages to return, counted from 0, each once and in order.
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: convolutions by Kaiming with fan-out,
            normalisation layers with weight 1 and bias 0.

    Shapes:
        (N, in_channels, H, W) to a tuple with one map per stage in ``out_indices``: (N, widths[1],
        H, W), (N, widths[2], H/2, W/2), (N, widths[3], H/4, W/4), all after the ReLU.

    Raises:
        SettingError: If ``depth`` is not 6n+2, ``widths`` are not four positive numbers, or
            ``out_indices`` names a stage that does not exist.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARResNet
        >>> maps = CIFARResNet(depth=8, out_indices=(0, 1, 2))(torch.rand(2, 3, 32, 32))
        >>> [tuple(m.shape) for m in maps]
        [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section
    4.2, with the 1x1 convolution shortcuts of the CRD benchmark (HobbitLong/RepDistiller).
    """

    strides = (1, 2, 2)

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        out_indices: Sequence[int] = (2,),
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise SettingError("depth", "6n+2 with n of at least 1 (8, 14, 20, 32, ...)", depth)
        if len(widths) != 4 or any(width < 1 for width in widths):
            raise SettingError("widths", "four positive numbers, the stem's first", tuple(widths))
        stages = range(len(self.strides))
        if not out_indices or list(out_indices) != [i for i in stages if i in out_indices]:
            raise SettingError(
                "out_indices", "stages out of (0, 1, 2), each once and in order", tuple(out_indices)
            )
        super().__init__(init_cfg or KAIMING)
        self.depth = depth
        self.out_indices = tuple(out_indices)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = _stage(widths[0], widths[1], blocks, self.strides[0])
        self.layer2 = _stage(widths[1], widths[2], blocks, self.strides[1])
        self.layer3 = _stage(widths[2], widths[3], blocks, self.strides[2])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the stages in ``out_indices``."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps = []
        for index, stage in enumerate((self.layer1, self.layer2, self.layer3)):
            x = stage(x)
            if index in self.out_indices:
                maps.append(x)
        return tuple(maps)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride),
        *[BasicBlock(channels, channels, 1) for _ in range(blocks - 1)],
    )
