"""The 6n+4 wide residual networks for 32 x 32 images."""

from __future__ import annotations

from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.backbones.base import KAIMING, Backbone
from mskd_plugin.errors import SettingError


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and a ReLU, and a shortcut.

    Where the channels change, the shortcut is a bare 1x1 convolution of the input after its first
    normalisation and ReLU; else it is the input itself. No ReLU follows the sum.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.

    Shapes:
        (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None  # the benchmark's name, as in its checkpoints
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    """A row of blocks; only the first has a stride and changes the channels."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreActivationBlock(in_channels, channels, stride),
            *[PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)],
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the blocks."""
        return self.layer(x)


@MODELS.register_module()
class CIFARWideResNet(Backbone):
    """Wide residual network with 6n+4 layers: a 3x3 stem, three stages of n blocks, a last
    normalisation and ReLU.

    ``wrn_40_2`` is depth 40 and width 2. MMRazor's ``WideResNet`` computes the same function, but
    its ReLUs overwrite their inputs, so that nothing before them can be recorded. Module names are
    those of the CRD benchmark's networks, so that its checkpoints fit under ``backbone.`` (and
    ``head.fc.`` for the classifier).

    A stage has three maps for recorders inside a classifier:

    - the sum of its last block, which the benchmark takes for the stage's map: ``backbone.block1``,
      ``backbone.block2``, ``backbone.block3``. Neither normalised nor activated: it has negative
      values;
    - the same normalised by the layer that follows, before the ReLU:
      ``backbone.block2.layer.0.bn1``, ``backbone.block3.layer.0.bn1``, ``backbone.bn1``;
    - that after the ReLU: ``backbone.block2.layer.0.relu1``, ``backbone.block3.layer.0.relu1``,
      ``backbone.relu``. The last of these is pooled for the classifier.

    ``backbone.conv1`` is the stem's map, not activated either.

    Args:
        depth: Number of layers, 6n+4: 10, 16, 22, 28, 40 and so on.
        widen_factor: Factor on the channels (16, 32, 64) of the stages.
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: convolutions by Kaiming with fan-out,
            normalisation layers with weight 1 and bias 0.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 64 * widen_factor, H/4, W/4), normalised
        and after the ReLU.

    Raises:
        SettingError: If ``depth`` is not 6n+4, or ``widen_factor`` is below 1.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARWideResNet
        >>> tuple(CIFARWideResNet(depth=16, widen_factor=2)(torch.rand(2, 3, 32, 32))[0].shape)
        (2, 128, 8, 8)

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146), as in the CRD
    benchmark (HobbitLong/RepDistiller, ``models/wrn.py``).
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int = 1,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise SettingError("depth", "6n+4 with n of at least 1 (10, 16, 22, ...)", depth)
        if widen_factor < 1:
            raise SettingError("widen_factor", "at least 1", widen_factor)
        super().__init__(init_cfg or KAIMING)
        self.depth = depth
        self.widen_factor = widen_factor
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, widths[0], blocks, 1)
        self.block2 = Stage(widths[0], widths[1], blocks, 2)
        self.block3 = Stage(widths[1], widths[2], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map that is pooled for the classifier."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return (self.relu(self.bn1(x)),)
