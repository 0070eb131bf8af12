"""What a runner holds, out of the wrappers of several processes and of several optimizers."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner


def model_of(runner: Runner) -> Any:
    """Return a runner's model, without ``DistributedDataParallel`` or the like around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def optim_wrappers_of(runner: Runner) -> list[OptimWrapper]:
    """Return a runner's built optimizer wrappers, one for each optimizer."""
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def schedulers_of(runner: Runner) -> list[Any]:
    """Return a runner's built parameter schedulers, those of several optimizers in one list."""
    schedulers: Any = runner.param_schedulers or []
    groups = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    return [scheduler for group in groups for scheduler in group]
