"""Multi-level logit distillation (Jin et al., CVPR 2023), on one view of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.recipes.logits import compare_logits
from mskd_plugin.recipes.method import method


@method
def mlkd(
    base: dict,
    *,
    temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
    loss_weight: float = 0.9,
    ce_weight: float = 0.2,
) -> dict[str, Any]:
    """Compare class probabilities, and their inner products over the batch and over the classes, at
    several temperatures.

    Args:
        base: Config of the pair.
        temperatures: The published code takes 3, 5, 2 and 6 beside the temperature of KD, which is
            4 on CIFAR-100 and 1 on ImageNet.
        loss_weight: Weight of the method: 0.9 on CIFAR-100, 0.5 on ImageNet. See
            :class:`mskd_plugin.losses.MultiLevelKDLoss` for what becomes of its second view here.
        ce_weight: Weight of the student's cross-entropy where the method stands alone. The
            published code takes 0.1 on each of its two views, on ImageNet 0.5.
    """
    loss = {
        "type": "MultiLevelKDLoss",
        "temperatures": tuple(temperatures),
        "loss_weight": loss_weight,
    }
    return {**compare_logits("loss_mlkd", loss), "ce_weight": ce_weight}
