"""Time the training steps of several configs side by side.

python tools/benchmark_step.py configs/cifar100/kd_resnet32x4_resnet8x4.py \
    configs/cifar100/mskd_resnet32x4_resnet8x4.py --amp

The configs take turns, step by step in one process, so that a drift of the machine meets all of
them; every figure is also given relative to the first config. Teachers get random weights: time
does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import RuntimeInfoHook
from mmengine.optim import OptimWrapper
from mmengine.registry import FUNCTIONS
from mmpretrain.structures import DataSample
from torch.utils.flop_counter import FlopCounterMode

from mskd_plugin.algorithms import TwoPhaseDistill
from mskd_plugin.cli import run_tool
from mskd_plugin.errors import check_output
from mskd_plugin.files import write_json
from mskd_plugin.hooks import DeferredRuntimeInfoHook, FastNetworksHook
from mskd_plugin.hooks.deferred_log import DeferringMessageHub
from mskd_plugin.launch import TRAINING, Count, add_overrides, build_runner, image_side, load_config
from mskd_plugin.measure import (
    by_turns,
    device_name,
    markdown_table,
    matrix_rate,
    peak_memory,
    quartiles,
    synchronize,
)
from mskd_plugin.switches import use_mixed_precision
from mskd_plugin.unwrapped import model_of

#: Parts of a step, "step" being the optimizer's. The rest is what lies between them.
FORWARDS = ("teacher forward", "student forward", "connectors and losses")
WATCHED = ("data", *FORWARDS, "backward", "step")
PARTS = (*WATCHED, "rest")


class Subject:
    """One config, ready to take steps.

    Args:
        name: Its file.
        args: The command line.
        fast: Whether every switch of ``configs/_base_/fast.py`` is set.
    """

    def __init__(self, name: str, args: argparse.Namespace, fast: bool = False) -> None:
        self.name = f"{Path(name).stem}{', fast' if fast else ''}"
        cfg = config_of(name, args, fast)
        # mmengine takes runs of one name that begin in the same second for one, with one log.
        cfg.experiment_name = self.name
        self.batch_size = args.batch_size or cfg.train_dataloader.batch_size
        cfg.train_dataloader.batch_size = self.batch_size
        collate = cfg.train_dataloader.get("collate_fn", {}).get("type", "pseudo_collate")
        side = args.side or image_side(cfg.train_dataloader)
        if args.real:
            cfg.train_dataloader.drop_last = True  # every batch counts as a whole one
        else:
            for key in ("train", "val", "test"):
                for part in ("dataloader", "cfg", "evaluator"):
                    cfg.pop(f"{key}_{part}", None)
            wrapper, cfg.optim_wrapper, cfg.param_scheduler = cfg.optim_wrapper, None, None
        self.runner = runner = build_runner(cfg)
        self.model: Any = runner.model  # whose methods nn.Module does not know
        self.inner = model_of(runner)
        self.student = getattr(self.inner, "architecture", self.inner)
        if args.real:
            self.batches = self._real()
        else:
            runner.optim_wrapper = runner.build_optim_wrapper(wrapper)
            self.batches = self._synthetic(side, collate)
        self.wrapper: OptimWrapper = runner.optim_wrapper
        if isinstance(self.inner, TwoPhaseDistill):
            self.inner.enter_phase(args.phase)
        self.model.train()
        self.log: Any = None
        self.networks: list[FastNetworksHook] = []
        self._begin()
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)

    def _begin(self) -> None:
        """Let the hooks that have a part in each step begin it; compilation comes last."""
        networks = [hook for hook in self.runner.hooks if isinstance(hook, FastNetworksHook)]
        self.flops = self._count_operations()
        for hook in networks:
            hook.before_train(self.runner)
            hook.before_train_epoch(self.runner)
        self.networks = networks
        for hook in self.runner.hooks:
            if isinstance(hook, RuntimeInfoHook):
                self.log = hook
                if isinstance(hook, DeferredRuntimeInfoHook):
                    DeferringMessageHub.adopt(self.runner.message_hub)

    def _synthetic(self, side: int | None, collate: str) -> Iterator[dict[str, Any]]:
        """Give one batch, as the config's loader joins it, again and again from the model's
        device.
        """
        classes = self.student.head.num_classes
        side = side or (224 if classes == 1000 else 32)
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, side, side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        samples = [
            DataSample(metainfo={"sample_idx": i}).set_gt_label(i % classes)
            for i in range(self.batch_size)
        ]
        items = [
            {"inputs": image, "data_samples": sample} for image, sample in zip(images, samples)
        ]
        batch = FUNCTIONS.get(collate)(items)
        batch = self.inner.data_preprocessor.cast_data(batch)
        batch["inputs"] = images.to(next(self.model.parameters()).device)
        while True:
            yield dict(batch)

    def _real(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.runner.train_dataloader

    def step(self) -> None:
        """Take one training step, and log its losses as the runner does."""
        logged = self._train_step(next(self.batches))
        if self.log is not None:
            self.log.after_train_iter(self.runner, 0, outputs=logged)

    def _train_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        for hook in self.networks:
            hook.before_train_iter(self.runner, 0)
        return self.model.train_step(batch, optim_wrapper=self.wrapper)

    def dissected_step(self) -> None:
        """Take a step and note the time of each part; the device waits at every border."""
        inner, wrapper = self.inner, self.wrapper
        student = self.student if hasattr(inner, "distiller") else inner.backbone
        watched: list[tuple[str, Any, str]] = [
            ("student forward", student, "forward"),
            ("backward", wrapper, "backward"),
            ("step", wrapper, "step"),
        ]
        if hasattr(inner, "distiller"):
            watched += [
                ("teacher forward", inner.teacher, "forward"),
                ("connectors and losses", inner.distiller, "compute_distill_losses"),
            ]
        spent: dict[str, float] = defaultdict(float)
        with stopwatch(spent, watched):
            start = time.perf_counter()
            batch = next(self.batches)
            spent["data"] = time.perf_counter() - start
            self._train_step(batch)
            synchronize()
            spent["rest"] = time.perf_counter() - start - sum(spent[part] for part in WATCHED)
        for part in PARTS:
            self.parts[part].append(spent[part])

    def peak_memory(self) -> float | None:
        """Measure a step's peak memory, in MiB; that of CUDA graphs passes the allocator by."""
        if any(hook.cuda_graphs for hook in self.networks):
            return None
        return peak_memory(self.step)

    def _count_operations(self) -> int:
        """Count the floating point operations of one step, of networks not compiled yet."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return int(counter.get_total_flops())


def config_of(name: str, args: argparse.Namespace, fast: bool) -> Config:
    """Read a config as training would, with a teacher of random weights."""
    launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    given = {**vars(args), "config": name, "launcher": launcher, "fast": fast}
    cfg = load_config(argparse.Namespace(**given), TRAINING)
    cfg.log_level = "ERROR"
    if "teacher_ckpt" in cfg.model:
        cfg.model.teacher_ckpt = None  # which the preflight would refuse
        hooks = cfg.get("custom_hooks") or []
        cfg.custom_hooks = [h for h in hooks if h.get("type") != "PreflightHook"]
    if args.amp:
        use_mixed_precision(cfg)
    return cfg


@contextmanager
def stopwatch(spent: dict[str, float], watched: list[tuple[str, Any, str]]) -> Iterator[None]:
    """Add the time of the watched methods to ``spent``."""

    def watch(part: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                synchronize()
                spent[part] += time.perf_counter() - start

        return timed

    # A compiled backbone has a `forward` of its own, which has to come back.
    own = [(owner, name, vars(owner).get(name)) for _, owner, name in watched]
    for part, owner, name in watched:
        setattr(owner, name, watch(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, method in own:
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def report(
    subjects: list[Subject], memory: list[float | None], rate: float
) -> list[dict[str, Any]]:
    """Gather the figures of every subject, absolute and relative to the first."""
    rows: list[dict[str, Any]] = []
    for subject, peak in zip(subjects, memory):
        median = statistics.median(subject.seconds)
        parts = {part: 1e3 * statistics.median(subject.parts[part]) for part in PARTS}
        of_first = rows[0]["parts (ms)"] if rows else parts
        flops = subject.flops
        rows.append(
            {
                "config": subject.name,
                "batch size": subject.batch_size,
                "processes": get_world_size(),
                "ms per step": 1e3 * median,
                "quartiles": quartiles(subject.seconds),
                "images per second": subject.batch_size * get_world_size() / median,
                "relative time": median / statistics.median(subjects[0].seconds),
                # Pair by pair: the steps of one turn saw the same state of the machine.
                "relative time by turns": statistics.median(
                    a / b for a, b in zip(subject.seconds, subjects[0].seconds)
                ),
                "peak memory (MiB)": peak,
                "relative memory": peak / memory[0] if peak and memory[0] else None,
                "GFLOP per image": flops / subject.batch_size / 1e9,
                "share of matrix rate": flops / median / rate,
                "parts (ms)": parts,
                "parts, share of the step": {
                    part: time / sum(parts.values()) for part, time in parts.items()
                },
                "parts, relative": {
                    part: time / of_first[part] if of_first[part] else None
                    for part, time in parts.items()
                },
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], rate: float) -> str:
    """Format the figures as two Markdown tables."""
    rows = [dict(row) for row in rows]
    columns = {
        "config": "{config}",
        "batch": "{batch size} x {processes}",
        "ms per step (quartiles)": "{ms per step:.2f} ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
        "images/s": "{images per second:.0f}",
        "relative time, by turns": "{relative time:.3f}, {relative time by turns:.3f}",
        "peak MiB": "{peak}",
        "relative": "{relative}",
        "GFLOP/image": "{GFLOP per image:.3f}",
        "share of matrix rate": "{share of matrix rate:.1%}",
    }
    figures = "{{parts (ms)[{0}]:.2f}}, {{parts, share of the step[{0}]:.1%}}, {{{0}}}"
    parts = {"ms, share of the step, relative": "{config}"}
    parts |= {part: figures.format(part) for part in PARTS}
    for row in rows:
        peak, of_first = row["peak memory (MiB)"], row["relative memory"]
        row |= {"peak": _number(peak, ".0f"), "relative": _number(of_first, ".3f")}
    relative = [
        {part: _number(to, ".3f") for part, to in row["parts, relative"].items()} for row in rows
    ]
    return "\n\n".join(
        [
            f"{device_name()}, bfloat16 matrix rate {rate / 1e12:.3g} TFLOP/s",
            markdown_table(columns, rows),
            markdown_table(parts, [row | own for row, own in zip(rows, relative)]),
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time the training steps of several configs side by side.",
        epilog="example: python tools/benchmark_step.py configs/kd_r34_r18_imagenet.py "
        "configs/mskd_r34_r18_imagenet.py --amp --batch-size 256",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    add_overrides(parser)
    parser.add_argument(  # at least two, to tell the spread
        "--steps", action=Count, least=2, default=20, help="timed blocks of steps (default: 20)"
    )
    parser.add_argument(
        "--warmup", action=Count, least=0, default=3, help="blocks before them (default: 3)"
    )
    parser.add_argument("--batch-size", action=Count, help="default: each config's own")
    parser.add_argument(
        "--side", action=Count, help="of synthetic images (default: as the config crops its own)"
    )
    parser.add_argument("--real", action="store_true", help="the config's own training images")
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="with --real: small images on the training device, cropped and flipped by the batch",
    )
    parser.add_argument(
        "--phase", type=int, choices=(1, 2), default=1, help="of methods in two phases (default: 1)"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="each config a second time, with every switch of configs/_base_/fast.py",
    )
    parser.add_argument(
        "--block",
        action=Count,
        default=10 if torch.cuda.is_available() else 1,
        help="steps between two looks at the clock; in training nobody waits for a GPU after each "
        "step (default: 10 with a GPU, else 1)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    if args.json:
        check_output("--json", args.json)
    with tempfile.TemporaryDirectory() as args.work_dir:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Measure and print the configs of a checked command line."""
    # Networks of one class share their graphs' places, a few more than one training needs.
    torch._dynamo.config.cache_size_limit = 8 * len(args.configs)
    subjects = [
        Subject(config, args, fast)
        for fast in ((False, True) if args.fast else (False,))
        for config in args.configs
    ]

    def block(subject: Subject) -> Callable[[], None]:
        def run() -> None:
            for _ in range(args.block):
                subject.step()

        return run

    times = by_turns([block(subject) for subject in subjects], args.steps, args.warmup)
    for subject, seconds in zip(subjects, times):
        subject.seconds = [taken / args.block for taken in seconds]
    for _ in range(max(2, args.steps // 2)):
        for subject in subjects:
            subject.dissected_step()
    memory = [subject.peak_memory() for subject in subjects]
    rate = matrix_rate()
    rows = report(subjects, memory, rate)
    if is_main_process():
        print(markdown(rows, rate))
        if args.json:
            write_json(rows, args.json)


if __name__ == "__main__":
    run_tool(main)
