"""Weighted soft labels (Zhou et al., ICLR 2021, arXiv 2102.00650), by MMRazor's ``WSLD``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.logits import FULL_PRECISION, compare_logits
from mskd_plugin.recipes.method import method


@method
def wsld(base: dict, *, temperature: float = 4.0, loss_weight: float = 2.25) -> dict[str, Any]:
    r"""Weigh each image's soft cross-entropy by how far the student is behind the teacher on it.

    :math:`\tau^2` times the mean over images of :math:`[1 - e^{-l_s / (l_t + 10^{-7})}]
    \sum_c -p^t_c \log p^s_c`, with p at temperature :math:`\tau` and :math:`l_s, l_t` the networks'
    cross-entropies with the label at temperature 1; no gradient flows through the weight.

    Args:
        base: Config of the pair, whose ``num_classes`` the loss has to be told.
        temperature: :math:`\tau`: 4 on CIFAR-100, 2 on ImageNet.
        loss_weight: Weight of the term: 2.25 on CIFAR-100, 2.5 on ImageNet, beside a cross-entropy
            of weight 1. ImageNet's are those of the published code, which has none for CIFAR-100;
            the others are those of NKD's code (cls_KD).
    """
    loss = {
        "type": "WSLD",
        "tau": temperature,
        "num_classes": base["pair"]["num_classes"],
        "loss_weight": loss_weight,
    }
    return compare_logits(
        "loss_wsld",
        loss,
        student="student",
        teacher="teacher",
        labels="gt_labels",
        connector=FULL_PRECISION,
    )
