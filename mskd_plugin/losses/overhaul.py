"""Overhaul of feature distillation (OFD)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_at_least_zero
from mskd_plugin.losses.feature_loss import at_least_float32
from mskd_plugin.losses.maps import check_channels, check_maps

#: Below this share of negative values, the margin is three deviations under zero.
RARELY_NEGATIVE = 0.001


def negative_mean(norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    r"""Return the margin of each channel: the mean of its negative pre-activations.

    The normalisation layer gives values from :math:`N(\mu, s^2)`, :math:`\mu` its bias and
    :math:`s` the absolute value of its weight; their mean below zero is :math:`\mu - s
    \phi(\mu/s) / \Phi(-\mu/s)`. Where less than 0.1 % of the values are negative it is :math:`-3s`.

    Args:
        norm_weight: Weight of the teacher's last normalisation before the ReLU, (C,).
        norm_bias: Its bias, (C,).

    Returns:
        (C,), at most 0, in the parameters' precision, at least float32. A weight of 0 makes the
        channel constant, and the margin min(bias, 0), the limit.
    """
    deviation, mean = norm_weight.detach().double().abs(), norm_bias.detach().double()
    score = mean / deviation
    share = torch.special.ndtr(-score)
    density = torch.exp(-score.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(
        share > RARELY_NEGATIVE, mean - deviation * density / share, -3 * deviation
    )
    margin = torch.where(deviation > 0, margin, mean.clamp(max=0))
    return margin.to(at_least_float32(norm_bias).dtype)


def overhaul_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Return the partial squared distance, summed over channels and positions, averaged over the
    images.

    With t the teacher's value and m its margin, both at most 0 where they matter, the student's
    value s costs (s - max(t, m))^2, but nothing where t <= 0 and s is already below that.

    Args:
        student: Pre-activations in the teacher's channels, (N, C, H, W).
        teacher: The teacher's pre-activations, (N, C, H', W'), pooled to the student's size.
        margin: (C,), at most 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = at_least_float32(student)
        teacher = at_least_float32(teacher.detach())
        height, width = student.shape[2:]
        if teacher.shape[2:] != (height, width):
            teacher = F.adaptive_avg_pool2d(teacher, (height, width))
        target = torch.maximum(teacher, margin.view(1, -1, 1, 1))
        counts = (teacher > 0) | (student > target)
        distance = torch.where(counts, (student - target).square(), 0)
        return distance.sum() / max(student.shape[0], 1)


@MODELS.register_module()
class OverhaulLoss(nn.Module):
    r"""Match the student's pre-activations to the teacher's, but not how far below zero they are.

    .. math::
        L = \frac{w}{N} \sum_{nchw} \begin{cases}
            (s - m)^2 & s > m, t \le m \\
            (s - t)^2 & s > t, m < t \le 0 \\
            (s - t)^2 & t > 0 \\
            0 & \text{else} \end{cases}

    summed over channels and positions, averaged over images, with the margin :math:`m` of
    :func:`negative_mean` per channel. One loss is one stage; of n stages the i-th from 0 weighs
    :math:`1/2^{n-1-i}` times the method's weight.

    Args:
        loss_weight: :math:`w`, at least 0. mdistiller takes 1e-3 on CIFAR-100 and 1e-4 for
            ResNet-50 to MobileNetV1 on ImageNet, times the stage's weight.

    Shapes:
        ``student_feature`` (N, C, H, W), already in the teacher's channels; ``teacher_feature`` (N,
        C, H', W'), pooled to the student's size; ``norm_weight`` and ``norm_bias`` (C,). The result
        is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if the weight is malformed; when called, if the shapes do not fit.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv
    1904.01866, as megvii-research/mdistiller computes it (``distillers/OFD.py``). Not carried over
    from there: margins counted from the first stage while the maps are counted from the last one,
    which fails for networks of unlike depth; a teacher in train mode. MMRazor's ``OFDLoss`` with
    ``mul_factor=1`` behind its ``OFDTeacherConnector`` gives the same value for maps of one size.
    It has no pooling, and its margin is set only by an algorithm of its own, outside the state
    dict; here the margin is read from the teacher at each step.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(
        self,
        student_feature: Tensor,
        teacher_feature: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
    ) -> Tensor:
        """Return the weighted loss of one stage."""
        check_maps(student_feature=student_feature, teacher_feature=teacher_feature)
        channels = teacher_feature.shape[1]
        check_channels("student_feature", student_feature, channels, "the teacher's")
        for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if parameter.shape != (channels,):
                raise SettingError(
                    name,
                    f"a parameter of the normalisation before the teacher's map, ({channels},)",
                    f"shape {tuple(parameter.shape)}",
                )
        margin = negative_mean(norm_weight, norm_bias)
        return self.loss_weight * overhaul_loss(student_feature, teacher_feature, margin)
