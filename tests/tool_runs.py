"""What the tests of the tools share: calling them quickly on a few digits, and reading their
logs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import toy
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from mmpretrain.visualization import UniversalVisualizer

from mskd_plugin import launch

TOOLS, DEMO = toy.ROOT / "tools", toy.ROOT / "configs" / "demo"
TEACHER = str(DEMO / "teacher_resnet20_digits.py")
MSKD = str(DEMO / "mskd_resnet20_resnet8_digits.py")
OPTIONS = [
    "train_dataloader.dataset.indices=32",
    "train_dataloader.batch_size=16",
    "val_dataloader.dataset.indices=100",
    "test_dataloader.dataset.indices=100",
    "train_cfg.val_interval=1",
    "default_hooks.checkpoint.interval=1",
    "default_hooks.logger.interval=1",
]
TERMS = [f"distill.mskd_stage3.{term}" for term in ("sample_wise", "feature_wise")]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHON": sys.executable,
}


def parse(*argv):
    """Parse the options that training and testing share."""
    parser = argparse.ArgumentParser()
    launch.add_common_options(parser)
    return parser.parse_args(list(argv))


def load(*argv, config=MSKD):
    """Load a config with options of the command line."""
    return launch.load_config(parse(str(config), *argv))


def forget_runs():
    """Let mmengine begin anew; it names runs by the second, and would take two for one."""
    for kind in (MMLogger, MessageHub, Visualizer, UniversalVisualizer):
        kind._instance_dict.clear()


def wait_for_the_next_second():
    """Let the next run have a folder of its own; mmengine names them by the second."""
    time.sleep(1 - time.time() % 1)


def call(name, *argv, options=(), epochs=2):
    """Run a tool as its command line would."""
    forget_runs()
    given = [*OPTIONS, f"train_cfg.max_epochs={epochs}", *options]
    toy.tool(name).main([*map(str, argv), "--cfg-options", *given])


def scalars(work_dir):
    """Return the logged entries of a work folder, its runs one after the other."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def accuracies(work_dir):
    return [e["accuracy/top1"] for e in scalars(work_dir) if "accuracy/top1" in e]


def shell(script, *argv, **env):
    """Run a tool's shell script."""
    return subprocess.run(
        [str(TOOLS / script), *map(str, argv)],
        env={**ENVIRONMENT, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def scalars_of(run):
    return [json.loads(line) for line in (run / "vis_data/scalars.json").read_text().splitlines()]
