"""Distillation of logits (Hinton et al., arXiv 1503.02531), by MMRazor's ``KLDivergence``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.logits import FULL_PRECISION, compare_logits
from mskd_plugin.recipes.method import method


@method
def kd(
    base: dict, *, temperature: float = 4.0, loss_weight: float = 0.9, ce_weight: float = 0.1
) -> dict[str, Any]:
    r"""Pull the student's softened class probabilities to the teacher's.

    :math:`\tau^2` times the mean over images of :math:`KL(softmax(z_t / \tau) \| softmax(z_s /
    \tau))`.

    Args:
        base: Config of the pair.
        temperature: :math:`\tau`. The CRD benchmark takes 4 on CIFAR-100, mdistiller 1 on ImageNet.
        loss_weight: Weight of the term. The CRD benchmark takes 0.9.
        ce_weight: Weight of the student's cross-entropy where KD stands alone. The CRD benchmark
            takes 0.1. mdistiller takes 0.5 of each on ImageNet.
    """
    parts = compare_softened("loss_kd", temperature, loss_weight, FULL_PRECISION)
    return {**parts, "ce_weight": ce_weight}


def compare_softened(
    name: str, temperature: float, loss_weight: float, connector: dict[str, Any]
) -> dict[str, Any]:
    """Return the parts of a method with KD's loss between both networks' logits.

    Args:
        name: Name of the loss, ``loss_<method>``.
        temperature: As of :func:`kd`.
        loss_weight: As of :func:`kd`.
        connector: See :func:`mskd_plugin.recipes.logits.compare_logits`.
    """
    loss = {
        "type": "KLDivergence",
        "tau": temperature,
        "reduction": "batchmean",
        "loss_weight": loss_weight,
    }
    return compare_logits(name, loss, student="preds_S", teacher="preds_T", connector=connector)
