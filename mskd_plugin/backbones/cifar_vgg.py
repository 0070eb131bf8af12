"""The VGG networks with normalisation for 32 x 32 images."""

from __future__ import annotations

from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.backbones.base import KAIMING, Backbone
from mskd_plugin.errors import SettingError

WIDTHS = (64, 128, 256, 512, 512)
#: Depth -> convolutions in each of the five blocks.
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


@MODELS.register_module()
class CIFARVGG(Backbone):
    """VGG with batch normalisation: five blocks of 3x3 convolutions, max pooling after the first
    three.

    A fourth pooling, after the fourth block, is there for images of 64 rows only, as in the CRD
    benchmark; so the last two blocks work at the same size for 32 x 32 images. Module names are
    those of its networks, so that its checkpoints fit under ``backbone.`` (and ``head.fc.`` for the
    classifier).

    For recorders inside a classifier: ``backbone.block0`` to ``backbone.block4`` are the blocks'
    maps before their last ReLU, ``backbone.relu0`` to ``backbone.relu4`` those after it, before the
    pooling.

    Args:
        depth: Number of layers with the classifier: 8, 11, 13, 16 or 19.
        in_channels: Channels of the images.
        init_cfg: How ``init_weights`` initialises. Default: convolutions by Kaiming with fan-out
            and bias 0, normalisation layers with weight 1 and bias 0.

    Shapes:
        (N, in_channels, H, W) to a tuple of one map, (N, 512, H/8, W/8), after the ReLU.

    Raises:
        SettingError: If there is no network of that depth.

    Example:
        >>> import torch
        >>> from mskd_plugin.backbones import CIFARVGG
        >>> tuple(CIFARVGG(depth=8)(torch.rand(2, 3, 32, 32))[0].shape)
        (2, 512, 4, 4)

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (arXiv 1409.1556), as in the CRD benchmark (HobbitLong/RepDistiller,
    ``models/vgg.py``), which adds the eight-layer network.
    """

    def __init__(
        self, depth: int, in_channels: int = 3, init_cfg: dict | list[dict] | None = None
    ) -> None:
        if depth not in CONVOLUTIONS:
            raise SettingError("depth", f"one of {', '.join(map(str, CONVOLUTIONS))}", depth)
        super().__init__(init_cfg or KAIMING)
        self.depth = depth
        inputs = (in_channels, *WIDTHS)
        for index, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth])):
            setattr(self, f"block{index}", _block(inputs[index], width, count))
            setattr(self, f"relu{index}", nn.ReLU())
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the map of the last block."""
        pooled_after = (0, 1, 2, 3) if x.shape[-2] == 64 else (0, 1, 2)
        for index in range(len(WIDTHS)):
            x = getattr(self, f"relu{index}")(getattr(self, f"block{index}")(x))
            if index in pooled_after:
                x = self.pool(x)
        return (x,)


def _block(in_channels: int, channels: int, count: int) -> nn.Sequential:
    """Return convolutions, each normalised, with a ReLU between them and none at the end."""
    layers: list[nn.Module] = []
    for index in range(count):
        conv = nn.Conv2d(in_channels if index == 0 else channels, channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
