"""Compare methods on one pair: train every one over several seeds with the same recipe.

python tools/compare.py configs/_base_/pairs/resnet32x4_resnet8x4_cifar100.py --teacher \
    resnet32x4.pth --methods student kd mskd crd

Every training is a run of ``tools/train.py`` in a folder of its own, with its log and checkpoints.
Ends with a table, a plot, and all accuracies as JSON. Finished trainings are kept and reused, so
that methods and seeds can be added; interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from mskd_plugin.checkpoints.weights import check_source
from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import CONFIG_SUFFIXES, add_common_options, add_switches, load_config

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("amp", "fast", "in_memory")
RECIPE = "recipe.json"
EPOCH_LINE = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (\S+)")


@dataclass
class Result:
    """What a training's log says."""

    curve: list[tuple[int, float]]  # (epoch, top-1 in percent) of each validation
    seconds_per_step: float
    teacher_top1: float | None = None  # of a distillation, which logs it before the training

    @property
    def top1(self) -> float:
        """Top-1 of the last epoch, in percent."""
        return self.curve[-1][1]


def read_result(work_dir: Path) -> Result:
    """Read validations and step times from a work folder's scalars, resumed parts included.

    Raises:
        SettingError: If no validation of the training logs top-1.
    """
    curve: dict[int, float] = {}
    times: list[tuple[int, float]] = []
    teacher_top1 = None
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            teacher_top1 = entry.get("teacher/accuracy/top1", teacher_top1)
            if "accuracy/top1" in entry:
                curve[entry["step"]] = entry["accuracy/top1"]
            elif "loss" in entry:
                times.append((entry["epoch"], entry["time"]))
    if not curve:
        raise SettingError(
            "val_evaluator", "one that logs accuracy/top1", f"none of it in {work_dir}"
        )
    # The first epoch warms up; where there is no other, better its times than none.
    later = [time for epoch, time in times if epoch > 1] or [time for _, time in times]
    return Result(sorted(curve.items()), statistics.median(later), teacher_top1)


def train(
    arguments: list[str], work_dir: Path, seed: int, label: str, environment: dict[str, str]
) -> Result:
    """Run one training, or reuse it if it has finished, and show its progress."""
    finished = work_dir / "finished"
    if finished.exists():
        print(f"{label:>22}: reusing the finished training in {work_dir}", flush=True)
        return read_result(work_dir)
    command = [
        *[sys.executable, str(ROOT / "tools" / "train.py"), *arguments],
        *["--work-dir", str(work_dir), "--seed", str(seed), "--resume"],
    ]
    work_dir.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    shown = 0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail, line][-30:]
            match = EPOCH_LINE.search(line)
            if match and int(match[1]) > shown and int(match[2]) * 2 > int(match[3]):
                shown = int(match[1])
                print(f"{label:>22}: epoch {shown}, {match[4]} left", flush=True)
    if process.returncode:
        errors = [line for line in tail if line.startswith("error: ")]
        sys.stderr.writelines(errors or tail)
        raise SystemExit(f"error: {label}: {' '.join(command)} ended with {process.returncode}")
    finished.touch()
    result = read_result(work_dir)
    print(f"{label:>22}: top-1 {result.top1:.2f}", flush=True)
    return result


def check_recipe(work_dir: Path, recipe: dict[str, object]) -> None:
    """Refuse to mix trainings of different recipes in one table.

    Raises:
        SettingError: If the trainings in ``work_dir`` had other settings.
    """
    note = work_dir / RECIPE
    for name, noted in json.loads(note.read_text()).items() if note.exists() else ():
        if noted != recipe[name]:
            raise SettingError(
                name,
                f"that of the trainings in {work_dir}, {noted or 'none'}",
                recipe[name] or "none",
                "--fresh forgets those trainings, --work-dir leaves them where they are.",
            )
    work_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(recipe, indent=2) + "\n")


