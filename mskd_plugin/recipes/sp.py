"""Similarity-preserving distillation (Tung and Mori, arXiv 1907.09682)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_stages, stage_pairs


@method
def sp(base: dict, *, stages: Sequence[int] = (-1,), loss_weight: float = 3000.0) -> dict[str, Any]:
    """Pull the similarities of the batch's images in the student to those in the teacher.

    Args:
        base: Config with the ``pair``.
        stages: Stages, counted from the last one of each network, -1. The CRD benchmark takes the
            last one.
        loss_weight: Weight of each stage's term. The CRD benchmark takes 3000.

    Raises:
        SettingError: If a stage does not exist in both networks.
    """
    loss = {"type": "SimilarityPreservingLoss", "loss_weight": loss_weight}
    return compare_stages(stage_pairs(base, stages), "sp", loss)
