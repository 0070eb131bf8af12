"""Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_stages, stage_pairs


@method
def at(
    base: dict,
    *,
    stages: Sequence[int] | None = None,
    loss_weight: float = 1000.0,
    power: int = 2,
) -> dict[str, Any]:
    """Pull where the student's maps are active to where the teacher's are.

    Args:
        base: Config with the ``pair``.
        stages: Stages, counted from the last one of each network, -1. Default: all.
        loss_weight: Weight of each stage's term. The CRD benchmark takes 1000.
        power: Exponent of the values. The CRD benchmark takes 2.

    Raises:
        SettingError: If a stage does not exist in both networks.
    """
    loss = {"type": "AttentionTransferLoss", "loss_weight": loss_weight, "power": power}
    return compare_stages(stage_pairs(base, stages), "at", loss)
