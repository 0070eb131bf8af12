"""Continuing a training, and leaving the checkpoints of others alone."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from mskd_plugin.errors import SettingError


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue a training.

    Args:
        cfg: The config.
        checkpoint: A checkpoint file, or ``"auto"`` for the newest in the work folder; without any
            there, training starts at the beginning, from the config's ``load_from`` if it has one.

    Raises:
        SettingError: If there is no such file.
    """
    cfg.resume = True
    if checkpoint == "auto":
        if cfg.get("load_from"):  # which the runner would resume from, whatever is in the folder
            newest = find_latest_checkpoint(cfg.work_dir)
            cfg.resume, cfg.load_from = newest is not None, newest or cfg.load_from
        return
    if not Path(checkpoint).is_file():
        raise SettingError("--resume", "a checkpoint", f"{checkpoint!r}, which is not there")
    cfg.load_from = checkpoint


def check_work_dir(cfg: Config) -> None:
    """Refuse to train into a folder that holds another run's checkpoints.

    Raises:
        SettingError: If there are checkpoints and the run does not resume from one of them.
    """
    folder, start = Path(cfg.work_dir), cfg.get("load_from")
    elsewhere = start and Path(start).resolve().parent != folder.resolve()
    if (not cfg.get("resume") or elsewhere) and (folder / "last_checkpoint").exists():
        raise SettingError(
            "--work-dir",
            "a folder without checkpoints, or --resume to continue from its own",
            f"{cfg.work_dir!r}, whose checkpoints would be overwritten",
        )
