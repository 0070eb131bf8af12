"""Factor transfer (FT): the loss between factors, and the one that trains the paraphraser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmrazor.models.architectures.connectors import Paraphraser
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_at_least_zero, check_count, is_number
from mskd_plugin.losses.feature_loss import FeatureLoss, at_least_float32, pool_to_smaller
from mskd_plugin.losses.maps import check_channels, check_maps


def normalized_factor(factor: Tensor, power: int) -> Tensor:
    """Return the L2-normalised mean over channels of ``factor ** power``, (N, H W)."""
    return F.normalize(factor.pow(power).mean(1).flatten(1))


def factor_transfer(
    student: Tensor, teacher: Tensor, factor_power: int, error_power: float
) -> Tensor:
    """Return the mean over images and positions of ``|q_s - q_t| ** error_power``.

    Args:
        student: The translator's factor, (N, C_s, H, W).
        teacher: The paraphraser's, (N, C_t, H', W'). The larger map is average-pooled to the size
            of the smaller.
        factor_power: Power of the factors before the mean over channels.
        error_power: Power of the difference.
    """
    student, teacher = pool_to_smaller(student, teacher)
    error = normalized_factor(student, factor_power) - normalized_factor(teacher, factor_power)
    return error.abs().pow(error_power).mean()


@MODELS.register_module()
class FactorTransferLoss(FeatureLoss):
    r"""Pull the student's factor to the frozen paraphraser's factor of the teacher (FT).

    .. math::
        L = w \operatorname{mean}_{np} |q^s_{np} - q^t_{np}|^{p_2}, \quad
        q = \operatorname{normalize}_p(\operatorname{mean}_c f_c^{p_1})

    averaged over images n and positions p.

    Args:
        loss_weight: :math:`w`, at least 0. The CRD benchmark takes 200.
        factor_power: :math:`p_1`, a positive whole number. Default 2, as published.
        error_power: :math:`p_2`, at least 1. Default 1, as published.

    Shapes:
        ``student_feature``, the translator's factor, (N, C_s, H, W), and ``teacher_feature``, the
        paraphraser's, (N, C_t, H', W'); the larger map is pooled. The result is a scalar, in
        float32 or wider.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if a factor is no map.

    Source: Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer",
    NeurIPS 2018, arXiv 1802.04977, as HobbitLong/RepDistiller computes it
    (``distiller_zoo/FT.py``). MMRazor's ``FTLoss`` normalises all channels together and takes no
    mean over them, which is another loss, and it does not pool.
    """

    dimensions = (4,)

    def __init__(
        self, loss_weight: float = 1.0, factor_power: int = 2, error_power: float = 1.0
    ) -> None:
        super().__init__(loss_weight)
        self.factor_power = check_count("factor_power", factor_power)
        if not is_number(error_power) or error_power < 1:
            raise SettingError("error_power", "a number of at least 1", repr(error_power))
        self.error_power = error_power

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`factor_transfer`."""
        return factor_transfer(student, teacher, self.factor_power, self.error_power)


@MODELS.register_module()
class ParaphraserLoss(nn.Module):
    """Train FT's paraphraser: the mean over all elements of the squared error of the teacher's map,
    reconstructed from its factor.

    Holds the paraphraser's decoder, which nothing else uses: three transposed 3x3 convolutions with
    bias, each followed by LeakyReLU(0.1), the mirrored encoder. The encoder is the connector of the
    teacher's side, so that the second phase computes the factor alone.

    Args:
        in_channels: Channels of the teacher's map.
        factor_channels: Channels of the factor.
        loss_weight: Weight, at least 0. Default 1, as published.

    Shapes:
        ``teacher_factor`` (N, factor_channels, H, W), ``teacher_feature`` (N, in_channels, H, W).
        The result is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if the maps do not fit.

    Source: as :class:`FactorTransferLoss`. The layers are those of ``models/util.py`` there and of
    MMRazor's ``Paraphraser``, whose encoder and decoder no two losses can use apart.
    """

    def __init__(self, in_channels: int, factor_channels: int, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.in_channels = check_count("in_channels", in_channels)
        self.factor_channels = check_count("factor_channels", factor_channels)
        self.decoder = Paraphraser(in_channels, factor_channels).decoder

    def forward(self, teacher_factor: Tensor, teacher_feature: Tensor) -> Tensor:
        """Return the weighted loss; its gradient reaches decoder and encoder."""
        check_maps(teacher_factor=teacher_factor, teacher_feature=teacher_feature)
        check_channels("teacher_factor", teacher_factor, self.factor_channels, "`factor_channels`")
        check_channels("teacher_feature", teacher_feature, self.in_channels, "`in_channels`")
        reconstruction = self.decoder(teacher_factor)
        with torch.autocast(teacher_feature.device.type, enabled=False):
            error = at_least_float32(reconstruction) - at_least_float32(teacher_feature.detach())
            return self.loss_weight * error.square().sum() / max(error.numel(), 1)
