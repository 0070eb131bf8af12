"""FitNets (Romero et al., arXiv 1412.6550), by MMRazor's ``L2Loss``."""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import network
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import compare_stages, stage_pairs, stage_sides


@method
def fitnet(base: dict, *, stage: int | None = None, loss_weight: float = 100.0) -> dict[str, Any]:
    r"""Pull the student's regressed map to the teacher's at one stage.

    The mean over all elements of :math:`(r(f_s) - f_t)^2`, with the regressor r of
    :class:`mskd_plugin.connectors.FitNetRegressor`. Its layer follows from the sizes of both maps,
    as in the CRD benchmark.

    Args:
        base: Config with the ``pair``.
        stage: The stage, counted from the last one of each network, -1. Default: the student's
            second stage, which the CRD benchmark takes (its hint layer 2, the stem counted as 0).
        loss_weight: Weight of the term. The CRD benchmark takes 100.

    Raises:
        SettingError: If a network lacks the stage, or the teacher's map is larger than the
            student's and not twice its size.
    """
    if stage is None:
        stage = 1 - len(network(base["pair"]["student"]).stages)
    (pair,) = stage_pairs(base, (stage,))
    # As it is, MMRazor's `L2Loss` makes each map a unit vector and divides by the images alone.
    loss = {
        "type": "L2Loss",
        "normalize": False,
        "div_element": True,
        "loss_weight": loss_weight,
    }
    parts = compare_stages(
        [pair],
        "fitnet",
        loss,
        lambda pair: {
            "type": "FitNetRegressor",
            "in_channels": pair.student_channels,
            "out_channels": pair.teacher_channels,
            **regressor_resize(base, stage),
        },
    )
    (mapping,) = parts["loss_forward_mappings"].values()
    mapping["s_feature"] = mapping.pop("student_feature")
    mapping["t_feature"] = mapping.pop("teacher_feature")
    return parts


def regressor_resize(base: dict, stage: int) -> dict[str, Any]:
    """Return the settings of a FitNet regressor that follow from the sizes of a stage's maps.

    Args:
        base: Config with the ``pair``.
        stage: The stage, counted from the last one of each network, -1.

    Raises:
        SettingError: If no layer of the CRD benchmark's brings the sizes together.
    """
    student, teacher = (sides[stage] for sides in stage_sides(base))
    if student == tuple(2 * side for side in teacher):
        return {"resize": "halve"}
    if teacher == tuple(2 * side for side in student):
        return {"resize": "double"}
    excess = {s - t for s, t in zip(student, teacher)}
    if len(excess) == 1 and min(excess) >= 0:
        return {"resize": "none", "kernel_size": 1 + excess.pop()}
    names = base["pair"]
    raise SettingError(
        "stage",
        "one whose maps a regressor brings together: the student's at least as large as the "
        "teacher's, or half its size",
        f"{stage}, with {student[0]} x {student[1]} positions of {names['student']} and "
        f"{teacher[0]} x {teacher[1]} positions of {names['teacher']}",
    )
