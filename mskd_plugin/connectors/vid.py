"""The regressor of variational information distillation."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.errors import SettingError, check_count


@MODELS.register_module()
class VIDRegressor(BaseModule):
    """Predict a teacher's map from a student's: three 1 x 1 convolutions without bias, ReLU
    between.

    Args:
        in_channels: Channels of the student's map.
        out_channels: Channels of the teacher's map, and of the layers between.
        pool: Side of the windows that the student's map is averaged over first: how many times
            larger it is than the teacher's. 1 where it is not larger.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, H / pool, W / pool).

    Raises:
        SettingError: If a setting is malformed, or ``pool`` does not divide the map's sides.

    Source: S. Ahn et al., arXiv 1904.05835, with the layers of RepDistiller's ``VID.py``, which has
    them inside the loss; the loss is
    :class:`mskd_plugin.losses.VariationalInformationLoss`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: int = 1,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        self.pool = check_count("pool", pool)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Return the predicted means."""
        if self.pool > 1:
            if any(side % self.pool for side in feature.shape[-2:]):
                raise SettingError(
                    "pool",
                    f"a divisor of the map's sides {tuple(feature.shape[-2:])}",
                    self.pool,
                )
            feature = functional.avg_pool2d(feature, self.pool)
        means: Tensor = self.layers(feature)
        return means
