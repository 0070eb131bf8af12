"""Validation, tried on two images, and what depends on its metrics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.model import BaseModel
from mmengine.runner import Runner, ValLoop
from mmpretrain.evaluation import Accuracy

from mskd_plugin.checks.data import first_images
from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import schedulers_of


def check_best(runner: Runner, model: BaseModel) -> None:
    """Check that there is a validation where it chooses the best checkpoint."""
    for hook in runner.hooks:
        best = hook.save_best if isinstance(hook, CheckpointHook) else None
        if best is not None and runner.val_loop is None:
            raise SettingError(
                "default_hooks.checkpoint.save_best", "None without validation", repr(best)
            )


def check_metrics(runner: Runner, model: BaseModel) -> None:
    """Try validation, and check that it measures what checkpoints, schedules and the end of the
    training depend on.

    Validation loops and metrics that work otherwise than MMEngine's are not tried.

    Raises:
        SettingError: If the network cannot predict, a metric that is asked for is not measured or
            is no number, or the metrics do not fit the classes.
    """
    if type(runner.val_loop) is not ValLoop:
        return
    metrics = [m for m in runner.val_loop.evaluator.metrics if not isinstance(m, DumpResults)]
    if any(type(metric).evaluate is not BaseMetric.evaluate for metric in metrics):
        return
    loader = runner.val_loop.dataloader
    # Images of different sizes are validated one by one.
    data = first_images(loader, "val_dataloader", count=1 if loader.batch_size == 1 else 2)
    measured: dict[str, Any] = {}
    try:
        outputs = model.val_step(data)
    except Exception as error:  # of whatever network
        raise SettingError(
            "model.architecture" if hasattr(model, "distiller") else "model",
            "a network that can predict the classes of images",
            f"{type(error).__name__} on the first of the validation: {error}",
        ) from error
    try:
        evaluator = copy.deepcopy(runner.val_loop.evaluator)  # which keeps nothing of it
        evaluator.metrics = copy.deepcopy(metrics)
        evaluator.process(outputs, data)
        for metric in evaluator.metrics:  # by itself: its `evaluate` waits for other processes
            found = metric.compute_metrics(metric.results)
            front = f"{metric.prefix}/" if metric.prefix else ""
            measured |= {front + name: value for name, value in found.items()}
    except Exception as error:  # a metric of one's own may need more than two images
        if all(isinstance(metric, Accuracy) for metric in metrics):
            raise SettingError("val_evaluator", "metrics of these classes", error) from error
        runner.logger.warning(
            f"Validation was tried on two images and failed: {type(error).__name__}: {error}"
        )
        return
    for setting, name in _monitored(runner, measured):
        if not isinstance(measured.get(name), (int, float)):
            numbers = [key for key, value in measured.items() if isinstance(value, (int, float))]
            raise SettingError(
                setting, f"a number that validation measures: {', '.join(numbers)}", repr(name)
            )


def _monitored(runner: Runner, measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the runner reads from the metrics, each with the setting that names it."""
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook) and hook.strict:
            yield "EarlyStoppingHook.monitor", hook.monitor
        if not isinstance(hook, CheckpointHook) or hook.save_best is None:
            continue
        for name in hook.key_indicators:
            if name == "auto" and measured:
                name = next(iter(measured))  # as the hook chooses
                known = [key.lower() for key in (*hook.greater_keys, *hook.less_keys)]
                if hook.rules[0] is None and not any(key in name.lower() for key in known):
                    raise SettingError(
                        "default_hooks.checkpoint.rule",
                        f"'greater' or 'less' for {name!r}, which save_best='auto' takes",
                        None,
                    )
            yield "default_hooks.checkpoint.save_best", name
    for scheduler in schedulers_of(runner):
        if getattr(scheduler, "need_val_args", False):
            yield "param_scheduler.monitor", scheduler.monitor
