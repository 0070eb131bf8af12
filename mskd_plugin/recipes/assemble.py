"""From a pair of networks and methods to the ``model`` of a config.

A config's base states the pair and the data once:

- ``pair``: dict with ``teacher`` and ``student`` (names of :data:`mskd_plugin.networks.NETWORKS`),
  ``num_classes``, ``teacher_ckpt`` where the weights have a public address, ``teacher_lr`` where
  ``--method teacher`` needs another learning rate than the student, and
  ``label_smoothing``, the share of the target that the student's own loss spreads over all classes
  (default: none), ``image_side`` where it is not that of the networks' own data set, and
  ``settings``, from a method's name to what differs from its defaults for this pair;
- ``data_preprocessor``: the normalisation that both networks share.

A method is a function of that base which returns the parts it adds to MMRazor's
``ConfigurableDistiller``, a dict of the keys in :data:`PARTS`; ``loss_warmup``, the argument of
``FrozenTeacherDistill``, may be beside them, and so may ``phases``, the arguments of
``TwoPhaseDistill``, and ``ce_weight``, for the student's cross-entropy where the method stands
alone. :func:`distill` joins methods, so any two can be combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier
from mskd_plugin.recipes.pair import checked_pair

#: Networks of a pair that can train alone.
ALONE = ("student", "teacher")
#: What a method may add to the distiller.
PARTS = (
    "student_recorders",
    "teacher_recorders",
    "connectors",
    "distill_losses",
    "loss_forward_mappings",
)


def alone(base: dict, role: str = "student") -> dict[str, Any]:
    """Return the config of one network of the pair that trains without the other.

    Args:
        base: Config with ``pair`` and ``data_preprocessor``.
        role: ``"student"`` or ``"teacher"``.

    Raises:
        SettingError: If ``role`` is neither, or ``label_smoothing`` is no share.
    """
    if role not in ALONE:
        raise SettingError("role", f"one of {ALONE}", repr(role))
    network = _network(checked_pair(base), role)
    network["data_preprocessor"] = _preprocessor(base)
    return network


def _network(pair: dict, role: str, loss_weight: float = 1.0) -> dict[str, Any]:
    """Return a network that learns from the labels."""
    smoothing = pair.get("label_smoothing", 0.0)
    if not 0 <= smoothing < 1:
        raise SettingError("pair.label_smoothing", "a number from 0.0 to below 1", repr(smoothing))
    if not smoothing:
        return classifier(pair[role], pair["num_classes"], loss_weight=loss_weight)
    loss = {
        "type": "LabelSmoothLoss",
        "label_smooth_val": smoothing,
        "mode": "original",
        "loss_weight": loss_weight,
    }
    return classifier(pair[role], pair["num_classes"], loss=loss)


def _preprocessor(base: dict) -> dict[str, Any]:
    preprocessor = base.get("data_preprocessor")
    if not isinstance(preprocessor, dict):
        raise SettingError("data_preprocessor", "a dict with mean and std", repr(preprocessor))
    return dict(preprocessor)


def distill(base: dict, *methods: dict[str, Any], ce_weight: float | None = None) -> dict[str, Any]:
    """Return the config of the distillation of the pair by one or several methods.

    Args:
        base: Config with ``pair`` and ``data_preprocessor``.
        *methods: What the methods' functions return.
        ce_weight: Weight of the student's own cross-entropy. Default: what a method that stands
            alone asks for, else 1.

    Raises:
        SettingError: If ``label_smoothing`` is no share, two methods define the same part
            differently, or both train in two phases.
    """
    pair, preprocessor = checked_pair(base), _preprocessor(base)
    if not isinstance(preprocessor.get("type"), str):
        raise SettingError(
            "data_preprocessor.type",
            "a name such as 'ClsDataPreprocessor'",
            preprocessor.get("type"),
        )
    preprocessor["type"] = f"mmpretrain.{preprocessor['type']}"
    distiller: dict[str, Any] = {"type": "ConfigurableDistiller"}
    for part in PARTS:
        distiller[part] = _joined(part, methods)
    if ce_weight is None:
        ce_weight = methods[0].get("ce_weight", 1.0) if len(methods) == 1 else 1.0
    warmup = _joined("loss_warmup", methods)
    phases = [method["phases"] for method in methods if "phases" in method]
    if len(phases) > 1:
        raise SettingError(
            "methods",
            "at most one that trains in two phases",
            [", ".join(method["init_losses"]) for method in phases],
        )
    return {
        "_scope_": "mmrazor",
        "type": "TwoPhaseDistill" if phases else "FrozenTeacherDistill",
        "data_preprocessor": preprocessor,
        "architecture": _network(pair, "student", ce_weight),
        "teacher": classifier(pair["teacher"], pair["num_classes"]),
        "teacher_ckpt": pair.get("teacher_ckpt"),
        "distiller": distiller,
        **({"loss_warmup": warmup} if warmup else {}),
        **(phases[0] if phases else {}),
    }


def _joined(part: str, methods: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join one part of all methods, in the order of the names.

    MMEngine writes a config in that order. Modules draw their weights, and losses add up, in the
    order of the config: the written one trains to the same weights.
    """
    joined: dict[str, Any] = {}
    for method in methods:
        for name, cfg in method.get(part, {}).items():
            if joined.setdefault(name, cfg) != cfg:
                raise SettingError(part, "names that mean one thing", f"two different {name!r}")
    return dict(sorted(joined.items()))
