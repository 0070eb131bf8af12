"""Comparing methods: from an interrupted teacher to the table and the plot."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from comparison_logs import step, write_scalars
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import EpochBasedTrainLoop
from tool_runs import (
    DEMO,
    OPTIONS,
    TEACHER,
    TOOLS,
    accuracies,
    forget_runs,
    scalars_of,
)

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier

STUDENT = str(DEMO / "student_resnet8_digits.py")
PAIR = str(toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py")


@pytest.fixture(scope="module")
def compare():
    return toy.tool("compare")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "`--seeds` to be a whole number of at least 1, but got 0"),
        (["--methods", "kd", "mskd", "kd"], "`--methods` to be each method once"),
        (["--methods", "kd", "mksd"], "`--method` to be .*'mksd'.*Did you mean 'mskd'"),
        (["--methods", "student", "kd"], "`--teacher` to be given, which kd on this pair needs"),
        (["--teacher", "no/such.pth"], "`--teacher`.*no/such.pth"),
        (["--teacher", str(toy.ROOT / "README.md")], "`teacher_ckpt`.*README.md"),
        (["--teacher", "no/such.py"], "`config` to be a config file.*no/such.py"),
        (["--teacher", STUDENT], "`--teacher` to be a config of the pair's teacher.*another"),
        (
            ["--teacher", TEACHER, "--cfg-options", "optim_wrappr.x=1"],
            "`--cfg-options`.*reads, but",
        ),
        (
            ["--teacher", TEACHER, "--cfg-options", "train_dataloader.dataset.data_root=no/such"],
            "data_root.*a folder with the images.*no/such",
        ),
        (["--teacher", TEACHER], "`--work-dir` to be an empty or new folder, or one of this"),
        (["--teacher", TEACHER, "--fresh"], "`--fresh` to be trainings of this tool"),
    ],
)
def test_what_no_training_would_take_is_refused_first(compare, tmp_path, options, message):
    kept = tmp_path / "of somebody else"
    kept.touch()
    with pytest.raises(SettingError, match=message):
        compare.main([PAIR, "--work-dir", str(tmp_path), *options])
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("weights", ["a file", "a config"])
def test_the_first_step_of_every_method_comes_before_any_training(
    compare, tmp_path, capsys, monkeypatch, weights
):
    teacher = save_teacher(tmp_path / "t.pth", seed=1) if weights == "a file" else TEACHER
    folder, tried = tmp_path / "runs", []
    compare_dry_run = compare.dry_run

    def dry_run(cfg):
        networks = cfg.default_hooks.networks
        assert not networks.compile and not networks.compile_losses
        compare_dry_run(cfg)
        tried.append((cfg.model.get("type"), cfg.model.get("teacher_ckpt") is not None))

    monkeypatch.setattr(compare, "dry_run", dry_run)
    arguments = ["--methods", "student", "kd", "mskd", "--teacher", str(teacher), "--fast"]
    pair = tmp_path / "pair.py"
    pair.write_text(f"_base_ = {PAIR!r}\npair = dict(settings=dict(mskd=dict(scales=(1, 16))))\n")
    with pytest.raises(SettingError, match="`mskd` to be a training that can begin, .*scale 16"):
        compare.main([str(pair), *arguments, "--work-dir", str(folder), "--cfg-options", *OPTIONS])
    assert not folder.exists()
    alone = [("ImageClassifier", False)] * (1 if weights == "a file" else 2)
    assert tried == [*alone, ("FrozenTeacherDistill", True)]
    assert "The first step of each: " in capsys.readouterr().out


def save_teacher(path, seed):
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        torch.save(MODELS.build(classifier("resnet20", 10)).state_dict(), path)
    return path


def test_a_mistyped_loss_is_named_as_training_names_it(compare, tmp_path):
    teacher = str(save_teacher(tmp_path / "t.pth", seed=1))
    options = ["--cfg-options", "model.distiller.distill_losses.loss_mskd_stage9.negatives=all"]
    arguments = [PAIR, "--methods", "mskd", "--teacher", teacher, "--work-dir", str(tmp_path / "w")]
    with pytest.raises(SettingError, match=r"distill_losses\.loss_mskd_stage9.*loss_mskd_stage3"):
        compare.main([*arguments, *options])


def test_what_the_pair_states_does_not_reach_the_teachers_own_config(compare, tmp_path):
    options = ["--cfg-options", "pair.settings.mskd.scales=[1,2]", "train_cfg.max_epochs=7"]
    arguments = [PAIR, "--methods", "mskd", "--teacher", TEACHER, *options]
    _, configs = compare.check(compare.parse_args(arguments))
    assert configs["mskd"].model.distiller.connectors.stage3_student.scales == (1, 2)
    assert {name: cfg.train_cfg.max_epochs for name, cfg in configs.items()} == {
        "the teacher": 7,
        "mskd": 7,
    }


def test_the_time_left_of_days(compare):
    line = "INFO - Epoch(train)   [3][600/782]  lr: 5e-02  eta: 1 day, 2:03:04  time: 0.1"
    assert compare.EPOCH_LINE.search(line).groups() == ("3", "600", "782", "1 day, 2:03:04")


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

    def use(popen):
        names = dict(PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=popen, **names))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EpochBasedTrainLoop, "run_epoch", interrupted)
        use(InThisProcess)
        compare.main([*arguments, *options])
    forget_runs()

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
    # As if the folder had been moved.
    (tmp_path / "teacher" / "last_checkpoint").write_text("/no/such/folder/epoch_2.pth")
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

    monkeypatch.setattr(compare, "try_first_steps", lambda configs: None)
    monkeypatch.setattr(subprocess, "Popen", Fails)
    arguments = [PAIR, "--methods", "student", "--seeds", "4", "--work-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: student, seed 1: .*train.py.* ended with 2"):
        compare.main([*arguments, "--jobs", "1"])
    assert capsys.readouterr().err == "error: Expected `it` to work\n"
    finished = {path.parent.name for path in tmp_path.glob("*/finished")}
    assert finished == {"student_seed0", "student_seed2", "student_seed3"}


def test_the_weights_that_the_pair_states_are_the_default(compare, tmp_path):
    weights, pair = str(save_teacher(tmp_path / "t.pth", seed=1)), tmp_path / "pair.py"
    pair.write_text(f"_base_ = {PAIR!r}\npair = dict(teacher_ckpt={weights!r})\n")
    recipe, configs = compare.check(compare.parse_args([str(pair), "--methods", "kd"]))
    assert recipe["--teacher"] == configs["kd"].model.teacher_ckpt == weights


def test_networks_alone_are_given_no_teacher(compare, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        compare, "train", lambda argv, folder, *_: given.update({folder.name: argv})
    )
    arguments = [PAIR, "--methods", "student", "teacher", "kd", "--seeds", "1"]
    compare.train_all(compare.parse_args([*arguments, "--teacher", "t.pth"]), tmp_path)
    assert len(given) == 3
    assert {name for name, argv in given.items() if "--teacher" in argv} == {"kd_seed0"}


ENDS = """
import os, sys
for i in (4, 6, 8):
    print(f"Epoch(train)  [1][{i}/10]  lr: 1e-02  eta: 0:00:0{i}  time: 0.1")
