"""Probabilistic knowledge transfer (Passalis and Tefas, arXiv 1803.10837)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_pooled


@method
def pkt(base: dict, *, loss_weight: float = 30000.0) -> dict[str, Any]:
    """Pull the probabilities of the batch's images to be neighbours to the teacher's.

    Args:
        base: Config with the ``pair``; unused, all classifiers name their last layer alike.
        loss_weight: Weight of the term. The CRD benchmark takes 30000.
    """
    loss = {"type": "ProbabilisticTransferLoss", "loss_weight": loss_weight}
    return compare_pooled("loss_pkt", loss)
