"""MobileNetV1 for ImageNet."""

from __future__ import annotations

from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.backbones.base import Backbone, conv_norm_relu


@MODELS.register_module()
class MobileNetV1(Backbone):
    """MobileNetV1: a 3x3 stem of stride 2 and thirteen pairs of a depthwise 3x3 and a 1x1
    convolution.

    The student of ResNet-50 in ImageNet tables, where many papers call it MobileNet or even
    MobileNetV2. Module names are those of mdistiller's network, so that its checkpoints fit under
    ``backbone.`` (and ``head.fc.`` for the classifier).

    For recorders inside a classifier: ``backbone.model.0`` is the stem's map; ``backbone.model.3``,
    ``.5``, ``.11`` and ``.13`` are the stages' maps after the ReLU, and ``backbone.model.3.4`` and
    so on the same maps before it.

    Args:
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: torch's own, as in mdistiller.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 1024, H/32, W/32), after the ReLU.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import MobileNetV1
        >>> tuple(MobileNetV1()(torch.rand(2, 3, 64, 64))[0].shape)
        (2, 1024, 2, 2)

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications" (arXiv 1704.04861), as in mdistiller (megvii-research/mdistiller,
    ``mdistiller/models/imagenet/mobilenetv1.py``).
    """

    stem_channels = 32
    #: Channels and stride of each pair.
    pairs = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    )

    def __init__(self, in_channels: int = 3, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        width = self.stem_channels
        self.model = nn.Sequential(nn.Sequential(*conv_norm_relu(in_channels, width, 3, stride=2)))
        for channels, stride in self.pairs:
            depthwise = conv_norm_relu(width, width, 3, stride, groups=width)
            self.model.append(nn.Sequential(*depthwise, *conv_norm_relu(width, channels, 1)))
            width = channels

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map of the last pair."""
        return (self.model(x),)
