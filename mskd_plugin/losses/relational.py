"""RKD: relational distillation."""

from __future__ import annotations

import torch
from mmrazor.registry import MODELS
from torch import Tensor
from torch.nn import functional

from mskd_plugin.errors import check_at_least_zero
from mskd_plugin.losses.feature_loss import FeatureLoss


def differences(vectors: Tensor) -> Tensor:
    """Return (N, N, C) from (N, C): entry [i, j] leads from i to j."""
    return vectors[None, :] - vectors[:, None]


def relative_distances(difference: Tensor) -> Tensor:
    """Return the distances between N vectors in units of their mean, (N, N, C) to (N, N).

    The mean is over all pairs of two vectors. Distances are of at least 1e-6, the diagonal is 0.
    """
    others = ~torch.eye(len(difference), dtype=torch.bool, device=difference.device)
    distance = difference.square().sum(-1).clamp(min=1e-12).sqrt() * others
    return distance / (distance.sum() / others.sum())


def angles(difference: Tensor) -> Tensor:
    """Return the cosines of the angles at each vector between two others, (N, N, C) to (N, N, N).

    Entry [i, j, k] is the angle at i between j and k, 0 where j or k is i.
    """
    direction = functional.normalize(difference, dim=-1)
    return torch.bmm(direction, direction.transpose(1, 2))


def relational_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance-wise and the angle-wise term of two batches.

    Both are smooth L1 distances, averaged over all N^2 and N^3 entries.

    Args:
        student: (N, C_s).
        teacher: (N, C_t).
    """
    if len(student) < 2:  # no distance to take the mean of
        return 0 * student.sum(), 0 * student.sum()
    of_student, of_teacher = differences(student), differences(teacher)
    distance = functional.smooth_l1_loss(
        relative_distances(of_student), relative_distances(of_teacher)
    )
    return distance, functional.smooth_l1_loss(angles(of_student), angles(of_teacher))


@MODELS.register_module()
class RelationalLoss(FeatureLoss):
    r"""Relational distillation (RKD) of pooled features, by distances and by angles.

    .. math::
        L = \alpha [w_d \operatorname{mean}_{ij} h(D^s_{ij} - D^t_{ij})
            + w_a \operatorname{mean}_{ijk} h(A^s_{ijk} - A^t_{ijk})]

    with h the smooth L1 function (quadratic below 1), :math:`D_{ij} = \max(|x_i - x_j|, 10^{-6})`
    divided by its mean over :math:`i \neq j`, and :math:`A_{ijk}` the cosine of the angle at
    :math:`x_i` between :math:`x_j` and :math:`x_k`. Both means are over all entries, the zeros of
    the diagonals included. Features are not normalised. Relations are those of this process. A
    batch of one image has none; its loss is zero.

    MMRazor's ``DistanceWiseRKD`` and ``AngleWiseRKD`` compute the same numbers with
    ``with_l2_norm=False``, but give NaN for one image; and under autocast the distances, as
    differences of large products in bfloat16, are off by tens of percent. Here distances come from
    the differences themselves, in float32.

    Args:
        loss_weight: :math:`\alpha`, at least 0.
        distance_weight: :math:`w_d`, at least 0. The CRD benchmark takes 25.
        angle_weight: :math:`w_a`, at least 0. The CRD benchmark takes 50.

    Shapes:
        Pooled features (N, C_s) and (N, C_t); a scalar comes out, in float32 or wider. N^2 C and
        N^3 numbers are held.

    Attributes:
        terms: The last call's unweighted terms, ``distance`` and ``angle``, detached, for logs.

    Raises:
        SettingError: If a weight or a feature's shape is malformed.

    Source: W. Park et al., "Relational Knowledge Distillation", arXiv 1904.05068, as computed by
    mdistiller's ``RKD.py``.
    """

    dimensions = (2,)

    def __init__(
        self, loss_weight: float = 1.0, distance_weight: float = 25.0, angle_weight: float = 50.0
    ) -> None:
        super().__init__(loss_weight)
        self.distance_weight = check_at_least_zero("distance_weight", distance_weight)
        self.angle_weight = check_at_least_zero("angle_weight", angle_weight)
        self.terms: dict[str, Tensor] = {}

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the weighted sum of :func:`relational_terms`."""
        distance, angle = relational_terms(student, teacher)
        self.terms = {"distance": distance.detach(), "angle": angle.detach()}
        return self.distance_weight * distance + self.angle_weight * angle
