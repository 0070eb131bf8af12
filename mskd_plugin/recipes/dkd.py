"""Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.logits import compare_logits, warmed_up
from mskd_plugin.recipes.method import method


@method
def dkd(
    base: dict,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    loss_weight: float = 1.0,
    warmup: float = 20,
) -> dict[str, Any]:
    r"""Compare the target's probability, and the distribution over the other classes, apart.

    Args:
        base: Config of the pair.
        temperature: :math:`\tau`: 4 on CIFAR-100, 1 on ImageNet.
        alpha: Weight of the target's term.
        beta: Weight of the other classes' term: on CIFAR-100 2, 6 or 8 by pair, on ImageNet 0.5
            (ResNet-34 to ResNet-18) or 2 (ResNet-50 to MobileNetV1).
        loss_weight: Weight of the method.
        warmup: Epochs over which the loss grows to its weight: 20 on CIFAR-100, 1 on ImageNet. 0
            leaves it out.
    """
    loss = {
        "type": "DecoupledKDLoss",
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "loss_weight": loss_weight,
    }
    return warmed_up(compare_logits("loss_dkd", loss, labels="labels"), warmup)
