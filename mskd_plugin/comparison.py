"""Several trainings side by side: what they have in common, and what their logs say."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from mskd_plugin.errors import SettingError
from mskd_plugin.files import write_json

#: Where the trainings of a folder have noted what they have in common.
RECIPE = "recipe.json"
#: What the entries of a recipe begin with that are of the config, or of one method.
SETTINGS_OF = "the settings of "


@dataclass
class Result:
    """What a training's log says.

    Attributes:
        curve: (epoch, top-1 in percent) of each validation, in order.
        seconds_per_step: Median over the logged steps, the first epoch left out.
        teacher_top1: In percent; None where no teacher was evaluated.
    """

    curve: list[tuple[int, float]]
    seconds_per_step: float
    teacher_top1: float | None = None

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
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the machine stopped in the midst of it
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


def table(results: dict[str, list[Result]]) -> str:
    """Return the results as a Markdown table.

    Args:
        results: From each method to its trainings, one for each seed.
    """
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
    ends = sorted({run.curve[-1][0] for runs in results.values() for run in runs})
    epochs = f"epoch{'s' * (len(ends) > 1)} {', '.join(map(str, ends))}"
    lines += ["", f"Seeds 0 to {seeds - 1}, {epochs}, images of the validation data loader."]
    return "\n".join(lines)


def teacher_top1(results: dict[str, list[Result]]) -> float | None:
    """Return the teacher's top-1; None if no method has a teacher."""
    logged = (run.teacher_top1 for runs in results.values() for run in runs)
    return next((top1 for top1 in logged if top1 is not None), None)


def plot(results: dict[str, list[Result]], title: str, path: Path) -> None:
    """Draw the learning curves, where all seeds were validated, and the last accuracies.

    Args:
        results: See :func:`table`.
        title: Above the plot.
        path: The file to write; its suffix tells the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(5.0, 0.5 * len(results))
    figure, (curves, last) = plt.subplots(1, 2, figsize=(5 + width, 4), width_ratios=(5, width))
    for index, (name, runs) in enumerate(results.items()):
        color = f"C{index % 10}"
        style = ("-", ":", "-.")[index // 10 % 3]
        validated = [dict(run.curve) for run in runs]
        epochs = sorted(set.intersection(*map(set, validated)))
        values = [[curve[epoch] for curve in validated] for epoch in epochs]
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


def check_recipe(work_dir: Path, recipe: dict[str, object], fresh: bool = False) -> None:
    """Refuse to mix trainings of different recipes in one table, or to forget what is no training.

    A setting that was left open, None, may be made later. Methods that trained there before and are
    not asked for now may have any.

    Raises:
        SettingError: If the trainings in ``work_dir`` had other settings, unless they are to be
            forgotten, or it holds other things.
    """
    note = work_dir / RECIPE
    if fresh and work_dir.exists() and not note.exists():
        raise SettingError("--fresh", f"trainings of this tool, with {RECIPE}", f"{work_dir}/")
    if not note.exists() and work_dir.exists() and any(work_dir.iterdir()):
        raise SettingError(
            "--work-dir", "an empty or new folder, or one of this tool", f"{work_dir}/"
        )
    if fresh:
        return
    for name, noted in read_recipe(work_dir).items():
        of_other = name.startswith(SETTINGS_OF) and name not in recipe
        if noted is not None and not of_other and noted != recipe.get(name):
            before, now = (
                "none" if value in (None, []) else value for value in (noted, recipe.get(name))
            )
            raise SettingError(
                name,
                f"that of the trainings in {work_dir}, {before}",
                now,
                "--fresh forgets those trainings, --work-dir leaves them where they are.",
            )


def read_recipe(work_dir: Path) -> dict[str, object]:
    """Read what the trainings of a folder have in common, and the settings of each method there."""
    note = work_dir / RECIPE
    return json.loads(note.read_text()) if note.exists() else {}


def note_recipe(work_dir: Path, recipe: dict[str, object]) -> None:
    """Write a checked recipe beside the settings of the methods that trained there before."""
    write_json({**read_recipe(work_dir), **recipe}, work_dir / RECIPE)


def digest(content: bytes) -> str:
    """Return what tells contents apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_config(cfg: Config) -> str:
    """Return the digest of all settings, the defaults of methods among them."""
    return digest(repr(cfg.to_dict()).encode())


def digest_of_file(source: str | None) -> str | None:
    """Return the digest of a local file; None for an address, or a training to come."""
    file = Path(source or "").expanduser()
    return digest(file.read_bytes()) if file.is_file() else None
