"""The run of a method that trains in two phases: epochs and learning rate of both."""

from __future__ import annotations

import copy
from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.schedule import stated_schedulers

#: MMEngine's mark for a schedule without an end.
ENDLESS = int(1e9)


def two_phases(base: dict, *methods: dict[str, Any]) -> dict[str, Any]:
    """Put the epochs of phase 1 before a base's schedule.

    Phase 1 runs at a constant learning rate; the base's schedule, all of it, begins anew with phase
    2. Validation begins with phase 2 too, since before it the classifier is not trained.

    Args:
        base: Config with ``train_cfg``, ``param_scheduler`` and ``optim_wrapper``.
        *methods: What the methods' functions return. One of them has ``phases`` with
            ``init_epochs``, and may have ``init_lr``, the learning rate of phase 1, where that is
            below the base's; else it is the base's.

    Returns:
        The settings of a config that take the place of the base's: ``train_cfg``,
        ``param_scheduler`` and ``find_unused_parameters``. Without a method in two phases, none.

    Raises:
        SettingError: If the base counts iterations, or a schedule of it cannot be moved.

    Example:
        >>> base = dict(
        ...     train_cfg=dict(by_epoch=True, max_epochs=240),
        ...     param_scheduler=dict(type="MultiStepLR", milestones=[150, 180, 210]),
        ...     optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05)))
        >>> run = two_phases(base, dict(phases=dict(init_epochs=30), init_lr=0.01))
        >>> run["train_cfg"]["max_epochs"]
        270
        >>> [(s["type"], s["begin"]) for s in run["param_scheduler"]]
        [('InitialPhaseLR', 0), ('MultiStepLR', 30)]
    """
    phases = [method for method in methods if "phases" in method]
    if not phases:
        return {}
    epochs = phases[0]["phases"]["init_epochs"]
    train_cfg = copy.deepcopy(dict(base["train_cfg"]))
    if not train_cfg.get("by_epoch", True) or "max_epochs" not in train_cfg:
        raise SettingError("train_cfg", "counted in epochs, as phases are", dict(train_cfg))
    train_cfg["max_epochs"] += epochs
    train_cfg["val_begin"] = epochs + max(train_cfg.get("val_begin", 1), 1)

    moved = [_moved(dict(scheduler), epochs) for scheduler in stated_schedulers(base)]
    learning_rate = base["optim_wrapper"]["optimizer"]["lr"]
    factor = phases[0].get("init_lr", learning_rate) / learning_rate
    if factor < 1:
        # By iterations, so that it is taken back before any other schedule's first step.
        first = {"type": "InitialPhaseLR", "factor": factor, "begin": 0, "end": epochs}
        moved.insert(0, {**first, "by_epoch": True, "convert_to_iter_based": True})
    return {"train_cfg": train_cfg, "param_scheduler": moved, "find_unused_parameters": True}


def _moved(scheduler: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Let a schedule begin later; milestones and periods count from its beginning."""
    if not scheduler.get("by_epoch", True):
        raise SettingError(
            "param_scheduler",
            "schedules with by_epoch=True, which can begin after phase 1",
            scheduler,
            "With convert_to_iter_based=True one steps with each iteration.",
        )
    scheduler = {**copy.deepcopy(scheduler), "begin": scheduler.get("begin", 0) + epochs}
    if scheduler.get("end", ENDLESS) < ENDLESS:
        scheduler["end"] += epochs
    return scheduler
