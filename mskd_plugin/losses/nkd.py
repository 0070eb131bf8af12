"""Normalized knowledge distillation (NKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import check_above_zero, check_at_least_zero
from mskd_plugin.losses.logits import (
    mean_of_samples,
    prepare_logits,
    without_target,
)


def nkd_of_samples(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    gamma: float,
) -> Tensor:
    r"""Return :math:`-p^t_y \log p^s_y - \gamma \tau^2 \sum_c \hat p^t_c \log \hat p^s_c` of each
    sample: (N,).

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).
        labels: (N,) class indices.
        temperature: :math:`\tau`, of the second term alone.
        gamma: Weight of the other classes' term.
    """
    target = labels[:, None]
    of_student = F.log_softmax(student_logits, dim=1).gather(1, target)
    of_teacher = F.softmax(teacher_logits, dim=1).gather(1, target)
    others_of_student = F.log_softmax(without_target(student_logits, labels) / temperature, dim=1)
    others_of_teacher = F.softmax(without_target(teacher_logits, labels) / temperature, dim=1)
    of_others = (others_of_teacher * others_of_student).sum(dim=1)
    return -(of_teacher * of_student).squeeze(1) - gamma * temperature**2 * of_others


@MODELS.register_module()
class NormalizedKDLoss(nn.Module):
    r"""NKD (Yang et al., ICCV 2023, arXiv 2303.13005).

    .. math::
        L = w \frac{1}{N} \sum_n [-p^t_{ny} \log p^s_{ny}
            - \gamma \tau^2 \sum_{c \ne y} \hat p^t_{nc} \log \hat p^s_{nc}]

    with :math:`p` the softmax at temperature 1 and :math:`\hat p` the softmax over the classes
    other than the label :math:`y` at temperature :math:`\tau`. Summed over classes, averaged over
    samples. Both terms are cross-entropies: equal networks do not give 0.

    Args:
        temperature: :math:`\tau` of the second term, above 0.
        gamma: :math:`\gamma`, at least 0.
        loss_weight: :math:`w`.

    Shapes:
        Logits (N, C), labels (N,). The result is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if a setting is out of range; when called, if shapes do not fit
            together or the labels are no class indices.

    Defaults from: yzd-v/cls_KD, its configuration for CIFAR-100.

    Example:
        >>> logits = torch.zeros(1, 3)
        >>> nkd = NormalizedKDLoss(temperature=1.0, gamma=1.5)
        >>> loss = nkd(logits, logits, torch.tensor([0]))
        >>> round(loss.item(), 4)  # log(3)/3 + 1.5 log(2)
        1.4059
    """

    def __init__(
        self, temperature: float = 3.0, gamma: float = 3.5, loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature = check_above_zero("temperature", temperature)
        self.gamma = check_at_least_zero("gamma", gamma)
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss."""
        student, teacher = prepare_logits(student_logits, teacher_logits, labels)
        with torch.autocast(student.device.type, enabled=False):
            losses = nkd_of_samples(student, teacher, labels, self.temperature, self.gamma)
            return self.loss_weight * mean_of_samples(losses)
