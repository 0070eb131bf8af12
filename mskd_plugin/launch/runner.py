"""The runner of a config, checked before any training time is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, RUNNERS
from mmengine.runner import BaseLoop, Runner

from mskd_plugin.checkpoints.weights import check_source
from mskd_plugin.errors import SettingError, nearest
from mskd_plugin.hooks.preflight import check_data_roots
from mskd_plugin.launch.resume import check_resumed
from mskd_plugin.switches import FROZEN_TEACHER, computes_fused


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a checked config, with its loops and its optimizer.

    Raises:
        SettingError: If data are missing, a type of the config does not take its settings, or the
            training continues from a checkpoint that is not one of it.
    """
    check_data_roots(cfg)
    if cfg.model.get("type") in FROZEN_TEACHER and cfg.model.get("teacher_ckpt"):
        check_source(cfg.model.teacher_ckpt, "model.teacher_ckpt")  # before the config is printed
    _check_optimizer(cfg)
    _check_hooks(cfg)
    try:
        changes = check_resumed(cfg)
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
        # The runner would build these when it starts, in the same order.
        if _with_data(runner, "train") is not None:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        for stage in ("val", "test"):
            _with_data(runner, stage)
    except (KeyError, TypeError) as error:
        raise SettingError(
            "the config",
            "types that are registered, with settings that they take",
            f"{type(error).__name__}: {error}",
        ) from error
    if changes:
        runner.logger.warning(f"The method is resumed with other settings: {changes}.")
    return runner


def build_datasets(cfg: Config) -> None:
    """Build the data sets of training and validation once, which download what they can.

    Raises:
        SettingError: If data are missing.
    """
    check_data_roots(cfg)
    for stage in ("train", "val"):
        if loader := cfg.get(f"{stage}_dataloader"):
            with _data_of(stage):
                DATASETS.build(loader.dataset)


def _with_data(runner: Runner, stage: str) -> BaseLoop | None:
    """Build a stage's loop, and with it the data set."""
    with _data_of(stage):
        return getattr(runner, f"{stage}_loop")


@contextmanager
def _data_of(stage: str) -> Iterator[None]:
    """Name the setting of a data set that finds its files wanting."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError) as error:
        raise SettingError(
            f"{stage}_dataloader.dataset",
            "data that its type can read",
            f"{type(error).__name__}: {error}",
        ) from error


def _check_optimizer(cfg: Config) -> None:
    """Name an unknown optimizer; MMEngine's own error is that None is not callable."""
    wrapper = (cfg.get("optim_wrapper") or {}).get("type")
    if isinstance(wrapper, str) and OPTIM_WRAPPERS.get(wrapper) is None:
        raise SettingError(
            "optim_wrapper.type",
            "a registered optimizer wrapper",
            repr(wrapper),
            nearest(wrapper, OPTIM_WRAPPERS.module_dict),
        )
    optimizer = (cfg.get("optim_wrapper") or {}).get("optimizer") or {}
    kind = optimizer.get("type")
    if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
        raise SettingError(
            "optim_wrapper.optimizer.type",
            "a registered optimizer",
            repr(kind),
            nearest(kind, OPTIMIZERS.module_dict),
        )
    if optimizer.get("fused") and not computes_fused(optimizer):
        raise SettingError(
            "optim_wrapper.optimizer.fused",
            f"False, since this torch has no fused {kind} on {get_device()}",
            True,
        )


def _check_hooks(cfg: Config) -> None:
    """Name a mistyped default hook or switch before the runner makes its work folder."""
    hooks = cfg.get("default_hooks") or {}
    for name, hook in hooks.items():
        if isinstance(hook, dict) and "type" not in hook:
            raise SettingError(
                f"default_hooks.{name}",
                "a hook with a type",
                dict(hook),
                nearest(name, {*hooks} - {name}),
            )
        if isinstance(hook, dict) and hook["type"] == "FastNetworksHook":
            HOOKS.build(hook)
