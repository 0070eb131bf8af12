"""KD with logit standardisation (Sun et al., arXiv 2403.01427), by MMRazor's ``KLDivergence``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.kd import compare_softened
from mskd_plugin.recipes.method import method


@method
def ls_kd(
    base: dict, *, temperature: float = 2.0, loss_weight: float = 9.0, ce_weight: float = 0.1
) -> dict[str, Any]:
    r"""Compare class probabilities as :func:`kd` does, of logits standardised per image.

    Both networks' logits pass a :class:`mskd_plugin.connectors.LogitStandardizationConnector`.

    Args:
        base: Config of the pair.
        temperature: :math:`\tau`. The published runs take 2, and 3 or 4 for some pairs.
        loss_weight: Weight of the term. The published runs take 9, and 1 or 12 for some pairs.
        ce_weight: Weight of the student's cross-entropy where the method stands alone. The
            published configurations have 0.1 on CIFAR-100, on ImageNet 1 for ResNet-34 to ResNet-18
            and 0.5 for ResNet-50 to MobileNetV1.
    """
    connector = {"logits_standardized": {"type": "LogitStandardizationConnector"}}
    parts = compare_softened("loss_ls_kd", temperature, loss_weight, connector)
    return {**parts, "ce_weight": ce_weight}
