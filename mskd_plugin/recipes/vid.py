"""Variational information distillation (Ahn et al., arXiv 1904.05835)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import StagePair, compare_stages, stage_pairs, stage_sides


@method
def vid(
    base: dict,
    *,
    stages: Sequence[int] | None = None,
    loss_weight: float = 1.0,
    init_variance: float = 5.0,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """Let the student's maps predict the teacher's, with a learned variance of each channel.

    Args:
        base: Config with the ``pair``.
        stages: Stages, counted from the last one of each network, -1. Default: all.
        loss_weight: Weight of each stage's term. The CRD benchmark takes 1.
        init_variance: Variance before training.
        eps: Smallest variance.

    Raises:
        SettingError: If a stage does not exist in both networks, or a student's map is larger than
            the teacher's by no whole factor.
    """
    pairs = stage_pairs(base, stages)
    loss = {
        "type": "VariationalInformationLoss",
        "loss_weight": loss_weight,
        "init_variance": init_variance,
        "eps": eps,
    }
    parts = compare_stages(
        pairs,
        "vid",
        loss,
        lambda pair: {
            "type": "VIDRegressor",
            "in_channels": pair.student_channels,
            "out_channels": pair.teacher_channels,
            "pool": _pool(base, pair),
        },
    )
    for pair in pairs:
        parts["distill_losses"][f"loss_vid_{pair.name}"]["channels"] = pair.teacher_channels
    return parts


def _pool(base: dict, pair: StagePair) -> int:
    """Return how many times larger the student's map is than the teacher's, 1 if it is not."""
    student, teacher = (sides[pair.index] for sides in stage_sides(base))
    factors = {s // t if s > t else 1 for s, t in zip(student, teacher)}
    if len(factors) == 1 and all(s <= t or s % t == 0 for s, t in zip(student, teacher)):
        return factors.pop()
    raise SettingError(
        "stages",
        "those where the student's map is a whole number of times larger than the teacher's, or "
        "no larger",
        f"{pair.index}, with {student} in {base['pair']['student']} and {teacher} in "
        f"{base['pair']['teacher']}",
    )
