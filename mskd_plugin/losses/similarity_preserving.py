"""SP: similarity-preserving distillation."""

from __future__ import annotations

from mmrazor.registry import MODELS
from torch import Tensor
from torch.nn import functional

from mskd_plugin.losses.feature_loss import FeatureLoss


def similarities(feature: Tensor) -> Tensor:
    """Return the inner products of a batch's features, (N, ...) to (N, N), rows of unit length."""
    flat = feature.flatten(1)
    return functional.normalize(flat @ flat.T, dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two batches' similarity matrices.

    Args:
        student: (N, ...).
        teacher: (N, ...), of any other width and size.
    """
    return (similarities(teacher) - similarities(student)).square().mean()


@MODELS.register_module()
class SimilarityPreservingLoss(FeatureLoss):
    r"""Similarity-preserving distillation (SP) of one stage.

    .. math::
        L = \frac{\alpha}{N^2} \sum_{ij} (G^t_{ij} - G^s_{ij})^2, \quad
        G_i = \frac{(F F^\top)_i}{\lVert (F F^\top)_i \rVert_2}

    with F the features of the batch, flattened to one row an image. The mean is over all pairs of
    images, an image with itself included. Pairs are those of this process.

    Args:
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 3000, at the last stage.

    Shapes:
        Features (N, ...) of any two widths and sizes; a scalar comes out, in float32 or wider.

    Raises:
        SettingError: If the weight or a feature's shape is malformed.

    Source: F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682, as
    computed by mdistiller's ``SP.py``.
    """

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`similarity_preserving`."""
        return similarity_preserving(student, teacher)
