"""DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536), by MMRazor's ``DISTLoss``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.logits import FULL_PRECISION, compare_logits
from mskd_plugin.recipes.method import method


@method
def dist(
    base: dict,
    *,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    loss_weight: float = 2.0,
) -> dict[str, Any]:
    r"""Correlate the class probabilities of both networks, within samples and within classes.

    :math:`\tau^2 [\beta (1 - \operatorname{mean}_n r(p^s_n, p^t_n)) + \gamma (1 -
    \operatorname{mean}_c r(p^s_{\cdot c}, p^t_{\cdot c}))]` with Pearson's r of the probabilities
    at temperature :math:`\tau`: over the classes of a sample, and over the samples of a class.

    Args:
        base: Config of the pair.
        temperature: :math:`\tau`: 4 on CIFAR-100, 1 on ImageNet.
        beta: Weight of the correlation within samples.
        gamma: Weight of the correlation within classes.
        loss_weight: Weight of both. The published configurations take 2 on both data sets.
    """
    loss = {
        "type": "DISTLoss",
        "tau": temperature,
        "inter_loss_weight": beta,
        "intra_loss_weight": gamma,
        "loss_weight": loss_weight,
    }
    return compare_logits(
        "loss_dist", loss, student="logits_S", teacher="logits_T", connector=FULL_PRECISION
    )
