"""NST: neuron selectivity transfer."""

from __future__ import annotations

import torch
from mmrazor.registry import MODELS
from torch import Tensor
from torch.nn import functional

from mskd_plugin.losses.feature_loss import FeatureLoss, pool_to_smaller


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy between the channels of two maps.

    Args:
        student: (N, C_s, H_s, W_s).
        teacher: (N, C_t, H_t, W_t).
    """
    student, teacher = (
        functional.normalize(feature.flatten(2), dim=2)  # (N, C, H W)
        for feature in pool_to_smaller(student, teacher)
    )

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b.transpose(1, 2)).square().mean()

    return (
        mean_kernel(teacher, teacher)
        + mean_kernel(student, student)
        - 2 * mean_kernel(student, teacher)
    )


@MODELS.register_module()
class NeuronSelectivityLoss(FeatureLoss):
    r"""Neuron selectivity transfer (NST) of one stage.

    .. math::
        L = \alpha [\operatorname{mean} k(t_c, t_{c'}) + \operatorname{mean} k(s_c, s_{c'})
            - 2 \operatorname{mean} k(s_c, t_{c'})], \quad k(a, b) = (a^\top b)^2

    where :math:`s_c` and :math:`t_c` are channels of an image's map, flattened and of unit length.
    The means are over images and pairs of channels of the same image; several stages are several
    losses, whose sum is the method. Where the maps differ in size the larger one is first averaged
    down to the smaller. The first term has no gradient.

    The kernels are matrix products; mdistiller's version holds (N, C, C, H W) products at once.

    Args:
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 50.

    Shapes:
        Maps (N, C_s, H_s, W_s) and (N, C_t, H_t, W_t), any channels; a scalar comes out, in float32
        or wider.

    Raises:
        SettingError: If the weight or a feature's shape is malformed.

    Source: Z. Huang, N. Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
    Transfer", arXiv 1707.01219, as computed by mdistiller's ``NST.py`` (polynomial kernel, d = 2,
    c = 0).
    """

    dimensions = (4,)

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute :func:`neuron_selectivity`."""
        return neuron_selectivity(student, teacher)
