"""Relational distillation (Park et al., arXiv 1904.05068)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_pooled


@method
def rkd(
    base: dict,
    *,
    loss_weight: float = 1.0,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> dict[str, Any]:
    """Pull distances and angles between the batch's pooled features to the teacher's.

    Args:
        base: Config with the ``pair``; unused, all classifiers name their last layer alike.
        loss_weight: Weight of both terms together.
        distance_weight: Weight of the distances. The CRD benchmark takes 25.
        angle_weight: Weight of the angles. The CRD benchmark takes 50.
    """
    loss = {
        "type": "RelationalLoss",
        "loss_weight": loss_weight,
        "distance_weight": distance_weight,
        "angle_weight": angle_weight,
    }
    return compare_pooled("loss_rkd", loss)
