"""VID: variational information distillation."""

from __future__ import annotations

import math

import torch
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_above_zero, check_count
from mskd_plugin.losses.feature_loss import FeatureLoss, pool_to_smaller


def variational_information(predicted: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of a teacher's map under a Gaussian, less a constant.

    Args:
        predicted: Means (N, C, H_s, W_s).
        teacher: (N, C, H_t, W_t).
        variance: (C,).
    """
    predicted, teacher = pool_to_smaller(predicted, teacher)
    variance = variance.view(-1, 1, 1)
    return ((predicted - teacher).square() / variance + variance.log()).mean() / 2


@MODELS.register_module()
class VariationalInformationLoss(FeatureLoss):
    r"""Variational information distillation (VID) of one stage.

    .. math::
        L = \alpha \operatorname{mean}_{nci} \frac{1}{2} \left[
            \frac{(\mu_{nci} - t_{nci})^2}{\sigma_c^2} + \log \sigma_c^2 \right], \quad
        \sigma_c^2 = \log(1 + e^{a_c}) + \epsilon

    over images n, channels c and positions i. :math:`\mu` is the student's map behind a learned
    regressor, the connector :class:`mskd_plugin.connectors.VIDRegressor`, and :math:`a_c` is
    learned here, one number a channel of the teacher. The mean is over all elements; several stages
    are several losses, whose sum is the method. Where the teacher's map is the larger one it is
    averaged down to the student's. The loss may be negative.

    mdistiller keeps :math:`a` in a plain list, where it is neither trained nor saved nor moved to
    the GPU; here it is a parameter, as in RepDistiller.

    Args:
        channels: Channels of the teacher's map, C.
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 1.
        init_variance: :math:`\sigma_c^2` before training, above ``eps``.
        eps: :math:`\epsilon`, above 0: the smallest variance.

    Shapes:
        Maps (N, C, H_s, W_s) and (N, C, H_t, W_t); a scalar comes out, in float32 or wider.

    Attributes:
        log_scale: :math:`a`, (C,).

    Raises:
        SettingError: If a setting is malformed, or a map has other than ``channels`` channels.

    Source: S. Ahn et al., "Variational Information Distillation for Knowledge Transfer", arXiv
    1904.05835, as computed by RepDistiller's ``VID.py``.
    """

    dimensions = (4,)

    def __init__(
        self,
        channels: int,
        loss_weight: float = 1.0,
        init_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(loss_weight)
        check_count("channels", channels)
        self.eps = check_above_zero("eps", eps)
        if check_above_zero("init_variance", init_variance) <= eps:
            raise SettingError("init_variance", f"above `eps`, {eps}", init_variance)
        self.log_scale = nn.Parameter(
            torch.full((channels,), _inverse_softplus(init_variance - eps))
        )

    @property
    def variance(self) -> Tensor:
        r""":math:`\sigma^2`, (C,)."""
        return torch.logaddexp(self.log_scale, torch.zeros_like(self.log_scale)) + self.eps

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`variational_information`."""
        channels = len(self.log_scale)
        for name, feature in (("student_feature", student), ("teacher_feature", teacher)):
            if feature.shape[1] != channels:
                raise SettingError(
                    name, f"a map of `channels` = {channels}", f"shape {tuple(feature.shape)}"
                )
        return variational_information(student, teacher, self.variance)


def _inverse_softplus(value: float) -> float:
    """log(exp(value) - 1), which overflows nowhere."""
    return value + math.log(-math.expm1(-value))
