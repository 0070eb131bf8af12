"""The demo: from an interrupted training to the table and the plot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
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


@pytest.fixture(scope="module")
def demo():
    return toy.tool("demo")


def write_scalars(work_dir, run, *entries):
    path = work_dir / run / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def step(epoch, seconds):
    return {"lr": 0.1, "loss": 2.0, "time": seconds, "epoch": epoch, "step": 7 * epoch}


def test_demo_reads_logs_of_interrupted_trainings(demo, tmp_path):
    write_scalars(
        *[tmp_path, "20260101_000000", {"teacher/accuracy/top1": 99.0, "step": 0}],
        *[step(1, 9.0), {"accuracy/top1": 30.0, "step": 2}, step(2, 1.0), step(3, 2.0)],
        {"accuracy/top1": 40.0, "step": 4},
    )
    write_scalars(
        *[tmp_path, "20260101_010000", step(3, 4.0), {"accuracy/top1": 50.0, "step": 4}],
        *[step(5, 8.0), {"accuracy/top1": 60.5, "step": 6}],
    )
    result = demo.read_result(tmp_path)
    assert result.curve == [(2, 30.0), (4, 50.0), (6, 60.5)]
    assert result.top1 == 60.5
    assert result.seconds_per_step == 3.0  # of 1, 2, 4, 8; the first epoch is left out


def test_demo_times_a_training_of_one_epoch(demo, tmp_path):
    write_scalars(tmp_path, "run", step(1, 9.0), {"accuracy/top1": 30.0, "step": 1})
    assert demo.read_result(tmp_path).seconds_per_step == 9.0


def test_demo_table(demo, tmp_path):
    def runs(*values):
        return [demo.Result([(2, 1.0), (4, top1)], time) for top1, time in values]

    results = {
        "student alone": runs((90.0, 0.1), (94.0, 0.3), (92.0, 0.2)),
        "KD": runs((95.0, 0.4), (95.0, 0.4), (95.0, 0.4)),
        "MSKD": runs((96.0, 0.5), (92.0, 0.7), (94.0, 0.9)),
    }
    (teacher,) = runs((97.5, 0.25))
    lines = demo.table(teacher, results).splitlines()
    assert lines[2:6] == [
        "| teacher (ResNet20, 1 seed) | 97.50 | 0.250 |",
        "| student alone | 92.00 ± 2.00 | 0.200 |",  # sqrt((4 + 4 + 0) / 2)
        "| KD | 95.00 ± 0.00 | 0.400 |",
        "| MSKD | 94.00 ± 2.00 | 0.700 |",
    ]
    assert lines[-1] == "Highest mean here: KD."  # also where MSKD is not
    single = {name: list_[:1] for name, list_ in results.items()}
    assert "| MSKD | 96.00 | 0.500 |" in demo.table(teacher, single)
    demo.plot(teacher, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_demo_wants_at_least_one(demo, tmp_path, option):
    with pytest.raises(SettingError, match=f"`{option}` to be a number above 0, but got 0"):
        demo.main(["--work-dir", str(tmp_path), option, "0"])


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


def test_demo_from_an_interrupted_training_to_the_table(demo, tmp_path, capsys, monkeypatch):
    options = [*OPTIONS, "train_cfg.max_epochs=2"]
    arguments = ["--work-dir", str(tmp_path), "--seeds", "2", "--jobs", "2"]

    run_epoch = EpochBasedTrainLoop.run_epoch

    def interrupted(loop):
        if loop.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(loop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EpochBasedTrainLoop, "run_epoch", interrupted)
        call("train", TEACHER, "--work-dir", tmp_path / demo.TEACHER, "--seed", "0")

    def use(popen):
        names = dict(PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=popen, **names))

    def popen(command, popen=subprocess.Popen, **settings):
        kind = popen if TEACHER in command else InThisProcess
        return kind(command, **settings)

    use(popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    demo.main([*arguments, "--cfg-options", *options])
    shown = capsys.readouterr().out

    resumed = sorted((tmp_path / demo.TEACHER).glob("*/vis_data"))[-1].parent
    assert {entry["epoch"] for entry in scalars_of(resumed) if "loss" in entry} == {2}
    assert "MSKD, seed 1: epoch 2, 0:00:00 left" in shown
    assert len(list(tmp_path.glob("*/finished"))) == 7
    table = (tmp_path / "results.md").read_text()
    assert table in shown
    rows = dict([cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:6])
    assert list(rows) == ["teacher (ResNet20, 1 seed)", "student alone", "KD", "MSKD"]
    for name, config in demo.STUDENTS.items():
        top1 = [accuracies(tmp_path / f"{config}_seed{seed}")[-1] for seed in range(2)]
        mean, deviation = sum(top1) / 2, abs(top1[0] - top1[1]) / math.sqrt(2)
        assert rows[name] == f"{mean:.2f} ± {deviation:.2f}"
        cfg = Config.fromfile(tmp_path / f"{config}_seed1" / f"{config}.py")
        assert cfg.randomness.seed == 1
        if name != "student alone":
            assert cfg.model.teacher_ckpt == str(tmp_path / demo.TEACHER / "epoch_2.pth")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_, **__):
        raise AssertionError("a finished training was run again")

    use(refuse)
    demo.main([*arguments, "--cfg-options", *options])
    again = capsys.readouterr().out
    assert again.count("reusing the finished training") == 7
    assert (tmp_path / "results.md").read_text() == table
    with pytest.raises(
        SettingError, match="`--cfg-options` to be those of the trainings in .*--fresh"
    ):
        demo.main(arguments)


def test_demo_shows_why_a_training_failed(demo, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: teacher: .*train.py.* ended with 2"):
        demo.main(["--work-dir", str(tmp_path), "--cfg-options", "optim_wrappr.x=1"])
    assert "error: Expected `--cfg-options` to be keys of" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/finished"))
