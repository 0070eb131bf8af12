"""CC: correlation congruence, as the CRD benchmark runs it."""

from __future__ import annotations

from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.errors import SettingError
from mskd_plugin.losses.feature_loss import FeatureLoss


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over neighbouring images of the inner product of their differences.

    Args:
        student: Embeddings (N, D).
        teacher: Embeddings (N, D).
    """
    difference = (student - teacher).abs()
    if len(difference) < 2:  # no neighbours: zero, yet a function of both embeddings
        return 0 * difference.sum()
    return (difference[:-1] * difference[1:]).sum(1).mean()


@MODELS.register_module()
class CorrelationCongruenceLoss(FeatureLoss):
    r"""Correlation congruence (CC) of two embeddings.

    .. math::
        L = \frac{\alpha}{N - 1} \sum_{n=1}^{N-1} \sum_j d_{nj} d_{n+1,j}, \quad
        d_n = |e^s_n - e^t_n|

    summed over the D features and averaged over the N - 1 pairs of neighbours in the batch. The
    embeddings are learned linear maps of both networks' pooled features, not normalised, so this is
    the one loss here, beside CRD, that lets a gradient pass to the teacher's side: to the
    teacher's linear map, and no further, since the teacher itself runs without one. A batch of one
    image has no neighbours; its loss is zero.

    This is the term that the CRD benchmark's numbers stand for, not the kernel expansion of the
    paper.

    Args:
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 0.02, with D = 128.

    Shapes:
        Embeddings (N, D) and (N, D); a scalar comes out, in float32 or wider.

    Raises:
        SettingError: If the weight is malformed, or the embeddings differ in shape.

    Source: B. Peng et al., "Correlation Congruence for Knowledge Distillation", arXiv 1904.01802,
    as computed by RepDistiller's ``CC.py``.
    """

    dimensions = (2,)
    detaches_teacher = False

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`correlation_congruence`."""
        if student.shape != teacher.shape:
            raise SettingError(
                "teacher_feature",
                f"an embedding of the student's shape {tuple(student.shape)}",
                f"shape {tuple(teacher.shape)}",
            )
        return correlation_congruence(student, teacher)
