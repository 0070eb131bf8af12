"""ShuffleNetV2 for 32 x 32 images."""

from __future__ import annotations

import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.backbones.base import Backbone, ChannelShuffle


class DownBlock(nn.Module):
    """Two branches on the whole input, each with a depthwise 3x3 convolution of stride 2, side by
    side and shuffled.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, half of them from each branch.

    Shapes:
        (N, in_channels, H, W) to (N, channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        left = self.bn1(self.conv1(x))
        left = functional.relu(self.bn2(self.conv2(left)))
        right = functional.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = functional.relu(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], dim=1))


class SplitBlock(nn.Module):
    """The first half of the channels as it is, and three convolutions of the second half, side by
    side and shuffled.

    The shuffled channels pass ``preact``, an identity, on their way to the last ReLU, which is not
    in place: ``preact`` records the values before that ReLU, ``relu`` (or the block) those after
    it. The first half comes out of a ReLU already, so another changes nothing.

    Args:
        channels: Channels of the input, none negative, and of the output.

    Shapes:
        (N, channels, H, W) to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = ChannelShuffle(2)
        self.preact = nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        kept, x = x.chunk(2, dim=1)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.bn3(self.conv3(x))
        return self.relu(self.preact(self.shuffle(torch.cat([kept, x], dim=1))))


@MODELS.register_module()
class CIFARShuffleNetV2(Backbone):
    """ShuffleNetV2 (1x): a 1x1 stem that keeps the image's size, and three stages of a block that
    halves it and 3, 7 and 3 more blocks.

    It is not mmpretrain's ``ShuffleNetV2``. Module names are those of the CRD benchmark's network,
    so that its checkpoints fit under ``backbone.`` (and ``head.fc.`` for the classifier).

    For recorders inside a classifier: ``backbone.relu1`` is the stem's map, ``backbone.layer3`` the
    last stage's map after the ReLU, and ``backbone.layer3.3.preact`` the same map before it, its
    channels shuffled alike (in the benchmark they are not). ``backbone.relu2`` is the map that is
    pooled for the classifier.

    Args:
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: torch's own, as in the benchmark.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 1024, H/8, W/8), after the ReLU.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARShuffleNetV2
        >>> tuple(CIFARShuffleNetV2()(torch.rand(2, 3, 32, 32))[0].shape)
        (2, 1024, 4, 4)

    Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design"
    (arXiv 1807.11164), as in the CRD benchmark (HobbitLong/RepDistiller,
    ``models/ShuffleNetv2.py``).
    """

    stem_channels = 24
    widths = (116, 232, 464)
    last_channels = 1024
    blocks = (3, 7, 3)

    def __init__(self, in_channels: int = 3, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self.conv1 = nn.Conv2d(in_channels, self.stem_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.stem_channels)
        self.relu1 = nn.ReLU()
        inputs = (self.stem_channels, *self.widths)
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks)):
            layers = [DownBlock(inputs[stage], width), *[SplitBlock(width) for _ in range(count)]]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.conv2 = nn.Conv2d(self.widths[-1], self.last_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(self.last_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map that is pooled for the classifier."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return (self.relu2(self.bn2(self.conv2(x))),)
