"""Comparing methods: from an interrupted teacher to the table and the plot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop
from tool_runs import (
    OPTIONS,
    TEACHER,
    TOOLS,
    accuracies,
    call,
    forget_runs,
    scalars_of,
)

from mskd_plugin.errors import SettingError

PAIR = str(toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py")


@pytest.fixture(scope="module")
def compare():
    return toy.tool("compare")


def write_scalars(work_dir, run, *entries):
    path = work_dir / run / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def step(epoch, seconds):
    return {"lr": 0.1, "loss": 2.0, "time": seconds, "epoch": epoch, "step": 7 * epoch}


def test_logs_of_interrupted_trainings(compare, tmp_path):
    write_scalars(
        *[tmp_path, "20260101_000000", {"teacher/accuracy/top1": 99.0, "step": 0}],
        *[step(1, 9.0), {"accuracy/top1": 30.0, "step": 2}, step(2, 1.0), step(3, 2.0)],
        {"accuracy/top1": 40.0, "step": 4},
    )
    write_scalars(
        *[tmp_path, "20260101_010000", step(3, 4.0), {"accuracy/top1": 50.0, "step": 4}],
        *[step(5, 8.0), {"accuracy/top1": 60.5, "step": 6}],
    )
    result = compare.read_result(tmp_path)
    assert result.curve == [(2, 30.0), (4, 50.0), (6, 60.5)]
    assert result.top1 == 60.5 and result.teacher_top1 == 99.0
    assert result.seconds_per_step == 3.0  # of 1, 2, 4, 8; the first epoch is left out


def test_a_training_of_one_epoch(compare, tmp_path):
    write_scalars(tmp_path, "run", step(1, 9.0), {"accuracy/top1": 30.0, "step": 1})
    result = compare.read_result(tmp_path)
    assert result.seconds_per_step == 9.0 and result.teacher_top1 is None


def test_a_training_that_logs_no_accuracy(compare, tmp_path):
    write_scalars(tmp_path, "run", step(1, 9.0), {"single-label/f1-score": 30.0, "step": 1})
    with pytest.raises(SettingError, match="`val_evaluator` to be one that logs accuracy/top1"):
        compare.read_result(tmp_path)


def test_table_and_plot(compare, tmp_path):
    def runs(*values, teacher=97.5):
        return [compare.Result([(2, 1.0), (4, top1)], time, teacher) for top1, time in values]

    results = {
        "student": runs((90.0, 0.1), (94.0, 0.3), (92.0, 0.2), teacher=None),
        "kd": runs((95.0, 0.4), (95.0, 0.4), (95.0, 0.4)),
        "mskd+kd": runs((96.0, 0.5), (92.0, 0.7), (94.0, 0.9)),
    }
    lines = compare.table(results).splitlines()
    assert lines[2:6] == [
        "| teacher | 97.50 | | |",
        "| student | 92.00 ± 2.00 | 90.00, 94.00, 92.00 | 0.200 |",  # sqrt((4 + 4 + 0) / 2)
        "| kd | 95.00 ± 0.00 | 95.00, 95.00, 95.00 | 0.400 |",
        "| mskd+kd | 94.00 ± 2.00 | 96.00, 92.00, 94.00 | 0.700 |",
    ]
    assert lines[-1].startswith("Seeds 0 to 2, last epoch")
    single = {name: list_[:1] for name, list_ in results.items()}
    assert "| mskd+kd | 96.00 | 96.00 | 0.500 |" in compare.table(single)
    assert "teacher" not in compare.table({"student": results["student"]})
    many = {f"{name} {i}": list_ for name, list_ in results.items() for i in range(9)}
    for number, shown in enumerate((results, many, {"student": results["student"]})):
        path = tmp_path / f"{number}.png"
        compare.plot(shown, "a pair", path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "`--seeds` to be a number above 0, but got 0"),
        (["--jobs", "-1"], "`--jobs` to be a number above 0, but got -1"),
        (["--methods", "kd", "mskd", "kd"], "`--methods` to be each method once"),
        (["--methods", "kd", "mksd"], "`--method` to be .*'mksd'.*Did you mean 'mskd'"),
        (["--teacher", "no/such.pth"], "`--teacher`.*no/such.pth"),
        (["--teacher", "no/such.py"], "`config` to be a config file.*no/such.py"),
        (["--cfg-options", "optim_wrappr.x=1"], "`--cfg-options` to be keys of"),
        (["--fresh"], "`--fresh` to be trainings of this tool"),
    ],
)
def test_what_no_training_would_take_is_refused_first(compare, tmp_path, options, message):
    kept = tmp_path / "of somebody else"
    kept.touch()
    with pytest.raises(SettingError, match=message):
        compare.main([PAIR, "--work-dir", str(tmp_path), *options])
    assert list(tmp_path.iterdir()) == [kept]


def test_gpus_are_taken_in_turn(compare, monkeypatch):
    def gpus(jobs):
        queue = compare.environments(jobs)
        taken = [queue.get_nowait() for _ in range(jobs)]
        assert queue.empty() and {environment["OMP_NUM_THREADS"] for environment in taken} == {"1"}
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in taken]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus(2) == [None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus(5) == ["0", "1", "0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert gpus(3) == ["3", "GPU-7", "3"]


class InThisProcess:
    """Stands in for ``Popen`` where the command is a training: everything is imported here."""

    one_at_a_time = threading.Lock()

    def __init__(self, command, **_):
        assert command[:2] == [sys.executable, str(TOOLS / "train.py")]
        with self.one_at_a_time:
            forget_runs()
            toy.tool("train").main(command[2:])
        folder = Path(command[command.index("--work-dir") + 1])
        self.stdout = next(folder.glob("*/*.log")).read_text().splitlines(keepends=True)
        self.returncode = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_from_an_interrupted_teacher_to_the_table(compare, tmp_path, capsys, monkeypatch):
    options = ["--cfg-options", *OPTIONS, "train_cfg.max_epochs=2"]
    methods = ["student", "kd", "mskd"]
    arguments = [PAIR, "--teacher", TEACHER, "--work-dir", str(tmp_path), "--amp"]
    arguments += ["--seeds", "2", "--jobs", "2"]

    run_epoch = EpochBasedTrainLoop.run_epoch

    def interrupted(loop):
        if loop.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(loop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EpochBasedTrainLoop, "run_epoch", interrupted)
        call("train", TEACHER, "--amp", "--work-dir", tmp_path / "teacher", "--seed", "0")

    def use(popen):
        names = dict(PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=popen, **names))

    def popen(command, popen=subprocess.Popen, **settings):
        kind = popen if TEACHER in command else InThisProcess
        return kind(command, **settings)

    use(popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    compare.main([*arguments, *options])
    shown = capsys.readouterr().out

    resumed = sorted((tmp_path / "teacher").glob("*/vis_data"))[-1].parent
    assert {entry["epoch"] for entry in scalars_of(resumed) if "loss" in entry} == {2}
    assert "mskd, seed 1: epoch 2, 0:00:00 left" in shown
    assert len(list(tmp_path.glob("*/finished"))) == 7
    table = (tmp_path / "results.md").read_text()
    assert table in shown
    rows = dict([cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:6])
    assert list(rows) == ["teacher", *methods]
    assert rows["teacher"] == f"{accuracies(tmp_path / 'teacher')[-1]:.2f}"
    noted = json.loads((tmp_path / "results.json").read_text())
    assert list(noted) == methods
    for method in methods:
        top1 = [accuracies(tmp_path / f"{method}_seed{seed}")[-1] for seed in range(2)]
        mean, deviation = sum(top1) / 2, abs(top1[0] - top1[1]) / math.sqrt(2)
        assert rows[method] == f"{mean:.2f} ± {deviation:.2f}"
        assert noted[method] == top1
        (dumped,) = (tmp_path / f"{method}_seed1").glob("*.py")
        cfg = Config.fromfile(dumped)
        assert cfg.randomness.seed == 1 and cfg.optim_wrapper.type != "OptimWrapper"
        if method != "student":
            assert cfg.model.teacher_ckpt == str(tmp_path / "teacher" / "epoch_2.pth")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    commands = []

    def note(command, **settings):
        commands.append(command)
        return popen(command, **settings)

    use(note)
    compare.main([*arguments, "--methods", "mskd", "fitnet", *options])
    again = capsys.readouterr().out
    assert again.count("reusing the finished training") == 3  # the teacher and MSKD's
    assert [command[command.index("--method") + 1] for command in commands] == ["fitnet"] * 2
    added = json.loads((tmp_path / "results.json").read_text())
    assert added["mskd"] == noted["mskd"] and list(added) == ["mskd", "fitnet"]

    with pytest.raises(
        SettingError, match="`--cfg-options` to be that of the trainings in .*--fresh"
    ):
        compare.main(arguments)
    with pytest.raises(SettingError, match="`--amp` to be that of the trainings in .*True"):
        compare.main([*[a for a in arguments if a != "--amp"], *options])

    def refuse(*_, **__):
        raise AssertionError("begins anew")

    use(refuse)
    with pytest.raises(AssertionError, match="begins anew"):
        compare.main([*arguments, "--fresh", *options])
    assert not (tmp_path / "mskd_seed0").exists()


def test_a_training_that_fails_says_why_and_lets_the_others_finish(
    compare, tmp_path, capsys, monkeypatch
):
    class Fails(InThisProcess):
        def __init__(self, command, **_):
            self.returncode = 2 * ("1" == command[command.index("--seed") + 1])
            self.stdout = ["a line\n", "error: Expected `it` to work\n"]
            write_scalars(
                Path(command[command.index("--work-dir") + 1]),
                *["run", step(1, 1.0), {"accuracy/top1": 50.0, "step": 1}],
            )

    monkeypatch.setattr(subprocess, "Popen", Fails)
    arguments = [PAIR, "--methods", "student", "--seeds", "4", "--work-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: student, seed 1: .*train.py.* ended with 2"):
        compare.main([*arguments, "--jobs", "1"])
    assert capsys.readouterr().err == "error: Expected `it` to work\n"
    finished = {path.parent.name for path in tmp_path.glob("*/finished")}
    assert finished == {"student_seed0", "student_seed2", "student_seed3"}


def test_an_interruption_starts_no_other_training(compare, tmp_path, monkeypatch):
    started = []

    def interrupted(arguments, work_dir, *_):
        started.append(work_dir.name)
        if len(started) == 1:
            raise KeyboardInterrupt
        time.sleep(0.05)

    monkeypatch.setattr(compare, "train", interrupted)
    arguments = [PAIR, "--work-dir", str(tmp_path), "--methods", "student", "--seeds", "40"]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*arguments, "--jobs", "1"])
    assert started[0] == "student_seed0" and len(started) < 10
