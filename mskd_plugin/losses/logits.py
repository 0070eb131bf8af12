"""What the losses between two networks' logits share.

Shapes: N batch, C classes. Every function takes logits in any precision and computes in float32, or
in float64 when given; callers switch autocast off around them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mskd_plugin.errors import SettingError
from mskd_plugin.functional.categorization import check_labels
from mskd_plugin.losses.feature_loss import at_least_float32, shape_or_type


def prepare_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Check the inputs of a loss, cut the teacher off the graph and leave half precision.

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C).
        labels: (N,) class indices, for losses that read them.

    Returns:
        Both logits, the teacher's detached.

    Raises:
        SettingError: If the logits are no (N, C) of equal shapes with at least two classes, or the
            labels are not their class indices.
    """
    if (
        not isinstance(student_logits, Tensor)
        or student_logits.dim() != 2
        or student_logits.shape[1] < 2
    ):
        raise SettingError(
            "student_logits",
            "a tensor (N, C) with at least two classes",
            shape_or_type(student_logits),
        )
    if not isinstance(teacher_logits, Tensor) or teacher_logits.shape != student_logits.shape:
        raise SettingError(
            "teacher_logits",
            f"of the student's shape (N, C) = {tuple(student_logits.shape)}",
            shape_or_type(teacher_logits),
            "Both networks must have the same classes.",
        )
    if labels is not None:
        check_labels(labels, student_logits.shape[0])
    return at_least_float32(student_logits), at_least_float32(teacher_logits.detach())


def kl_of_samples(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return the sum over classes of KL(teacher || student) of each sample, from
    log-probabilities.
    """
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(
        dim=1
    )


def kd_of_samples(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""Return :math:`\tau^2 KL(softmax(z_t / \tau) \| softmax(z_s / \tau))` of each sample:
    (N,).
    """
    divergence = kl_of_samples(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
    )
    return temperature**2 * divergence


def without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits of the classes that are not the label's, in order: (N, C - 1)."""
    # By index: a mask would make the host wait for the device to count what it keeps.
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, others + (others >= labels[:, None]))


def mean_of_samples(losses: Tensor) -> Tensor:
    """Return the mean of (N,) losses; no sample gives a zero that keeps the graph."""
    return losses.sum() / max(len(losses), 1)
