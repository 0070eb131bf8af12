"""The loss of one-for-all distillation (OFA-KD), of one branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import check_above_zero, check_at_least_zero
from mskd_plugin.functional.categorization import check_labels
from mskd_plugin.losses.logits import mean_of_samples, prepare_logits


def ofa_of_samples(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    exponent: float,
) -> Tensor:
    r"""Return :math:`-\sum_c [(p^t_c + 1_{c=y})^\epsilon - 1_{c=y}] \log p^s_c` of each sample:
    (N,).

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).
        labels: (N,) class indices.
        temperature: Of both softmaxes.
        exponent: :math:`\epsilon`.
    """
    target = F.one_hot(labels, student_logits.shape[1]).to(teacher_logits.dtype)
    enhanced = (F.softmax(teacher_logits / temperature, dim=1) + target) ** exponent - target
    return -(enhanced * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1)


@MODELS.register_module()
class OFALoss(nn.Module):
    r"""OFA-KD (Hao et al., NeurIPS 2023, arXiv 2310.19444) between the teacher's logits and one
    branch of the student.

    .. math::
        L = w \frac{1}{N} \sum_n \sum_c -[(p^t_{nc} + 1_{c=y_n})^\epsilon - 1_{c=y_n}] \log p^s_{nc}

    with :math:`p` the softmax at temperature :math:`\tau`. Summed over classes, averaged over
    samples, not multiplied by :math:`\tau^2`. The method sums it over the student's stages, each
    behind an :class:`mskd_plugin.connectors.OFABranch`, and the student's own logits.

    Args:
        exponent: :math:`\epsilon`, above 0; more than 1 lifts the target class. 1 is cross-entropy
            with the teacher.
        temperature: :math:`\tau`, above 0.
        loss_weight: :math:`w`.

    Shapes:
        Logits (N, C); labels (N,) class indices, or (N, C) scores, as mixup, cutmix and label
        smoothing give them, whose largest counts as the target. The result is a scalar, in float32
        or wider.

    Raises:
        SettingError: When built, if a setting is out of range; when called, if shapes do not fit
            together.

    Defaults from: Hao840/OFAKD, ``train.py``; :math:`\epsilon` is 1 to 1.5 by pair.

    Not carried over: the published code takes the logarithm of a softmax, which underflows.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(OFALoss()(logits, logits, torch.tensor([0])).item(), 4)  # log(2)
        0.6931
    """

    def __init__(
        self, exponent: float = 1.0, temperature: float = 1.0, loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.exponent = check_above_zero("exponent", exponent)
        self.temperature = check_above_zero("temperature", temperature)
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss."""
        student, teacher = prepare_logits(student_logits, teacher_logits)
        if labels.shape == student.shape and labels.is_floating_point():
            labels = labels.argmax(dim=1)
        check_labels(labels, len(student))
        with torch.autocast(student.device.type, enabled=False):
            losses = ofa_of_samples(student, teacher, labels, self.temperature, self.exponent)
            return self.loss_weight * mean_of_samples(losses)
