"""The regressor of FitNets."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_count

RESIZES = ("none", "halve", "double")


@MODELS.register_module()
class FitNetRegressor(BaseModule):
    """Bring a student's map to the channels and the size of the teacher's: convolution, batch
    normalisation, ReLU.

    Args:
        in_channels: Channels of the student's map.
        out_channels: Channels of the teacher's map.
        resize: ``"none"``: a convolution of ``kernel_size`` without padding. ``"halve"``: a 3 x 3
            convolution of stride 2. ``"double"``: a transposed 4 x 4 convolution of stride 2.
        kernel_size: For ``"none"``: 1, or h + 1 for maps that are to lose h rows and columns.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, H', W'); H' is H - kernel_size + 1, ceil(H / 2)
        or 2 H.

    Raises:
        SettingError: If a setting is malformed.

    Source: A. Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, with the layers
    of the CRD benchmark (``ConvReg`` of RepDistiller and mdistiller), which have a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resize: str = "none",
        kernel_size: int = 1,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_count("kernel_size", kernel_size)
        if resize not in RESIZES:
            raise SettingError("resize", f"one of {RESIZES}", repr(resize))
        if resize != "none" and kernel_size != 1:
            raise SettingError("kernel_size", "1 unless `resize` is 'none'", kernel_size)
        self.conv: nn.Module
        if resize == "none":
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        elif resize == "halve":
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, feature: Tensor) -> Tensor:
        """Return the regressed map."""
        regressed: Tensor = self.relu(self.bn(self.conv(feature)))
        return regressed
