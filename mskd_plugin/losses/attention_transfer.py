"""AT: attention transfer."""

from __future__ import annotations

from mmrazor.registry import MODELS
from torch import Tensor
from torch.nn import functional

from mskd_plugin.errors import check_count
from mskd_plugin.losses.feature_loss import FeatureLoss, pool_to_smaller


def attention(feature: Tensor, power: int) -> Tensor:
    """Return where a map is active: (N, C, H, W) to (N, H W) of unit length.

    Args:
        feature: The map.
        power: Exponent of the values before the mean over channels.
    """
    return functional.normalize(feature.pow(power).mean(1).flatten(1), dim=1, eps=1e-12)


def attention_transfer(student: Tensor, teacher: Tensor, power: int) -> Tensor:
    """Return the mean squared difference of two maps' attention.

    Args:
        student: (N, C_s, H_s, W_s).
        teacher: (N, C_t, H_t, W_t).
        power: Exponent of the values before the mean over channels.
    """
    student, teacher = pool_to_smaller(student, teacher)
    return (attention(student, power) - attention(teacher, power)).square().mean()


@MODELS.register_module()
class AttentionTransferLoss(FeatureLoss):
    r"""Attention transfer (AT) of one stage.

    .. math::
        L = \alpha \operatorname{mean}_{n, i} (a^s_{ni} - a^t_{ni})^2, \quad
        a_n = \frac{b_n}{\lVert b_n \rVert_2}, \quad
        b_{ni} = \operatorname{mean}_c f_{nci}^p

    over images n, positions i and channels c. The mean is taken over images and positions; several
    stages are several losses, whose sum is the method. Where the maps differ in size the larger one
    is first averaged down to the smaller, before the power.

    MMRazor's ``ATLoss`` is the same term for maps of one size and p = 2; it neither pools nor
    detaches the teacher.

    Args:
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 1000.
        power: p, a whole number of at least 1. The CRD benchmark takes 2.

    Shapes:
        Maps (N, C_s, H_s, W_s) and (N, C_t, H_t, W_t), any channels; a scalar comes out, in float32
        or wider.

    Raises:
        SettingError: If a setting or a feature's shape is malformed.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", arXiv 1612.03928, as
    computed by mdistiller's ``AT.py``.
    """

    dimensions = (4,)

    def __init__(self, loss_weight: float = 1.0, power: int = 2) -> None:
        super().__init__(loss_weight)
        # Any other power of a negative value is no number, and maps before a ReLU have them.
        self.power = check_count("power", power)

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`attention_transfer`."""
        return attention_transfer(student, teacher, self.power)
