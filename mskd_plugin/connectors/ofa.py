"""The branches of one-for-all distillation (OFA-KD): from a stage of the student to logits."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError


class HalvingConv(nn.Sequential):
    """Two depthwise-separable 3x3 convolutions, the first with stride 2, each with BN and ReLU.

    Args:
        in_channels: Channels of the input and between the two.
        out_channels: Channels of the output.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for stride, channels in ((2, in_channels), (1, out_channels)):
            layers += [
                nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
                nn.Conv2d(in_channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        super().__init__(*layers)


@MODELS.register_module()
class OFABranch(BaseModule):
    """Map a convolutional stage of the student to logits.

    As many :class:`HalvingConv` as stages follow, which double the channels but for the last, which
    gives ``hidden_channels``; behind the last stage a 1x1 convolution with bias in their place.
    Then the average over positions and a linear classifier. The branch trains with the student and
    is not part of it afterwards. Convolutions start from Kaiming's initialisation with fan-out, the
    linear layer from a truncated normal with deviation 0.02 and no bias.

    Args:
        in_channels: Channels of the stage.
        hidden_channels: Width before the classifier: the larger of both networks' pooled widths.
        num_classes: Number of classes.
        halvings: Stages between this one and the last.

    Shapes:
        (N, in_channels, H, W) to (N, num_classes).

    Raises:
        SettingError: When built, if a size is no positive integer; when called, if the input is no
            map of ``in_channels`` channels.

    Source: Hao840/OFAKD, ``distillers/ofa.py``, arXiv 2310.19444.

    Example:
        >>> import torch
        >>> OFABranch(16, 64, 10, halvings=2)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        halvings: int,
    ) -> None:
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("hidden_channels", hidden_channels, 1),
            ("num_classes", num_classes, 1),
            ("halvings", halvings, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(name, f"an integer of at least {least}", repr(value))
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        for left in reversed(range(halvings)):
            out_channels = 2 * in_channels if left else hidden_channels
            layers.append(HalvingConv(in_channels, out_channels))
            in_channels = out_channels
        if not layers:
            layers = [nn.Conv2d(in_channels, hidden_channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(hidden_channels, num_classes)
        self.apply(_initialize)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the branch's logits."""
        if feature.dim() != 4 or feature.shape[1] != self.in_channels:
            raise SettingError(
                "feature",
                f"a map (N, {self.in_channels}, H, W)",
                f"shape {tuple(feature.shape)}",
            )
        return self.fc(self.pool(self.layers(feature)).flatten(1))


def _initialize(module: nn.Module) -> None:
    # Here, not by an init_cfg: MMRazor's distiller does not run its connectors' `init_weights`.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
