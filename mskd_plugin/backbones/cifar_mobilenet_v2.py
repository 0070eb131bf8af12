"""MobileNetV2 for 32 x 32 images."""

from __future__ import annotations

from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.backbones.base import KAIMING, Backbone, conv_norm_relu
from mskd_plugin.errors import SettingError


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 one, a 1x1 one that narrows and is linear.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the depthwise convolution.
        expand_ratio: Factor by which the first convolution widens; it is there for 1 too.

    Shapes:
        (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)). The input is
        added where it has the shape of the output.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_norm_relu(in_channels, hidden, 1),
            *conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            *conv_norm_relu(hidden, channels, 1)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return x + self.conv(x) if self.residual else self.conv(x)


@MODELS.register_module()
class CIFARMobileNetV2(Backbone):
    """MobileNetV2 whose stem halves the image, with ReLU instead of ReLU6.

    It is not mmpretrain's ``MobileNetV2``: the first block keeps its widening convolution, the
    strides are others, and channels are cut instead of rounded to eights. Module names are those of
    the CRD benchmark's network, so that its checkpoints fit under ``backbone.`` (and ``head.fc.``
    for the classifier).

    For recorders inside a classifier: ``backbone.conv1`` is the stem's map, ``backbone.blocks.1``,
    ``.2``, ``.4`` and ``.6`` are the stages' maps. They end in a linear layer, which no ReLU
    follows, so there are no others before a ReLU. ``backbone.conv2`` is the map that is pooled for
    the classifier.

    Args:
        expand_ratio: Factor by which a block widens its input, T in the benchmark.
        widen_factor: Factor on the channels; the last convolution's are 1280 for at most 1.
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: convolutions by Kaiming with fan-out,
            normalisation layers with weight 1 and bias 0.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 1280, H/16, W/16), after the ReLU.

    Raises:
        SettingError: If ``expand_ratio`` is below 1, or ``widen_factor`` leaves a layer without
            channels.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARMobileNetV2
        >>> tuple(CIFARMobileNetV2()(torch.rand(2, 3, 32, 32))[0].shape)
        (2, 1280, 2, 2)

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv
    1801.04381), as in the CRD benchmark (HobbitLong/RepDistiller, ``models/mobilenetv2.py``).
    """

    #: Does a block group widen, its channels, blocks, and the first block's stride.
    groups = (
        (False, 16, 1, 1),
        (True, 24, 2, 1),
        (True, 32, 3, 2),
        (True, 64, 4, 2),
        (True, 96, 3, 1),
        (True, 160, 3, 2),
        (True, 320, 1, 1),
    )

    def __init__(
        self,
        expand_ratio: int = 6,
        widen_factor: float = 0.5,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if expand_ratio < 1:
            raise SettingError("expand_ratio", "at least 1", expand_ratio)
        if int(16 * widen_factor) < 1:
            raise SettingError("widen_factor", "at least 1/16", widen_factor)
        super().__init__(init_cfg or KAIMING)
        self.widen_factor = widen_factor
        width = int(32 * widen_factor)
        self.conv1 = nn.Sequential(*conv_norm_relu(in_channels, width, 3, stride=2))
        self.blocks = nn.ModuleList()
        for widens, base_channels, count, stride in self.groups:
            channels = int(base_channels * widen_factor)
            ratio = expand_ratio if widens else 1
            self.blocks.append(
                nn.Sequential(
                    InvertedResidual(width, channels, stride, ratio),
                    *[InvertedResidual(channels, channels, 1, ratio) for _ in range(count - 1)],
                )
            )
            width = channels
        self.conv2 = nn.Sequential(*conv_norm_relu(width, int(1280 * max(widen_factor, 1)), 1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map that is pooled for the classifier."""
        x = self.conv1(x)
        for blocks in self.blocks:
            x = blocks(x)
        return (self.conv2(x),)