def table(results: dict[str, list[Result]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | top-1, mean ± deviation (%) | each seed | seconds per step |",
        "| --- | --- | --- | --- |",
    ]
    if (teacher := teacher_top1(results)) is not None:
        lines.append(f"| teacher | {teacher:.2f} | | |")
    for name, runs in results.items():
        top1 = [run.top1 for run in runs]
        deviation = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in top1)
        step = statistics.median(run.seconds_per_step for run in runs)
        lines.append(f"| {name} | {statistics.mean(top1):.2f}{deviation} | {each} | {step:.3f} |")
    seeds = len(next(iter(results.values())))
    lines += ["", f"Seeds 0 to {seeds - 1}, last epoch, images of the validation data loader."]
    return "\n".join(lines)


def teacher_top1(results: dict[str, list[Result]]) -> float | None:
    """Return the teacher's top-1; None if no method has a teacher."""
    logged = (run.teacher_top1 for runs in results.values() for run in runs)
    return next((top1 for top1 in logged if top1 is not None), None)


def plot(results: dict[str, list[Result]], title: str, path: Path) -> None:
    """Draw the learning curves and the last epoch's accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(5.0, 0.5 * len(results))
    figure, (curves, last) = plt.subplots(1, 2, figsize=(5 + width, 4), width_ratios=(5, width))
    for index, (name, runs) in enumerate(results.items()):
        color = f"C{index % 10}"
        style = ("-", ":", "-.")[index // 10 % 3]
        epochs = [epoch for epoch, _ in runs[0].curve]
        values = list(zip(*[[top1 for _, top1 in run.curve] for run in runs]))
        means = [statistics.mean(v) for v in values]
        curves.plot(epochs, means, color=color, linestyle=style, label=name)
        curves.fill_between(
            epochs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2
        )
        top1 = [run.top1 for run in runs]
        last.scatter([index] * len(top1), top1, color=color, alpha=0.6)
        last.hlines(statistics.mean(top1), index - 0.25, index + 0.25, color=color)
    for axis in (curves, last):
        if (teacher := teacher_top1(results)) is not None:
            axis.axhline(teacher, color="grey", linestyle="--", label="teacher")
        axis.set_ylabel("top-1 (%)")
    curves.set_xlabel("epoch")
    curves.set_title("Mean and range over seeds")
    curves.legend(fontsize="small" if len(results) > 6 else None)
    last.set_xticks(range(len(results)), list(results), rotation=60 if len(results) > 6 else 0)
    last.set_title("Last epoch, each seed and the mean")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train methods on one pair over several seeds with the same recipe, and "
        "compare their accuracies.",
        epilog="example: python tools/compare.py configs/_base_/pairs/resnet20_resnet8_digits.py "
        "--teacher configs/demo/teacher_resnet20_digits.py --methods student kd mskd mskd+kd",
    )
    parser.add_argument("config", help="config of a pair, configs/_base_/pairs/*.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["student", "kd", "mskd"],
        metavar="METHOD",
        help="as tools/train.py's --method takes them (default: student kd mskd)",
    )
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        help="the teacher's weights, or the config of a teacher to train first, with seed 0 "
        "(default: the pair's published weights, where it has any)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="trainings per method, seeds 0 to SEEDS - 1 (default: 3)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, 4),
        help="trainings side by side, on the GPUs in turn (default: one per core, at most 4)",
    )
    parser.add_argument(
        "--work-dir", type=Path, help="folder of all (default: work_dirs/compare_<config's name>)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier trainings first")
    add_switches(parser)
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="passed to every training"
    )
    return parser.parse_args(argv)


def shared_options(args: argparse.Namespace) -> list[str]:
    """Return the options of ``tools/train.py`` that all trainings have in common."""
    switches = [f"--{name.replace('_', '-')}" for name in SWITCHES if getattr(args, name)]
    return [*switches, *(["--cfg-options", *args.cfg_options] if args.cfg_options else [])]


def is_config(teacher: str | None) -> bool:
    """Whether ``--teacher`` names a teacher to train, not its weights."""
    return teacher is not None and teacher.endswith(CONFIG_SUFFIXES)


def check(args: argparse.Namespace) -> None:
    """Read every config as its training will, before any of them starts.

    Raises:
        SettingError: If a setting is out of range, or a training would refuse one.
    """
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise SettingError(f"--{name}", "a number above 0", getattr(args, name))
    if len({*args.methods}) < len(args.methods):
        raise SettingError("--methods", "each method once", " ".join(args.methods))
    trainings = [[args.config, "--method", method] for method in args.methods]
    if is_config(args.teacher):
        trainings.append([args.teacher])
    elif args.teacher is not None:
        check_source(args.teacher, "--teacher")
    parser = argparse.ArgumentParser("compare.py")
    add_common_options(parser)
    add_switches(parser)
    for training in trainings:
        load_config(parser.parse_args([*training, *shared_options(args)]))


def forget(work_dir: Path) -> None:
    """Remove earlier trainings.

    Raises:
        SettingError: If the folder is not one of this tool.
    """
    if work_dir.exists() and not (work_dir / RECIPE).exists():
        raise SettingError("--fresh", f"trainings of this tool, with {RECIPE}", f"{work_dir}/")
    shutil.rmtree(work_dir, ignore_errors=True)


def environments(jobs: int) -> SimpleQueue[dict[str, str]]:
    """Return the environments of trainings side by side: one thread each, and the GPUs in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    queue: SimpleQueue[dict[str, str]] = SimpleQueue()
    for job in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {}
        queue.put({"OMP_NUM_THREADS": "1", **gpu})
    return queue


