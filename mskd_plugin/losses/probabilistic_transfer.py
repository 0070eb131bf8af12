"""PKT: probabilistic knowledge transfer."""

from __future__ import annotations

import torch
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.losses.feature_loss import FeatureLoss

#: Added to norms and to probabilities, as published.
EPS = 1e-7


def neighbour_probabilities(vectors: Tensor) -> Tensor:
    """Return how likely each image picks each other by cosine similarity, (N, C) to (N, N)."""
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    directions = vectors / (norms + EPS)
    similarity = (directions @ directions.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of two batches' neighbour probabilities, averaged over all pairs.

    Args:
        student: (N, C_s).
        teacher: (N, C_t).
    """
    of_student, of_teacher = neighbour_probabilities(student), neighbour_probabilities(teacher)
    return (of_teacher * ((of_teacher + EPS) / (of_student + EPS)).log()).mean()


@MODELS.register_module()
class ProbabilisticTransferLoss(FeatureLoss):
    r"""Probabilistic knowledge transfer (PKT) of pooled features.

    .. math::
        L = \frac{\alpha}{N^2} \sum_{ij}
            S^t_{ij} \log \frac{S^t_{ij} + \epsilon}{S^s_{ij} + \epsilon}, \quad
        S_{ij} = \frac{c_{ij}}{\sum_k c_{ik}}, \quad
        c_{ij} = \frac{1}{2}
            \left(\frac{x_i^\top x_j}{(|x_i| + \epsilon)(|x_j| + \epsilon)} + 1\right)

    with :math:`\epsilon = 10^{-7}`. The mean is over all :math:`N^2` pairs, an image with itself
    included, where a divergence would sum over j: the weight makes up for it. Pairs are those of
    this process.

    Args:
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 30000.

    Shapes:
        Pooled features (N, C_s) and (N, C_t); a scalar comes out, in float32 or wider.

    Raises:
        SettingError: If the weight or a feature's shape is malformed.

    Source: N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge
    Transfer", arXiv 1803.10837, as computed by mdistiller's ``PKT.py``. That code also turns NaN
    into 0, which hides diverged features; NaN stays NaN here.
    """

    dimensions = (2,)

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`probabilistic_transfer`."""
        return probabilistic_transfer(student, teacher)
