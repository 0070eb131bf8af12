"""One-for-all distillation (OFA-KD; Hao et al., arXiv 2310.19444) of convolutional students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import network
from mskd_plugin.recipes.logits import compare_logits
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import stage_sides


@method
def ofa(
    base: dict,
    *,
    stages: Sequence[int] | None = None,
    exponent: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    loss_weight: float = 1.0,
    logits_weight: float = 1.0,
) -> dict[str, Any]:
    r"""Give stages of the student classifiers of their own, and all of them the teacher's logits.

    Args:
        base: Config with the ``pair``. The teacher may be of any family.
        stages: Stages of the student, counted from its last one, -1. Default: all.
        exponent: :math:`\epsilon` of :class:`mskd_plugin.losses.OFALoss`: one for all, or one per
            stage and one more for the student's own logits. Published runs take 1 to 1.5 by pair.
        temperature: Of all branches.
        loss_weight: Weight of each stage's branch.
        logits_weight: Weight of the student's own logits.

    Raises:
        SettingError: If the student has no such stage, a stage is no map, or ``exponent`` does not
            match the stages.
    """
    pair = base["pair"]
    student = network(pair["student"])
    depth = len(student.stages)
    chosen = list(range(-depth, 0)) if stages is None else list(stages)
    for stage in chosen:
        if stage not in range(-depth, 0):
            raise SettingError(
                "stages", f"numbers from -{depth} to -1 for {pair['student']}", stage
            )
    exponents = _exponents(exponent, len(chosen) + 1)
    sides = stage_sides(base)[0]
    hidden = max(student.width, network(pair["teacher"]).width)
    common = {"type": "OFALoss", "temperature": temperature}

    loss = {**common, "exponent": exponents[-1], "loss_weight": logits_weight}
    parts = compare_logits("loss_ofa", loss, labels="labels")
    parts["connectors"] = {}
    for stage, stage_exponent in zip(chosen, exponents):
        recorder = f"stage{depth + stage + 1}"
        if len(sides[stage]) != 2:
            raise SettingError(
                "stages",
                "those of a convolutional student, whose outputs are maps",
                f"{recorder} of {pair['student']}, the student of {pair['teacher']}, with "
                f"{sides[stage][0]} tokens",
            )
        source, channels = student.stages[stage]
        connector, name = f"ofa_{recorder}_student", f"loss_ofa_{recorder}"
        parts["student_recorders"][recorder] = {"type": "ModuleOutputs", "source": source}
        parts["connectors"][connector] = {
            "type": "OFABranch",
            "in_channels": channels,
            "hidden_channels": hidden,
            "num_classes": pair["num_classes"],
            "halvings": -1 - stage,
        }
        parts["distill_losses"][name] = {
            **common,
            "exponent": stage_exponent,
            "loss_weight": loss_weight,
        }
        parts["loss_forward_mappings"][name] = {
            **parts["loss_forward_mappings"]["loss_ofa"],
            "student_logits": {"recorder": recorder, "from_student": True, "connector": connector},
        }
    return parts


def _exponents(exponent: float | Sequence[float], count: int) -> list[float]:
    if not isinstance(exponent, Sequence):
        return [exponent] * count
    if len(exponent) != count:
        raise SettingError(
            "exponent", f"one number, or {count}: one per stage and one for the logits", exponent
        )
    return list(exponent)
