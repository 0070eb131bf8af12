"""The runner of a config, checked before any training time is spent."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import BaseLoop, Runner

from mskd_plugin.checks.batches import check_batches
from mskd_plugin.checks.data import check_data_roots
from mskd_plugin.checks.networks import check_normalized, check_teacher_weights
from mskd_plugin.checks.resumed import check_groups, check_initial_weights, check_resumed
from mskd_plugin.checks.schedule import check_epochs
from mskd_plugin.checks.settings import check_settings
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.loss_warmup import check_warmup_hook
from mskd_plugin.hooks.preflight import PreflightHook
from mskd_plugin.launch.config import state_preprocessor_once
from mskd_plugin.unwrapped import model_of


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a checked config, with its loops, its optimizer and its schedules.

    Raises:
        SettingError: If data are missing, the work folder cannot be one, a type of the config does
            not take its settings, or the checkpoint to continue from is another training's.
    """
    state_preprocessor_once(cfg)  # of one that `load_config` has not read
    check_data_roots(cfg)
    check_settings(cfg)
    with _settings_told():
        resumed = check_resumed(cfg)
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
        if not isinstance(runner, Runner):  # MMEngine's FlexibleRunner builds otherwise
            return runner
        model = model_of(runner)
        has_preflight = any(isinstance(hook, PreflightHook) for hook in runner.hooks)
        if has_preflight:
            check_teacher_weights(runner, model)  # before data are downloaded
        # The runner would build these when it starts, in the same order.
        if _with_data(runner, "train") is not None:
            check_epochs(runner, model)
            check_warmup_hook(runner, model)
            check_batches(runner.train_dataloader)
            if hasattr(model, "teacher") and not has_preflight:  # in a config of one's own
                check_normalized(runner, model)
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            check_groups(runner.optim_wrapper, resumed)
            runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
            runner.auto_scale_lr = None  # not twice
            if runner.param_schedulers is not None:
                runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
        for stage in ("val", "test"):
            _with_data(runner, stage)
    if resumed and resumed.changes:
        runner.logger.warning(f"The method is resumed with other settings: {resumed.changes}.")
    if resumed and resumed.restored:
        runner.logger.warning(
            "Resuming restores the checkpoint's optimizer and schedules. Without effect: "
            f"{resumed.restored}."
        )
    if resumed and resumed.lacking:
        runner.logger.warning(
            f"The checkpoint was saved without {resumed.lacking}: resuming is not exact."
        )
    check_initial_weights(runner)
    return runner


@contextmanager
def _settings_told() -> Iterator[None]:
    """Tell what a host raises for a config that it cannot build as one error, with its place."""
    try:
        yield
    except SettingError:
        raise
    except (
        AssertionError,
        AttributeError,
        ImportError,  # of a package that a visualizer needs, wandb for one
        KeyError,
        NotImplementedError,  # of a constructor of optimizers that needs another model
        OSError,
        TypeError,
        ValueError,
    ) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise SettingError(
            "the config",
            "types that are registered, with settings that they take",
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})",
        ) from error


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
