"""Distil on handwritten digits: a teacher, then students alone, with KD and with MSKD.

python tools/demo.py

Every training is a run of ``tools/train.py`` on a config of ``configs/demo/``. Ends with a table
and a plot in ``work_dirs/demo/``. Finished trainings are kept and reused; an interrupted one is
resumed.
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

from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "demo"
TEACHER = "teacher_resnet20_digits"
STUDENTS = {
    "student alone": "student_resnet8_digits",
    "KD": "kd_resnet20_resnet8_digits",
    "MSKD": "mskd_resnet20_resnet8_digits",
}
EPOCH_LINE = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (\S+)")


@dataclass
class Result:
    """What a training's log says."""

    curve: list[tuple[int, float]]  # (epoch, top-1 in percent) of each validation
    seconds_per_step: float

    @property
    def top1(self) -> float:
        """Top-1 of the last epoch, in percent."""
        return self.curve[-1][1]


def read_result(work_dir: Path) -> Result:
    """Read validations and step times from a work folder's scalars, resumed parts included."""
    curve: dict[int, float] = {}
    times: list[tuple[int, float]] = []
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if "accuracy/top1" in entry:
                curve[entry["step"]] = entry["accuracy/top1"]
            elif "loss" in entry:
                times.append((entry["epoch"], entry["time"]))
    # The first epoch warms up; where there is no other, better its times than none.
    later = [time for epoch, time in times if epoch > 1] or [time for _, time in times]
    return Result(sorted(curve.items()), statistics.median(later))


def train(
    config: str, work_dir: Path, seed: int, label: str, options: list[str], threads: int = 1
) -> Result:
    """Run one training, or reuse it if it has finished, and show its progress."""
    finished = work_dir / "finished"
    if finished.exists():
        print(f"{label:>22}: reusing the finished training in {work_dir}", flush=True)
        return read_result(work_dir)
    command = [
        *[sys.executable, str(ROOT / "tools" / "train.py"), str(CONFIGS / f"{config}.py")],
        *["--work-dir", str(work_dir), "--seed", str(seed), "--resume", *options],
    ]
    work_dir.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    shown = 0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
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


def check_options(work_dir: Path, options: list[str]) -> None:
    """Refuse to mix trainings of different settings in one table.

    Raises:
        SettingError: If the trainings in ``work_dir`` had other options.
    """
    note = work_dir / "cfg_options.json"
    if note.exists() and (noted := json.loads(note.read_text())) != options:
        raise SettingError(
            "--cfg-options",
            f"those of the trainings in {work_dir}, {' '.join(noted) or 'none'}",
            " ".join(options) or "none",
            "--fresh forgets those trainings, --work-dir leaves them where they are.",
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(options))


def table(teacher: Result, results: dict[str, list[Result]]) -> str:
    """Return the results as a Markdown table."""
    seeds = len(next(iter(results.values())))
    lines = [
        "| method | top-1, mean ± deviation (%) | seconds per step |",
        "| --- | --- | --- |",
        f"| teacher (ResNet20, 1 seed) | {teacher.top1:.2f} | {teacher.seconds_per_step:.3f} |",
    ]
    for name, runs in results.items():
        top1 = [run.top1 for run in runs]
        deviation = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        step = statistics.median(run.seconds_per_step for run in runs)
        lines.append(f"| {name} | {statistics.mean(top1):.2f}{deviation} | {step:.3f} |")
    lines += [
        "",
        f"Student ResNet8, seeds 0 to {seeds - 1}, last epoch; 599 test images of other writers "
        "than the 1198 training images.",
    ]
    means = {
        name: round(statistics.mean(r.top1 for r in runs), 2) for name, runs in results.items()
    }
    best = [name for name, mean in means.items() if mean == max(means.values())]
    lines.append(f"Highest mean here: {' and '.join(best)}.")
    return "\n".join(lines)


def plot(teacher: Result, results: dict[str, list[Result]], path: Path) -> None:
    """Draw the learning curves and the last epoch's accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, last) = plt.subplots(1, 2, figsize=(10, 4))
    for index, (name, runs) in enumerate(results.items()):
        color = f"C{index}"
        epochs = [epoch for epoch, _ in runs[0].curve]
        values = list(zip(*[[top1 for _, top1 in run.curve] for run in runs]))
        curves.plot(epochs, [statistics.mean(v) for v in values], color=color, label=name)
        curves.fill_between(
            epochs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2
        )
        top1 = [run.top1 for run in runs]
        last.scatter([index] * len(top1), top1, color=color, alpha=0.6)
        last.hlines(statistics.mean(top1), index - 0.25, index + 0.25, color=color)
    for axis in (curves, last):
        axis.axhline(teacher.top1, color="grey", linestyle="--", label="teacher")
        axis.set_ylabel("top-1 (%)")
    curves.set_xlabel("epoch")
    curves.set_title("Mean and range over seeds")
    curves.legend()
    last.set_xticks(range(len(results)), list(results))
    last.set_title("Last epoch, each seed and the mean")
    figure.suptitle("ResNet20 to ResNet8, scikit-learn digits")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Distil on scikit-learn's handwritten digits and compare with KD and with no "
        "teacher.",
        epilog="example: python tools/demo.py --seeds 5",
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "demo")
    parser.add_argument("--seeds", type=int, default=3, help="students per method (default: 3)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, 4),
        help="trainings side by side (default: one per core, at most 4)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier trainings first")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="passed to every training"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train all, then print the table and draw the plot."""
    args = parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise SettingError(f"--{name}", "a number above 0", getattr(args, name))
    start = time.time()
    if args.fresh:
        shutil.rmtree(args.work_dir, ignore_errors=True)
    check_options(args.work_dir, args.cfg_options)
    options = ["--cfg-options", *args.cfg_options] if args.cfg_options else []
    teacher_dir = args.work_dir / TEACHER
    print(f"1/2 The teacher, then 2/2 {args.seeds * len(STUDENTS)} students, {args.jobs} at a time")
    teacher = train(TEACHER, teacher_dir, 0, "teacher", options, threads=args.jobs)
    checkpoint = (teacher_dir / "last_checkpoint").read_text().strip()

    def run(job: tuple[int, str]) -> Result:
        seed, name = job
        config = STUDENTS[name]
        use_teacher = [] if name == "student alone" else ["--teacher", checkpoint]
        folder = args.work_dir / f"{config}_seed{seed}"
        return train(config, folder, seed, f"{name}, seed {seed}", [*use_teacher, *options])

    jobs = [(seed, name) for seed in range(args.seeds) for name in STUDENTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(jobs, pool.map(run, jobs)))
    results = {name: [runs[seed, name] for seed in range(args.seeds)] for name in STUDENTS}

    text = table(teacher, results)
    (args.work_dir / "results.md").write_text(text + "\n")
    plot(teacher, results, args.work_dir / "results.png")
    print(f"\n{text}\n\nTable and plot: {args.work_dir}/results.md, {args.work_dir}/results.png")
    print(f"Took {time.time() - start:.0f} s.")


if __name__ == "__main__":
    run_tool(main)
