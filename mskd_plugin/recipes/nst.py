"""Neuron selectivity transfer (Huang and Wang, arXiv 1707.01219)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_stages, stage_pairs


@method
def nst(
    base: dict, *, stages: Sequence[int] | None = None, loss_weight: float = 50.0
) -> dict[str, Any]:
    """Match the distributions of both networks' channels over positions.

    Args:
        base: Config with the ``pair``.
        stages: Stages, counted from the last one of each network, -1. Default: all.
        loss_weight: Weight of each stage's term. The CRD benchmark takes 50.

    Raises:
        SettingError: If a stage does not exist in both networks.
    """
    loss = {"type": "NeuronSelectivityLoss", "loss_weight": loss_weight}
    return compare_stages(stage_pairs(base, stages), "nst", loss)
