"""Multi-level logit distillation (MLKD), on one view of each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_above_zero, check_at_least_zero
from mskd_plugin.losses.logits import kd_of_samples, mean_of_samples, prepare_logits


def low_confidence_share(confidence: Tensor) -> Tensor:
    """Return the share of values up to the median: about a half, more where values tie."""
    return (confidence <= confidence.quantile(0.5)).to(confidence.dtype).mean()


def gram_difference(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    r"""Return :math:`\|P_t P_t^\top - P_s P_s^\top\|_F^2` over the number of rows of P."""
    difference = teacher_probs @ teacher_probs.T - student_probs @ student_probs.T
    return difference.square().sum() / len(student_probs)


@MODELS.register_module()
class MultiLevelKDLoss(nn.Module):
    r"""MLKD (Jin et al., CVPR 2023), in the form that its published code has on one view.

    .. math::
        L = w \sum_{\tau} [(m + 1) KD_\tau + m_C \|P_t^\top P_t - P_s^\top P_s\|_F^2 / C
            + m \|P_t P_t^\top - P_s P_s^\top\|_F^2 / N]

    with :math:`P` the (N, C) probabilities at temperature :math:`\tau`, :math:`KD_\tau` the KD term
    (mean over samples, times :math:`\tau^2`), :math:`m` the share of samples whose teacher is no
    more confident than the median sample, and :math:`m_C` that share of classes, by their summed
    probability. Squares are summed.

    The published code takes a weakly and a strongly augmented view of each image. It multiplies
    terms that are averages already by its confidence masks, which makes a factor of each mask, the
    m here; it drops the Gram terms of the strong view and uses the weak view in place of the strong
    one at two temperatures. This is its value where both views are the same image, which is what a
    training with one view has; the strong view's KD is the 1 in m + 1. The published accuracies
    were reached with both views, for many pairs in 480 epochs or more.

    Args:
        temperatures: The :math:`\tau`, each above 0.
        loss_weight: :math:`w`. The code takes 0.9, beside a cross-entropy of weight 0.1 on each
            view.

    Shapes:
        Logits (N, C). The result is a scalar, in float32 or wider.

    Attributes:
        terms: The last call's unweighted ``instance``, ``class`` and ``batch`` terms, summed over
            temperatures, detached, for logs.

    Raises:
        SettingError: When built, if a setting is out of range; when called, if shapes do not fit
            together.

    Defaults from: Jin-Ying/Multi-Level-Logit-Distillation, ``distillers/KD_ours.py``,
    ``engine/cfg.py``.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> MultiLevelKDLoss()(logits, logits).item()
        0.0
    """

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
        loss_weight: float = 0.9,
    ) -> None:
        super().__init__()
        if not isinstance(temperatures, (list, tuple)) or not temperatures:
            raise SettingError("temperatures", "a list of at least one number", repr(temperatures))
        self.temperatures = tuple(check_above_zero("temperatures", t) for t in temperatures)
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.terms: dict[str, Tensor] = {}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the weighted loss."""
        student, teacher = prepare_logits(student_logits, teacher_logits)
        if not len(student):
            return 0 * student.sum()
        with torch.autocast(student.device.type, enabled=False):
            probs = F.softmax(teacher, dim=1)
            of_samples = low_confidence_share(probs.amax(dim=1))
            of_classes = low_confidence_share(probs.sum(dim=0))
            instance = by_class = by_batch = student.new_zeros(())
            for temperature in self.temperatures:
                p_s = F.softmax(student / temperature, dim=1)
                p_t = F.softmax(teacher / temperature, dim=1)
                kd = mean_of_samples(kd_of_samples(student, teacher, temperature))
                instance = instance + (of_samples + 1) * kd
                by_class = by_class + of_classes * gram_difference(p_s.T, p_t.T)
                by_batch = by_batch + of_samples * gram_difference(p_s, p_t)
            terms = {"instance": instance, "class": by_class, "batch": by_batch}
            self.terms = {name: term.detach() for name, term in terms.items()}
            return self.loss_weight * (instance + by_class + by_batch)
