"""Activation boundaries (Heo et al., arXiv 1811.03233), by MMRazor's ``ABLoss``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.recipes.assemble import PARTS
from mskd_plugin.recipes.fitnet import regressor_resize
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.preact import preact, preact_pairs, preact_recorders
from mskd_plugin.recipes.taps import stage_sides


@method
def ab(
    base: dict, *, loss_weight: float = 1.0, margin: float = 1.0, init_epochs: int = 30
) -> dict[str, Any]:
    r"""Let the student's neurons fire where the teacher's do, then train it on the task.

    Of n stages, the i-th from 0 has :math:`2^{i-n+1} \cdot 3/1000 / N` times the sum over all
    elements of :math:`(s+m)^2` where :math:`s > -m` and :math:`t \le 0`, and :math:`(s-m)^2` where
    :math:`s \le m` and :math:`t > 0`, of the maps before the ReLU. MMRazor's ``ABLoss`` is that but
    for :math:`2^{i-n+1}`, which becomes its weight. A stage whose channels or sizes differ has a
    :class:`mskd_plugin.connectors.ActivationBoundaryConnector` on the student's side.

    Phase 1 trains the student's backbone and the connectors by this loss alone; phase 2 trains the
    student by its own loss alone. Needs :func:`mskd_plugin.recipes.two_phases`.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the method in phase 1. The CRD benchmark takes 1.
        margin: m, as published 1.
        init_epochs: Epochs of phase 1. The CRD benchmark takes 30.

    Raises:
        SettingError: If a network has no known maps before the ReLU, or a stage's maps are of sizes
            that no connector brings together.
    """
    pairs = preact_pairs(base, "AB")
    parts: dict[str, Any] = {part: {} for part in PARTS} | preact_recorders(pairs)
    sides = stage_sides(base)
    for pair in pairs:
        student = preact(pair, from_student=True)
        same_size = sides[0][pair.index] == sides[1][pair.index]
        if pair.student_channels != pair.teacher_channels or not same_size:
            student["connector"] = f"ab_{pair.name}_student"
            parts["connectors"][student["connector"]] = {
                "type": "ActivationBoundaryConnector",
                "in_channels": pair.student_channels,
                "out_channels": pair.teacher_channels,
                **regressor_resize(base, pair.index),
            }
        loss = f"loss_ab_{pair.name}"
        parts["distill_losses"][loss] = {
            "type": "ABLoss",
            "loss_weight": loss_weight * 2.0 ** (pair.index + 1),
            "margin": margin,
        }
        parts["loss_forward_mappings"][loss] = {
            "s_feature": student,
            "t_feature": preact(pair, from_student=False),
        }
    connectors = [f"distiller.connectors.{name}" for name in parts["connectors"]]
    parts["phases"] = {
        "init_losses": list(parts["distill_losses"]),
        "init_modules": ["architecture.backbone", *connectors],
        "init_epochs": init_epochs,
    }
    return parts
