"""The flow between two layers (FSP)."""

from __future__ import annotations

import torch
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_at_least_zero
from mskd_plugin.losses.feature_loss import at_least_float32, pool_to_smaller
from mskd_plugin.losses.maps import check_maps


def fsp_matrix(bottom: Tensor, top: Tensor) -> Tensor:
    r"""Return :math:`F_{nij} = \operatorname{mean}_p top_{nip}\, bottom_{njp}` over positions p.

    Args:
        bottom: Maps of the earlier layer, (N, C_b, H, W).
        top: Maps of the later layer, (N, C_t, H', W'). The larger of the two is average-pooled to
            the size of the smaller first.

    Returns:
        (N, C_t, C_b).
    """
    bottom, top = pool_to_smaller(bottom, top)
    positions = bottom.shape[2] * bottom.shape[3]
    return torch.bmm(top.flatten(2), bottom.flatten(2).transpose(1, 2)) / positions


def fsp_loss(
    student_bottom: Tensor, student_top: Tensor, teacher_bottom: Tensor, teacher_top: Tensor
) -> Tensor:
    """Return the mean squared difference of the student's and the teacher's FSP matrices."""
    maps = (student_bottom, student_top, teacher_bottom.detach(), teacher_top.detach())
    with torch.autocast(student_bottom.device.type, enabled=False):
        s_bottom, s_top, t_bottom, t_top = map(at_least_float32, maps)
        error = fsp_matrix(s_bottom, s_top) - fsp_matrix(t_bottom, t_top)
        return error.square().sum() / max(error.numel(), 1)


@MODELS.register_module()
class FSPLoss(nn.Module):
    r"""Match how the student's maps change from one stage to the next with the teacher's.

    .. math::
        L = w \operatorname{mean}_{nij} (F^s_{nij} - F^t_{nij})^2

    with the matrices of :func:`fsp_matrix`: averaged over images and channel pairs. One loss is one
    pair of consecutive stages; the method is their sum, the pair of stem and first stage included.

    Args:
        loss_weight: :math:`w`, at least 0. Default 1, what the CRD benchmark's code applies: it
            trains the first phase on the bare sum and leaves the term out of the second one,
            whatever weight its command line gives (50).

    Shapes:
        Maps (N, C, H, W); both networks' ``bottom`` have the same channels, and so have both
        ``top``. The maps' sizes are free. The result is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if the weight is malformed; when called, if an argument is no map
            or the channels of both networks differ.

    Source: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
    and Transfer Learning", CVPR 2017, as HobbitLong/RepDistiller computes it
    (``distiller_zoo/FSP.py``). The matrices come from one product here; there, every pair of
    channels is multiplied at every position and kept, 1 GiB for two maps of 64 channels, 32 x 32,
    batch 64.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(
        self,
        student_bottom: Tensor,
        student_top: Tensor,
        teacher_bottom: Tensor,
        teacher_top: Tensor,
    ) -> Tensor:
        """Return the weighted loss of one pair of stages."""
        check_maps(
            student_bottom=student_bottom,
            student_top=student_top,
            teacher_bottom=teacher_bottom,
            teacher_top=teacher_top,
        )
        for name, student, teacher in (
            ("bottom", student_bottom, teacher_bottom),
            ("top", student_top, teacher_top),
        ):
            if student.shape[1] != teacher.shape[1]:
                raise SettingError(
                    f"student_{name}",
                    f"maps with the teacher's {teacher.shape[1]} channels",
                    f"{student.shape[1]}",
                    "FSP has no connector.",
                )
        return self.loss_weight * fsp_loss(student_bottom, student_top, teacher_bottom, teacher_top)