def main(argv: list[str] | None = None) -> None:
    """Train all, then print the table and draw the plot."""
    args = parse_args(argv)
    start = time.time()
    check(args)
    work_dir = args.work_dir or Path("work_dirs") / f"compare_{Path(args.config).stem}"
    if args.fresh:
        forget(work_dir)
    recipe = {f"--{name.replace('_', '-')}": getattr(args, name) for name in SWITCHES}
    recipe |= {"config": args.config, "--teacher": args.teacher, "--cfg-options": args.cfg_options}
    check_recipe(work_dir, recipe)
    options = shared_options(args)
    teacher = args.teacher
    if is_config(teacher):
        print("The teacher")
        folder, environment = work_dir / "teacher", {"OMP_NUM_THREADS": str(args.jobs)}
        train([teacher, *options], folder, 0, "teacher", environment)
        teacher = (folder / "last_checkpoint").read_text().strip()
    free = environments(args.jobs)

    def run(job: tuple[int, str]) -> Result:
        seed, method = job
        arguments = [args.config, "--method", method, *options]
        if teacher is not None and method not in ("student", "teacher"):
            arguments += ["--teacher", teacher]
        environment = free.get()
        try:
            folder = work_dir / f"{method}_seed{seed}"
            return train(arguments, folder, seed, f"{method}, seed {seed}", environment)
        finally:
            free.put(environment)

    jobs = [(seed, method) for seed in range(args.seeds) for method in args.methods]
    print(f"{len(jobs)} trainings, {args.jobs} at a time")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {job: pool.submit(run, job) for job in jobs}
        try:
            runs = {job: future.result() for job, future in futures.items()}
        except KeyboardInterrupt:  # a training that fails lets the others finish, this does not
            pool.shutdown(cancel_futures=True)
            raise
    results = {name: [runs[seed, name] for seed in range(args.seeds)] for name in args.methods}

    text = table(results)
    (work_dir / "results.md").write_text(text + "\n")
    top1 = {name: [run.top1 for run in runs] for name, runs in results.items()}
    (work_dir / "results.json").write_text(json.dumps(top1, indent=2) + "\n")
    plot(results, Path(args.config).stem, work_dir / "results.png")
    print(f"\n{text}\n\nAlso in {work_dir}: results.md, results.json, results.png")
    print(f"Took {time.time() - start:.0f} s.")


if __name__ == "__main__":
    run_tool(main)
