"""Decoupled knowledge distillation (DKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import check_above_zero, check_at_least_zero
from mskd_plugin.losses.logits import (
    kl_of_samples,
    mean_of_samples,
    prepare_logits,
    without_target,
)


def dkd_of_samples(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    r"""Return :math:`\tau^2 (\alpha TCKD + \beta NCKD)` of each sample: (N,).

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).
        labels: (N,) class indices.
        temperature: :math:`\tau`.
        alpha: Weight of the target class's term.
        beta: Weight of the other classes' term.
    """
    of_target, of_others = [], []
    for logits in (student_logits, teacher_logits):
        target = logits.gather(1, labels[:, None])
        others = without_target(logits, labels) / temperature
        # The two-way distribution from the two log-sums: its logarithm cannot underflow.
        two_way = torch.cat([target / temperature, others.logsumexp(dim=1, keepdim=True)], dim=1)
        of_target.append(F.log_softmax(two_way, dim=1))
        of_others.append(F.log_softmax(others, dim=1))
    terms = alpha * kl_of_samples(*of_target) + beta * kl_of_samples(*of_others)
    return temperature**2 * terms


@MODELS.register_module()
class DecoupledKDLoss(nn.Module):
    r"""DKD (Zhao et al., CVPR 2022, arXiv 2203.08679).

    .. math::
        L = w \tau^2 \frac{1}{N} \sum_n
            [\alpha KL(b^t_n \| b^s_n) + \beta KL(\hat p^t_n \| \hat p^s_n)]

    with :math:`b` the two probabilities (target class, all others) at temperature :math:`\tau` and
    :math:`\hat p` the softmax over the other classes alone. Summed over classes, averaged over
    samples.

    Args:
        temperature: :math:`\tau`, above 0. The CIFAR-100 benchmark takes 4, ImageNet 1.
        alpha: Weight of the target's term; 1 everywhere.
        beta: Weight of the other classes' term. On CIFAR-100 8 for ResNet32x4 teachers, ResNet50 to
            MobileNetV2 and WRN-40-2 to ShuffleNetV1, 6 for VGG13 teachers and WRN-40-2's other
            pairs, 2 for ResNet56 and ResNet110 teachers. ImageNet: 0.5 or 2.
        loss_weight: :math:`w`. Published runs let it grow over the first epochs
            (:class:`mskd_plugin.hooks.LossWarmupHook`): 20 on CIFAR-100, 1 on ImageNet.

    Shapes:
        Logits (N, C), labels (N,). The result is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if a setting is out of range; when called, if shapes do not fit
            together or the labels are no class indices (mixup and cutmix give none).

    Defaults from: megvii-research/mdistiller, ``engine/cfg.py``.

    Not carried over: the published code, and MMRazor's ``DKDLoss``, take the logarithm of a summed
    softmax, which is infinite where that underflows; MMRazor's, with any ``reduction`` but
    ``"batchmean"``, ``"mean"`` of its shipped config included, sums over the batch.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> DecoupledKDLoss()(logits, logits, torch.tensor([0])).item()
        0.0
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = check_above_zero("temperature", temperature)
        self.alpha = check_at_least_zero("alpha", alpha)
        self.beta = check_at_least_zero("beta", beta)
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss."""
        student, teacher = prepare_logits(student_logits, teacher_logits, labels)
        with torch.autocast(student.device.type, enabled=False):
            losses = dkd_of_samples(
                student, teacher, labels, self.temperature, self.alpha, self.beta
            )
            return self.loss_weight * mean_of_samples(losses)
