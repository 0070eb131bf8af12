"""ShuffleNetV1 for 32 x 32 images."""

from __future__ import annotations

import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.backbones.base import Backbone, ChannelShuffle


class ShuffleBottleneck(nn.Module):
    """A grouped 1x1 convolution, a channel shuffle, a depthwise 3x3 and a grouped 1x1 convolution,
    and a shortcut.

    With stride 2 the average-pooled input is put behind the channels, else it is added. The result
    passes ``preact``, an identity, on its way to the last ReLU, which is not in place: ``preact``
    records the values before that ReLU, ``relu`` (or the block) those after it.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, at stride 2 with those of the input among them.
        stride: 1 or 2.
        groups: Groups of the 1x1 convolutions.
        first_groups: Groups of the first 1x1 convolution and of the shuffle.

    Shapes:
        (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int
    ) -> None:
        super().__init__()
        computed = channels - in_channels if stride == 2 else channels
        hidden = computed // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle1 = ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, computed, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.preact = nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        out = self.shuffle1(functional.relu(self.bn1(self.conv1(x))))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + x if self.shortcut is None else torch.cat([out, self.shortcut(x)], dim=1)
        return self.relu(self.preact(out))


@MODELS.register_module()
class CIFARShuffleNetV1(Backbone):
    """ShuffleNetV1 with three groups: a 1x1 stem that keeps the image's size, and three stages of
    4, 8 and 4 blocks, each of which halves it.

    It is not mmpretrain's ``ShuffleNetV1``. The first convolution of all, on the 24 channels of the
    stem, has no groups. Module names are those of the CRD benchmark's network, so that its
    checkpoints fit under ``backbone.`` (and ``head.fc.`` for the classifier).

    For recorders inside a classifier: ``backbone.relu`` is the stem's map, ``backbone.layer3`` the
    last stage's map after the ReLU, and ``backbone.layer3.3.preact`` the same map before it.

    Args:
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: torch's own, as in the benchmark.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 960, H/8, W/8), after the ReLU.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARShuffleNetV1
        >>> tuple(CIFARShuffleNetV1()(torch.rand(2, 3, 32, 32))[0].shape)
        (2, 960, 4, 4)

    Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
    Mobile Devices" (arXiv 1707.01083), as in the CRD benchmark (HobbitLong/RepDistiller,
    ``models/ShuffleNetv1.py``).
    """

    groups = 3
    stem_channels = 24
    widths = (240, 480, 960)
    blocks = (4, 8, 4)

    def __init__(self, in_channels: int = 3, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self.conv1 = nn.Conv2d(in_channels, self.stem_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.stem_channels)
        self.relu = nn.ReLU()
        inputs = (self.stem_channels, *self.widths)
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks)):
            first_groups = 1 if stage == 0 else self.groups
            layers = [ShuffleBottleneck(inputs[stage], width, 2, self.groups, first_groups)]
            layers += [
                ShuffleBottleneck(width, width, 1, self.groups, self.groups)
                for _ in range(count - 1)
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map of the last stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        return (self.layer3(self.layer2(self.layer1(x))),)
