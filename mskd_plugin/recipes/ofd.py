"""Overhaul of feature distillation (Heo et al., arXiv 1904.01866)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import network
from mskd_plugin.recipes.assemble import PARTS
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.preact import preact, preact_pairs, preact_recorders


@method
def ofd(base: dict, *, loss_weight: float = 1e-3) -> dict[str, Any]:
    """Pull the student's maps before the ReLU to the teacher's, as far as the teacher's ReLU lets
    pass.

    One :class:`mskd_plugin.losses.OverhaulLoss` a stage, weighted 1 at the last stage and half as
    much at each stage before it. The student's side goes through a 1x1 convolution without bias and
    batch normalisation, MMRazor's ``ConvModuleConnector``, at every stage. Stages are paired from
    the last one; the teacher's map is pooled to the student's size.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the method. The published code takes 1e-3 on CIFAR-100 and 1e-4 on
            ImageNet.

    Raises:
        SettingError: If a network has no known maps before the ReLU, or the teacher's do not come
            from a normalisation, which the margins are read from.
    """
    pairs = preact_pairs(base, "OFD")
    name = base["pair"]["teacher"]
    norms = network(name).preact_norms
    if not norms:
        raise SettingError(
            "pair.teacher",
            "a network whose maps before the ReLU come from a normalisation, for OFD's margins",
            f"{name!r} in {name} to {base['pair']['student']}",
        )
    parts: dict[str, Any] = {part: {} for part in PARTS} | preact_recorders(pairs)
    for pair in pairs:
        connector, loss = f"ofd_{pair.name}_student", f"loss_ofd_{pair.name}"
        parts["connectors"][connector] = {
            "type": "ConvModuleConnector",
            "in_channel": pair.student_channels,
            "out_channel": pair.teacher_channels,
            "norm_cfg": {"type": "BN"},
            "act_cfg": None,
        }
        parts["distill_losses"][loss] = {
            "type": "OverhaulLoss",
            "loss_weight": loss_weight * 2.0 ** (pair.index + 1),
        }
        parts["loss_forward_mappings"][loss] = {
            "student_feature": {**preact(pair, from_student=True), "connector": connector},
            "teacher_feature": preact(pair, from_student=False),
        }
        for parameter in ("weight", "bias"):
            recorder = f"{pair.name}_norm_{parameter}"
            parts["teacher_recorders"][recorder] = {
                "type": "Parameter",
                "source": f"{norms[pair.index]}.{parameter}",
            }
            parts["loss_forward_mappings"][loss][f"norm_{parameter}"] = {
                "recorder": recorder,
                "from_student": False,
            }
    return parts
