"""MMEngine's parameter schedulers: one for an initial phase, and those of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.optim import ConstantLR
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class InitialPhaseLR(ConstantLR):
    """MMEngine's ``ConstantLR`` for all of ``begin`` to ``end``, taken back at ``end``.

    ``ConstantLR`` takes its factor back one step before its end, so that what follows begins one
    step late. First in the list of schedulers, this one leaves to those that begin at its end the
    learning rate that they would have without it, also where they count iterations
    (``convert_to_iter_based``).

    Args:
        *args: The optimizer.
        **kwargs: The arguments of ``ConstantLR``: ``factor`` from 0 to 1, ``begin``, ``end``,
            ``by_epoch``, ``last_step``, ``verbose``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total_iters += 1
        self.end += 1


def stated_schedulers(cfg: Mapping[str, Any]) -> list[Any]:
    """Return the schedulers of a config, which may state one by itself, as a list."""
    schedulers = cfg.get("param_scheduler") or []
    return [schedulers] if isinstance(schedulers, dict) else schedulers


def schedule_with_own_rate(cfg: Config) -> ConfigDict | None:
    """Return the scheduler, if any, that states the learning rate by itself."""
    return next((one for one in stated_schedulers(cfg) if "eta_max" in one), None)
