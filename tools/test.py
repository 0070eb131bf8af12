"""Evaluate the student of a config on its test data.

python tools/test.py configs/mskd_r34_r18_imagenet.py work_dirs/mskd_r34_r18_imagenet/epoch_100.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mskd_plugin.checkpoints.weights import check_source, load_weights, read_checkpoint
from mskd_plugin.checks.data import compare_classes, trained_classes
from mskd_plugin.cli import run_tool
from mskd_plugin.launch import (
    TESTING,
    TRAINING,
    add_common_options,
    build_runner,
    keep_student_only,
    load_config,
)
from mskd_plugin.unwrapped import model_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate the student of a config on its test data.",
        epilog="example: python tools/test.py configs/mskd_r34_r18_imagenet.py "
        "work_dirs/mskd_r34_r18_imagenet/epoch_100.pth",
    )
    add_common_options(parser)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint of the distillation, or the student's weights in any layout that "
        "--teacher reads",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Evaluate."""
    args = parse_args(argv)
    cfg = load_config(args, TESTING)
    check_source(args.checkpoint, "checkpoint")
    keep_student_only(cfg)
    for key in (*TRAINING, "param_scheduler", "val_dataloader", "val_cfg", "val_evaluator"):
        cfg.pop(key, None)
    cfg.load_from, cfg.resume = None, False
    # The runner writes its config into the work folder: not over that of the training.
    if (Path(cfg.work_dir) / Path(cfg.filename).name).exists():
        cfg.work_dir = str(Path(cfg.work_dir) / "test")
    runner = build_runner(cfg)
    load_weights(model_of(runner), args.checkpoint, setting="checkpoint")
    compare_classes(
        trained_classes(read_checkpoint(args.checkpoint, setting="checkpoint")),
        runner.test_dataloader.dataset,
        "test_dataloader.dataset",
        f"training of {args.checkpoint!r}",
    )
    runner.test()


if __name__ == "__main__":
    run_tool(main)