for i in range(40):
    print(i)
sys.exit(int(os.environ["OMP_NUM_THREADS"]))
"""


def test_a_training_that_ends_by_itself_shows_its_last_lines(
    compare, tmp_path, capsys, monkeypatch
):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").write_text(ENDS)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="error: kd, seed 0: .* ended with 7"):
        compare.train([], tmp_path / "run", 0, "kd, seed 0", {"OMP_NUM_THREADS": "7"}, set())
    shown, errors = capsys.readouterr()
    assert errors.split() == [str(i) for i in range(10, 40)]
    assert shown.count("epoch 1") == shown.count("epoch 1, 0:00:06 left") == 1
    assert not (tmp_path / "run" / "finished").exists()


def test_a_training_may_write_in_another_encoding(compare, tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    script = r'import sys; sys.stdout.buffer.write(b"n\xe9\n")'
    (tmp_path / "tools" / "train.py").write_text(script)
    run = tmp_path / "student_seed0"
    write_scalars(run, "run", step(1, 1.0), {"accuracy/top1": 50.0, "step": 1})
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    assert compare.train([], run, 0, "student, seed 0", {}, set()).top1 == 50.0


def test_an_interruption_starts_no_other_training(compare, tmp_path, monkeypatch):
    started = []

    def train(arguments, work_dir, *_):
        started.append(work_dir.name)
        time.sleep(0.05)
        raise SystemExit("a training that failed before")

    def wait(futures):
        time.sleep(0.15)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "wait", wait)
    arguments = [PAIR, "--work-dir", str(tmp_path), "--methods", "student", "--seeds", "100"]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*arguments, "--jobs", "1"])
    count = len(started)
    time.sleep(0.2)
    assert started[0] == "student_seed0" and len(started) == count < 50


TOOL = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import toy
tool = toy.tool("compare")
tool.ROOT = pathlib.Path({folder!r})
tool.check = lambda args: (dict(config=args.config), {{}})
for stop in (tool.signal.SIGINT, tool.signal.SIGTERM):  # ignored by what a shell runs behind it
    tool.signal.signal(stop, tool.signal.default_int_handler)
tool.main(["pair.py", "--work-dir", {folder!r} + "/runs", "--jobs", "2", "--teacher", {teacher!r}])
"""
ENDLESS = """
import itertools, os, pathlib, sys, time
for step in itertools.count():
    pathlib.Path(__file__).with_name(f"{os.getpid()}.step").write_text(str(step))
    print(step, flush=True)
    time.sleep(0.05)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("teacher, count", [("weights.pth", 2), ("config.py", 1)])
def test_a_signal_ends_the_trainings_too(tmp_path, stop, teacher, count):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").write_text(ENDLESS)
    tests = str(Path(__file__).parent)
    script = TOOL.format(tests=tests, folder=str(tmp_path), teacher=teacher)

    def steps():
        return {file.stem: file.read_text() for file in tmp_path.glob("tools/*.step")}

    # A session of its own: only the tool gets the signal.
    tool = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            if len(steps()) == count:
                break
            time.sleep(0.1)
        tool.send_signal(stop)
        assert tool.wait(timeout=60) != 0
        last = steps()
        time.sleep(0.5)
        assert len(last) == count and steps() == last
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tool.pid, signal.SIGKILL)
