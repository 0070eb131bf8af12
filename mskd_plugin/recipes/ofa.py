"""One-for-all distillation (OFA-KD; Hao et al., arXiv 2310.19444)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.connectors.ofa import TOKEN_POOLS, count_mergings
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import network
from mskd_plugin.recipes.logits import compare_logits
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import check_stages, stage_sides


@method
def ofa(
    base: dict,
    *,
    stages: Sequence[int] | None = None,
    exponent: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    loss_weight: float = 1.0,
    logits_weight: float = 1.0,
    token_pool: str = "average",
) -> dict[str, Any]:
    r"""Give stages of the student classifiers of their own, and all of them the teacher's logits.

    The classifiers are :class:`mskd_plugin.connectors.OFABranch`, of transformers and MLPs
    :class:`mskd_plugin.connectors.OFATokenBranch`. Of mixed images the class of the larger share is
    the target, as in the published code.

    Args:
        base: Config with the ``pair``. Teacher and student may be of any family.
        stages: Stages of the student, counted from its last one, -1. Default: all.
        exponent: :math:`\epsilon` of :class:`mskd_plugin.losses.OFALoss`: one for all, or one per
            stage and one more for the student's own logits. Published runs take 1 to 1.5 by pair.
        temperature: Of all branches.
        loss_weight: Weight of each stage's branch.
        logits_weight: Weight of the student's own logits.
        token_pool: What the branches of tokens classify: ``"average"``, with class tokens left out,
            or ``"class_token"``, which the published code takes for students that have one.

    Raises:
        SettingError: If the student has no such stage, ``exponent`` does not match the stages, or a
            branch cannot read a stage's tokens.
    """
    pair = base["pair"]
    student = network(pair["student"])
    depth = len(student.stages)
    # Without stages the loss on the student's own logits is left.
    chosen = check_stages(stages, depth, pair["student"], least=0)
    if token_pool not in TOKEN_POOLS or (token_pool == "class_token" and not student.class_tokens):
        raise SettingError(
            "token_pool",
            f"one of {TOKEN_POOLS}, the second for a student with a class token",
            f"{token_pool!r} for {pair['student']}, the student of {pair['teacher']}",
        )
    exponents = _exponents(exponent, len(chosen) + 1)
    sides = stage_sides(base)[0]
    hidden = max(student.width, network(pair["teacher"]).width)
    common = {"type": "OFALoss", "temperature": temperature}

    loss = {**common, "exponent": exponents[-1], "loss_weight": logits_weight}
    parts = compare_logits("loss_ofa", loss, targets="labels")
    parts["connectors"] = {}
    for stage, stage_exponent in zip(chosen, exponents):
        recorder = f"stage{depth + stage + 1}"
        source, channels = student.stages[stage]
        connector, name = f"ofa_{recorder}_student", f"loss_ofa_{recorder}"
        parts["student_recorders"][recorder] = {"type": "ModuleOutputs", "source": source}
        branch = {"in_channels": channels, "num_classes": pair["num_classes"]}
        if student.tokens:
            branch |= _token_branch(pair, stage, sides[stage], token_pool)
        else:
            branch |= {"type": "OFABranch", "hidden_channels": hidden, "halvings": -1 - stage}
        parts["connectors"][connector] = branch
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


def _token_branch(
    pair: dict[str, Any], stage: int, map_size: tuple[int, int], token_pool: str
) -> dict[str, Any]:
    """Return what a branch of tokens has beside its channels and classes."""
    student = network(pair["student"])
    channels = student.stages[stage][1]
    if channels != student.width and not count_mergings(map_size):
        raise SettingError(
            "stages",
            f"those with tokens of {student.width} channels, or on a grid of at least 14 x 14, "
            "whose merging widens them",
            f"{stage} of {pair['student']}, the student of {pair['teacher']}, with {channels} "
            f"channels on {map_size[0]} x {map_size[1]}",
        )
    return {
        "type": "OFATokenBranch",
        "hidden_channels": student.width,
        "map_size": map_size,
        "num_blocks": max(-1 - stage, 1),
        "class_tokens": student.class_tokens,
        "pool": token_pool,
    }


def _exponents(exponent: float | Sequence[float], count: int) -> list[float]:
    if not isinstance(exponent, Sequence):
        return [exponent] * count
    if len(exponent) != count:
        raise SettingError(
            "exponent", f"one number, or {count}: one per stage and one for the logits", exponent
        )
    return list(exponent)
