"""Time the training data of several configs side by side, per core.

python tools/benchmark_data.py configs/cifar100/student_resnet8x4.py --in-memory --images 20000

A batch is read by the data loader, on one thread, then prepared by the data preprocessor on the
training device. A core's share is the CPU time of this process and, with --workers, of the loader's
workers, which start anew each turn as they do each epoch. The configs take turns, so that a drift
of the machine meets all of them; every figure is also given relative to the first row of its batch
size.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS, MODELS

from mskd_plugin.checks.batches import check_batches
from mskd_plugin.checks.data import check_data_roots
from mskd_plugin.cli import run_tool
from mskd_plugin.config_parts import inner_dataset, type_name
from mskd_plugin.errors import SettingError, check_output
from mskd_plugin.files import write_json
from mskd_plugin.launch import TRAINING, Count, add_overrides, load_config
from mskd_plugin.measure import device_name, markdown_table, quartiles, synchronize
from mskd_plugin.switches import use_in_memory


@DATASETS.register_module()
class RandomImages(BaseDataset):
    """Random images held as mmpretrain's CIFAR data sets hold theirs.

    Args:
        count: Number of images.
        side: Their height and width.
        classes: Number of classes.
        pipeline: Transforms.
    """

    def __init__(self, count: int, side: int, classes: int, pipeline: list) -> None:
        self._description = (count, side, classes)
        super().__init__(ann_file="", pipeline=pipeline)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Draw the images."""
        count, side, classes = self._description
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (count, 3, side, side), np.uint8).transpose(0, 2, 3, 1)
        return [{"img": image, "gt_label": i % classes} for i, image in enumerate(images)]


class Subject:
    """The training data of one config.

    Args:
        name: Name in the table.
        cfg: The config.
        batch_size: Images of a batch.
        workers: Workers of the loader, unless the images are in memory.
    """

    def __init__(self, name: str, cfg: Config, batch_size: int, workers: int = 0) -> None:
        self.name, self.batch_size = name, batch_size
        loader = copy.deepcopy(cfg.train_dataloader)
        workers = 0 if loader.dataset.type == "InMemoryImages" else workers
        loader.update(batch_size=batch_size, num_workers=workers, persistent_workers=False)
        loader.drop_last = True  # every batch counts as a whole one
        loader.pop("prefetch_factor", None)
        init_default_scope(cfg.get("default_scope", "mmpretrain"))
        check_data_roots({"train_dataloader": loader})
        self.loader = Runner.build_dataloader(loader, seed=0)
        check_batches(self.loader)
        self.preprocessor = MODELS.build(cfg.model.data_preprocessor).to(get_device())
        self.batches = self._batches()
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def _batches(self) -> Generator[dict[str, Any], None, None]:
        while True:
            yield from self.loader

    def take(self, count: int) -> None:
        """Prepare ``count`` batches."""
        for _ in range(count):
            self.preprocessor(next(self.batches), True)
        if self.loader.num_workers:  # end the workers: only then is their time known
            self.batches.close()
            self.batches = self._batches()

    def timed(self, count: int) -> None:
        """Prepare ``count`` batches and note the seconds of each, by the clock and of the CPU."""
        synchronize()
        wall, cpu = time.perf_counter(), cpu_seconds()
        self.take(count)
        self.cpu.append((cpu_seconds() - cpu) / count)
        synchronize()
        self.wall.append((time.perf_counter() - wall) / count)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """Build the data of every config for every batch size."""
    configs = []
    for path in args.configs:
        options = {"cfg_options": args.cfg_options, "work_dir": None, "launcher": "none"}
        cfg = load_config(argparse.Namespace(config=path, **options), TRAINING[:1])
        if args.images:
            inner = inner_dataset(cfg.train_dataloader.dataset)
            drawn = {"count": args.images, "side": args.side, "pipeline": inner.pipeline}
            if any(type_name(step) == "LoadImageFromFile" for step in inner.pipeline):
                raise SettingError(
                    "--images",
                    f"left out with {path}, which reads its images from files",
                    args.images,
                )
            classes = cfg.model.data_preprocessor.get("num_classes") or 1
            inner.clear()
            inner.update(type="RandomImages", classes=classes, **drawn)
        configs.append((Path(path).stem, cfg))
        if args.in_memory:
            held = copy.deepcopy(cfg)
            use_in_memory(held)
            configs.append((f"{Path(path).stem}, in memory", held))
    sizes = args.batch_size or [configs[0][1].train_dataloader.batch_size]
    return [Subject(name, cfg, size, args.workers) for size in sizes for name, cfg in configs]


def report(subjects: list[Subject]) -> list[dict[str, Any]]:
    """Gather the figures, absolute and relative to the first subject of the same batch size."""
    rows = []
    for subject in subjects:
        first = next(s for s in subjects if s.batch_size == subject.batch_size)
        cpu, wall = statistics.median(subject.cpu), statistics.median(subject.wall)
        rows.append(
            {
                "config": subject.name,
                "batch size": subject.batch_size,
                "ms per batch": 1e3 * wall,
                "CPU ms per batch": 1e3 * cpu,
                "quartiles": quartiles(subject.cpu),
                "images per second and core": subject.batch_size / cpu,
                # Turn by turn: both saw the same state of the machine.
                "relative": statistics.median(a / b for a, b in zip(first.cpu, subject.cpu)),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the figures as a Markdown table."""
    columns = {
        "config": "{config}",
        "batch": "{batch size}",
        "ms per batch": "{ms per batch:.3f}",
        "CPU ms per batch (quartiles)": "{CPU ms per batch:.3f} "
        "({quartiles[0]:.3f} to {quartiles[1]:.3f})",
        "images/s per core": "{images per second and core:.0f}",
        "relative, by turns": "{relative:.1f}",
    }
    return f"{device_name()}\n\n{markdown_table(columns, rows)}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time the training data of several configs side by side, per core.",
        epilog="example: python tools/benchmark_data.py configs/cifar100/student_resnet8x4.py "
        "--in-memory --images 20000 --batch-size 64 256",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument(
        "--in-memory", action="store_true", help="each config a second time as by --in-memory"
    )
    parser.add_argument(
        "--images",
        action=Count,
        metavar="N",
        help="N random images in memory through the config's pipeline, in the place of its own",
    )
    parser.add_argument("--side", action=Count, default=32, help="side of --images (default: 32)")
    parser.add_argument(
        "--batch-size", action=Count, nargs="+", help="one or several (default: the first config's)"
    )
    parser.add_argument(
        "--workers", action=Count, least=0, default=0, help="of loaders with images not in memory"
    )
    parser.add_argument(  # at least two, to tell the spread
        "--turns", action=Count, least=2, default=9, help="timed turns (default: 9)"
    )
    parser.add_argument("--batches", action=Count, default=50, help="batches a turn (default: 50)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_overrides(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    if args.json:
        check_output("--json", args.json)
    torch.set_num_threads(1)
    subjects = subjects_of(args)
    for turn in range(args.turns + 1):
        for subject in subjects:
            subject.timed(args.batches) if turn else subject.take(args.batches)
    rows = report(subjects)
    print(markdown(rows))
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    run_tool(main)
