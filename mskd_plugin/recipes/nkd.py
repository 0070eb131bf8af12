"""Normalized knowledge distillation (Yang et al., arXiv 2303.13005)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.logits import compare_logits, warmed_up
from mskd_plugin.recipes.method import method


@method
def nkd(
    base: dict,
    *,
    temperature: float = 3.0,
    gamma: float = 3.5,
    loss_weight: float = 1.0,
    warmup: float = 0,
) -> dict[str, Any]:
    """Weigh the target's cross-entropy by the teacher, and compare the other classes apart.

    Args:
        base: Config of the pair.
        temperature: Of the other classes' distributions. The published code takes 3 on CIFAR-100
            and 1 on ImageNet.
        gamma: Weight of the other classes' term: 3.5 on CIFAR-100, 1.5 on ImageNet.
        loss_weight: Weight of the method.
        warmup: Epochs over which the loss grows to its weight. The published code has no warm-up.
    """
    loss = {
        "type": "NormalizedKDLoss",
        "temperature": temperature,
        "gamma": gamma,
        "loss_weight": loss_weight,
    }
    return warmed_up(compare_logits("loss_nkd", loss, labels="labels"), warmup)
