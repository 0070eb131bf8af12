"""Correlation congruence (Peng et al., arXiv 1904.01802)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_pooled, linear_connectors


@method
def cc(base: dict, *, loss_weight: float = 0.02, embedding_channels: int = 128) -> dict[str, Any]:
    """Pull the student's embeddings to the teacher's, neighbours in the batch together.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the term. The CRD benchmark takes 0.02.
        embedding_channels: Width of both learned embeddings. The CRD benchmark takes 128.
    """
    loss = {"type": "CorrelationCongruenceLoss", "loss_weight": loss_weight}
    parts = compare_pooled("loss_cc", loss)
    parts["connectors"] = linear_connectors(base, "cc", embedding_channels)
    for role in ("student", "teacher"):
        parts["loss_forward_mappings"]["loss_cc"][f"{role}_feature"]["connector"] = f"cc_{role}"
    return parts
