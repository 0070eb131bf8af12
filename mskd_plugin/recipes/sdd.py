"""Scale-decoupled distillation (Wei et al., arXiv 2403.13512) of KD, DKD and NKD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.losses.sdd import check_sdd_scales
from mskd_plugin.networks import network
from mskd_plugin.recipes.logits import LABELS, LABELS_MAPPING, warmed_up
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.pair import METHOD_SETTINGS, pair_settings
from mskd_plugin.recipes.taps import layout, stage_sides, tapped

SIDES = ("student", "teacher")


@method
def sdd_kd(
    base: dict,
    *,
    scales: Sequence[int] | None = None,
    temperature: float | None = None,
    complementary_weight: float = 2.0,
    loss_weight: float | None = None,
    ce_weight: float | None = None,
) -> dict[str, Any]:
    """Apply KD to the regions of the last map.

    Args:
        base: Config with the ``pair``.
        scales: Out of 1, 2 and 4, with 1 among them. Default: all that both networks' last maps are
            large enough for. The published runs take (1, 2) for ResNet32x4 to ResNet8x4, VGG13 to
            VGG8 and ResNet-34 to ResNet-18.
        temperature: Default of this, ``loss_weight`` and ``ce_weight``: what the pair states for
            ``kd``, else the default of :func:`kd`.
        complementary_weight: Weight of regions where the teacher is right and on the whole map is
            not, or the reverse.
        loss_weight: Weight of the method.
        ce_weight: Weight of the student's cross-entropy where the method stands alone.

    Raises:
        SettingError: If a last map is smaller than the largest scale, or its average is not what
            the classifier reads.
    """
    given = {"temperature": temperature, "loss_weight": loss_weight, "ce_weight": ce_weight}
    settings = _inherit(_settings_of("kd", base), given)
    of_student = settings.pop("ce_weight")
    parts = _sdd(base, "kd", scales, complementary_weight=complementary_weight, **settings)
    return {**parts, "ce_weight": of_student}


@method
def sdd_dkd(
    base: dict,
    *,
    scales: Sequence[int] | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    complementary_weight: float = 2.0,
    loss_weight: float | None = None,
    warmup: float | None = None,
) -> dict[str, Any]:
    """Apply DKD to the regions of the last map.

    Args:
        base: Config with the ``pair``.
        scales: As of :func:`sdd_kd`.
        temperature: Default of this and what follows, but for ``complementary_weight``: what the
            pair states for ``dkd``, else the default of :func:`dkd`.
        alpha: Weight of the target's term.
        beta: Weight of the other classes' term.
        complementary_weight: As of :func:`sdd_kd`.
        loss_weight: Weight of the method.
        warmup: Epochs over which the loss grows to its weight.

    Raises:
        SettingError: If a last map is smaller than the largest scale, or its average is not what
            the classifier reads.
    """
    given = {
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "loss_weight": loss_weight,
        "warmup": warmup,
    }
    settings = _inherit(_settings_of("dkd", base), given)
    epochs = settings.pop("warmup")
    parts = _sdd(base, "dkd", scales, complementary_weight=complementary_weight, **settings)
    return warmed_up(parts, epochs)


@method
def sdd_nkd(
    base: dict,
    *,
    scales: Sequence[int] | None = None,
    temperature: float | None = None,
    gamma: float | None = None,
    complementary_weight: float = 2.0,
    loss_weight: float = 1.0,
    warmup: float | None = None,
) -> dict[str, Any]:
    """Apply NKD to the regions of the last map, with DKD's settings, as the published code does.

    Args:
        base: Config with the ``pair``.
        scales: As of :func:`sdd_kd`.
        temperature: Default of this, ``gamma`` and ``warmup``: what the pair states for ``dkd``,
            else the default of :func:`dkd`.
        gamma: Weight of the other classes' term, DKD's ``beta``.
        complementary_weight: As of :func:`sdd_kd`.
        loss_weight: Weight of the method.
        warmup: Epochs over which the loss grows to its weight.

    Raises:
        SettingError: If a last map is smaller than the largest scale, or its average is not what
            the classifier reads.
    """
    inherited = _settings_of("dkd", base)
    inherited["gamma"] = inherited["beta"]
    settings = _inherit(inherited, {"temperature": temperature, "gamma": gamma, "warmup": warmup})
    epochs = settings.pop("warmup")
    settings.update(complementary_weight=complementary_weight, loss_weight=loss_weight)
    parts = _sdd(base, "nkd", scales, **settings)
    return warmed_up(parts, epochs)


def _settings_of(name: str, base: dict) -> dict[str, Any]:
    """Return the settings of the method that is applied to regions, for the pair."""
    defaults = {key: setting.default for key, setting in (METHOD_SETTINGS[name] or {}).items()}
    return {**defaults, **pair_settings(base, name)}


def _inherit(inherited: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: inherited[name] if value is None else value for name, value in given.items()}


def _sdd(base: dict, term: str, scales: Sequence[int] | None, **settings: Any) -> dict[str, Any]:
    """Record both last maps and classifiers, and the labels."""
    pair = base["pair"]
    nets = {side: network(pair[side]) for side in SIDES}
    if not all(net.final_is_pooled for net in nets.values()):
        raise SettingError(
            "pair",
            "of networks whose classifiers read the average of their last map or tokens, for SDD",
            f"{pair['teacher']} and {pair['student']}",
        )
    name = f"loss_sdd_{term}"
    mappings: dict[str, Any] = {"labels": dict(LABELS_MAPPING)}
    recorders: dict[str, dict[str, Any]] = {}
    connectors: dict[str, Any] = {}
    for side in SIDES:
        source, _ = nets[side].final
        recorders[side] = {"final": {"type": "ModuleOutputs", "source": source}}
        mappings[f"{side}_feature"], of_side = tapped("final", side, layout(nets[side]))
        connectors.update(of_side)
        for parameter in ("weight", "bias"):
            recorder = f"classifier_{parameter}"
            recorders[side][recorder] = {"type": "Parameter", "source": f"head.fc.{parameter}"}
            mappings[f"{side}_{parameter}"] = {
                "recorder": recorder,
                "from_student": side == "student",
            }
    loss = {
        "type": "ScaleDecoupledKDLoss",
        "term": term,
        "scales": _scales(base, scales),
        **settings,
    }
    return {
        "student_recorders": {**recorders["student"], **LABELS},
        "teacher_recorders": recorders["teacher"],
        "connectors": connectors,
        "distill_losses": {name: loss},
        "loss_forward_mappings": {name: mappings},
    }


def _scales(base: dict, scales: Sequence[int] | None) -> tuple[int, ...]:
    """Choose the scales, or refuse those that are too fine for one of the networks."""
    student, teacher = (sides[-1] for sides in stage_sides(base))
    smallest = min(*student, *teacher)
    if scales is None:
        return tuple(scale for scale in (1, 2, 4) if scale <= smallest)
    if max(check_sdd_scales(scales)) > smallest:
        pair = base["pair"]
        raise SettingError(
            "scales",
            f"at most {smallest}, the side of the smaller last map",
            f"{tuple(scales)} for maps of {student} of {pair['student']} and {teacher} of "
            f"{pair['teacher']}",
        )
    return tuple(scales)
