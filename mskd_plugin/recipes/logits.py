"""Where the recipes of logit methods tap a pair of networks.

Recorders: ``logits``, what the last layer gives, in both networks; ``labels``, the student's
targets, for losses that read one class per image; ``targets``, the same for losses that read scores
too, which mixed images have.
"""

from __future__ import annotations

from typing import Any

LOGITS = {"logits": {"type": "ModuleOutputs", "source": "head.fc"}}
LABELS = {"labels": {"type": "ModuleInputs", "source": "head.loss_module"}}
TARGETS = {"targets": LABELS["labels"]}
LABELS_MAPPING = {"recorder": "labels", "from_student": True, "data_idx": 1}
#: In front of MMRazor's losses, which compute in the precision that they are given.
FULL_PRECISION = {"logits_full_precision": {"type": "FullPrecisionConnector"}}


def compare_logits(
    name: str,
    loss: dict[str, Any],
    *,
    student: str = "student_logits",
    teacher: str = "teacher_logits",
    labels: str | None = None,
    targets: str | None = None,
    connector: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the parts of a method with one loss between both networks' logits.

    Args:
        name: Name of the loss, ``loss_<method>``.
        loss: Config of the loss.
        student: The forward argument that takes the student's logits.
        teacher: The forward argument that takes the teacher's logits.
        labels: The forward argument that takes the labels, if one does.
        targets: The forward argument that takes labels or scores, if one does.
        connector: From the name of a connector that both networks' logits pass first to its config.
    """
    through = {"connector": next(iter(connector))} if connector else {}
    mappings: dict[str, Any] = {
        student: {"recorder": "logits", "from_student": True, **through},
        teacher: {"recorder": "logits", "from_student": False, **through},
    }
    if labels is not None:
        mappings[labels] = dict(LABELS_MAPPING)
    if targets is not None:
        mappings[targets] = {**LABELS_MAPPING, "recorder": "targets"}
    return {
        "student_recorders": {
            **LOGITS,
            **(LABELS if labels is not None else {}),
            **(TARGETS if targets is not None else {}),
        },
        "teacher_recorders": dict(LOGITS),
        **({"connectors": dict(connector)} if connector else {}),
        "distill_losses": {name: loss},
        "loss_forward_mappings": {name: mappings},
    }


def warmed_up(parts: dict[str, Any], warmup: float) -> dict[str, Any]:
    """Let all losses of a method grow to their weight over ``warmup`` epochs; 0 lets none."""
    if warmup:
        parts["loss_warmup"] = {name: warmup for name in parts["distill_losses"]}
    return parts
