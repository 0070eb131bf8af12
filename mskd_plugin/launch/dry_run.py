"""A training up to its first step, to find out whether it can begin."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mskd_plugin.checkpoints.newest import newest_checkpoint
from mskd_plugin.errors import check_output
from mskd_plugin.hooks import MissedValidationHook, TeacherEvaluationHook
from mskd_plugin.launch.runner import build_runner


def dry_run(cfg: Config) -> None:
    """Check a training, take its first step, and leave nothing of it.

    All that a training does before its first step is done, the checkpoint to resume from included,
    but for whole evaluations. Then one batch of the training data goes through both networks, the
    backward pass and the optimizer, which also shows whether it fits into memory.

    Args:
        cfg: The config; its ``work_dir``, ``experiment_name``, ``visualizer`` and ``load_from`` are
            changed.

    Raises:
        SettingError: As the training itself.
    """
    check_output("--work-dir", Path(cfg.work_dir), folder=True)
    if cfg.get("resume") and not cfg.get("load_from"):
        cfg.load_from = newest_checkpoint(cfg.work_dir)  # before the folder is another
    if cfg.get("visualizer"):  # others may keep runs elsewhere
        cfg.visualizer.vis_backends = [{"type": "LocalVisBackend"}]
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        cfg.experiment_name = Path(folder).name  # by which mmengine tells runs of one second apart
        runner = build_runner(cfg)
        evaluating = (TeacherEvaluationHook, MissedValidationHook)
        runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, evaluating)]
        runner.register_hook(_StopHook())
        try:
            runner.train()
        except _FirstStepTaken:
            runner.logger.info("Dry run: the training can begin, its first step is taken.")


class _FirstStepTaken(Exception):
    """Leaves the training loop."""


class _StopHook(Hook):
    priority = "HIGHEST"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        raise _FirstStepTaken
