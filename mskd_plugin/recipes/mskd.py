"""Multi-scale feature decoupling with contrastive learning: this project's method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.functional.decoupling import DEFAULT_SCALES, check_overlap, check_scales
from mskd_plugin.losses import MultiScaleContrastiveLoss
from mskd_plugin.networks import Network, network
from mskd_plugin.recipes.assemble import PARTS
from mskd_plugin.recipes.logits import LABELS, LABELS_MAPPING
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import check_stages


@functools.partial(method, loss=MultiScaleContrastiveLoss)
def mskd(
    base: dict,
    *,
    stages: Sequence[int] = (-1,),
    stage_weights: Sequence[float] | None = None,
    loss_weight: float = 3.0,
    scales: Sequence[int] = DEFAULT_SCALES,
    overlap: float = 0.0,
    projector: str = "linear",
    **loss_settings: Any,
) -> dict[str, Any]:
    """Decouple stages of both networks and contrast their regions.

    Args:
        base: Config with the ``pair``.
        stages: Which stages, counted from the last one of each network, so that networks of
            different depth pair up: -1 is the stage that feeds the classifier.
        stage_weights: Weight of each stage on top of ``loss_weight``. Default: all 1.
        loss_weight: Weight of the method.
        scales: Scales of both connectors.
        overlap: Overlap of neighbouring windows.
        projector: The student's projector.
        **loss_settings: Further settings of
            :class:`mskd_plugin.losses.MultiScaleContrastiveLoss`.

    Raises:
        SettingError: If a stage does not exist in both networks, the weights do not match the
            stages, a setting of connectors or loss is malformed, or regions are to be categorized
            at a stage whose average does not feed the classifier.
    """
    pair = base["pair"]
    student, teacher = network(pair["student"]), network(pair["teacher"])
    depth = min(len(student.stages), len(teacher.stages))
    check_stages(stages, depth, f"{pair['teacher']} and {pair['student']}")
    weights = [1.0] * len(stages) if stage_weights is None else list(stage_weights)
    if len(weights) != len(stages):
        raise SettingError("stage_weights", f"{len(stages)} weights, one per stage", weights)
    contrastive = MultiScaleContrastiveLoss(**loss_settings)
    if contrastive.categorizes:
        _check_categorized(pair, stages)
    parts: dict[str, Any] = {part: {} for part in PARTS}
    scales, overlap = check_scales(scales), check_overlap(overlap)
    pooling = {"type": "MultiScaleDecouplingConnector", "scales": scales, "overlap": overlap}
    for stage, weight in zip(stages, weights):
        number = len(student.stages) + stage + 1
        name, s_source, s_channels = _tap(student, stage, number)
        t_name, t_source, t_channels = _tap(teacher, stage, number)
        parts["student_recorders"][name] = {"type": "ModuleOutputs", "source": s_source}
        parts["teacher_recorders"][t_name] = {"type": "ModuleOutputs", "source": t_source}
        parts["connectors"][f"{name}_student"] = {
            **pooling,
            "projector": projector,
            "in_channels": s_channels,
            "out_channels": t_channels,
            **_class_tokens(student),
        }
        parts["connectors"][f"{name}_teacher"] = {
            **pooling,
            "in_channels": t_channels,
            **_class_tokens(teacher),
        }
        loss = f"loss_mskd_{name}"
        parts["distill_losses"][loss] = {
            "type": "MultiScaleContrastiveLoss",
            "loss_weight": loss_weight * weight,
            **loss_settings,
        }
        parts["loss_forward_mappings"][loss] = {
            "student_regions": {
                "recorder": name,
                "from_student": True,
                "connector": f"{name}_student",
            },
            "teacher_regions": {
                "recorder": t_name,
                "from_student": False,
                "connector": f"{name}_teacher",
            },
            **_class_mappings(parts, contrastive),
        }
    return parts


def _check_categorized(pair: dict, stages: Sequence[int]) -> None:
    """Check that the teacher's classifier reads the average of what is categorized by it."""
    if tuple(stages) != (-1,):
        raise SettingError(
            "stages",
            "(-1,), the stage that feeds the teacher's classifier, where regions are categorized",
            f"{tuple(stages)} for {pair['teacher']} to {pair['student']}",
            "Other stages can be a second `mskd(...)` beside it.",
        )
    if not network(pair["teacher"]).final_is_pooled:
        raise SettingError(
            "teacher",
            "a network whose classifier reads the average of its last map, where regions are "
            "categorized",
            f"{pair['teacher']} for {pair['student']}",
        )


def _tap(net: Network, stage: int, number: int) -> tuple[str, str, int]:
    """Return a stage's recorder name, source and channels; the last one is what gets pooled.

    Wide residual networks, MobileNetV2 and ShuffleNetV2 have layers between the last stage's map
    and the pooling; there the map behind them is taken, as ``final``.
    """
    if stage == -1 and net.final != net.stages[-1]:
        return ("final", *net.final)
    return (f"stage{number}", *net.stages[stage])


def _class_tokens(net: Network) -> dict[str, int]:
    """Let a connector leave out the tokens that stand for no position."""
    return {"class_tokens": net.class_tokens} if net.class_tokens else {}


def _class_mappings(parts: dict[str, Any], loss: MultiScaleContrastiveLoss) -> dict[str, Any]:
    """Record what categorization reads: the labels, and the teacher's classifier."""
    mappings: dict[str, Any] = {}
    if loss.categorizes or loss.exclude_same_class:
        parts["student_recorders"].update(LABELS)
        mappings["labels"] = dict(LABELS_MAPPING)
    if loss.categorizes:
        for name in ("weight", "bias"):
            recorder = f"classifier_{name}"
            parts["teacher_recorders"][recorder] = {
                "type": "Parameter",
                "source": f"head.fc.{name}",
            }
            mappings[recorder] = {"recorder": recorder, "from_student": False}
    return mappings
