"""Train a config: a teacher, a student alone, or a distillation.

python tools/train.py configs/mskd_r34_r18_imagenet.py --amp
python tools/train.py configs/cifar100/mskd_resnet32x4_resnet8x4.py --teacher resnet32x4.pth
"""

from __future__ import annotations

import argparse

from mskd_plugin.cli import run_tool
from mskd_plugin.launch import (
    TRAINING,
    Count,
    add_common_options,
    add_switches,
    build_runner,
    check_work_dir,
    dry_run,
    load_config,
    set_resume,
    set_teacher,
    work_dir_held,
)
from mskd_plugin.switches import scale_learning_rate, use_mixed_precision


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a config: a teacher, a student alone, or a distillation.",
        epilog="example: python tools/train.py configs/cifar100/mskd_resnet32x4_resnet8x4.py "
        "--teacher resnet32x4.pth --amp --seed 0",
    )
    add_common_options(parser)
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        help="the teacher's weights: a file of mmpretrain, torchvision, the CRD benchmark or of "
        "this project, a URL, or torchvision://NAME",
    )
    add_switches(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue from CHECKPOINT, or from the newest one in the work folder",
    )
    parser.add_argument("--seed", action=Count, least=0, help="random seed (default: the config's)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate linearly from the config's base batch size to the real one",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, take the first step, and leave nothing of it",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)
    cfg = load_config(args, TRAINING)
    if args.teacher is not None:
        set_teacher(cfg, args.teacher)
    if args.amp:
        use_mixed_precision(cfg)
    if args.resume is not None:
        set_resume(cfg, args.resume)
    elif cfg.get("resume") and not cfg.get("load_from"):
        set_resume(cfg, "auto")
    if args.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": args.seed}
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    check_work_dir(cfg)
    if args.dry_run:
        dry_run(cfg)
    else:
        with work_dir_held(cfg):
            build_runner(cfg).train()


if __name__ == "__main__":
    run_tool(main)
