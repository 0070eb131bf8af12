"""``train.py --dry-run``: the first step of a training, and nothing that stays."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import toy
from mmengine.model import BaseModel
from mmengine.runner import ValLoop
from tool_runs import MSKD, TEACHER, call, wait_for_the_next_second

from mskd_plugin.errors import SettingError
from mskd_plugin.launch import dry_run
from mskd_plugin.launch.dry_run import _StopHook


@pytest.fixture
def steps(monkeypatch):
    """The number of images in each training step that is taken."""
    steps, train_step = [], BaseModel.train_step

    def noted(model, data, optim_wrapper):
        steps.append(len(data["inputs"]))
        return train_step(model, data, optim_wrapper)

    def run(loop):
        raise AssertionError("nothing is to be validated")

    monkeypatch.setattr(BaseModel, "train_step", noted)
    monkeypatch.setattr(ValLoop, "run", run)
    return steps


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_one_step_is_taken_and_nothing_is_left(tmp_path, steps, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("train", TEACHER, "--dry-run")
    assert steps == [16] and not list(tmp_path.iterdir())
    assert "Dry run: the training can begin" in capsys.readouterr().out


def test_several_in_one_second(tmp_path, steps, monkeypatch, capsys):
    stopped = SimpleNamespace(**{**vars(time), "time": lambda: 1.7e9})
    monkeypatch.setattr("mmengine.runner.runner.time", stopped)
    for _ in range(2):
        dry_run(toy.runner_config(tmp_path, experiment_name="one"))
    assert len(steps) == 2
    assert "Teacher on the validation data" not in capsys.readouterr().out


def test_nothing_is_left_elsewhere(tmp_path, steps):
    out = tmp_path / "elsewhere"
    cfg = toy.runner_config(tmp_path / "run")
    cfg.visualizer.vis_backends = [dict(type="LocalVisBackend", save_dir=str(out / "log"))]
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=1, out_dir=str(out))
    dry_run(cfg)
    assert len(steps) == 1 and not out.exists()


def test_what_training_would_refuse_is_refused(tmp_path, steps):
    with pytest.raises(SettingError, match="`teacher_ckpt` to be the teacher's weights"):
        call("train", MSKD, "--dry-run", "--work-dir", tmp_path / "run")
    assert not list(tmp_path.iterdir()) and not steps


def test_a_work_folder_that_is_none_is_refused(tmp_path, steps):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="`--work-dir` to be a folder to write into"):
        call("train", TEACHER, "--dry-run", "--work-dir", tmp_path / "file")
    assert not steps


def test_a_training_that_would_be_resumed_stays_as_it_is(tmp_path, monkeypatch):
    folder, resume = tmp_path / "run", ("--dry-run", "--resume", "--work-dir")
    file = folder / "epoch_1.pth"
    call("train", TEACHER, "--work-dir", folder, epochs=1)
    before = contents(folder)
    wait_for_the_next_second()
    with pytest.raises(SettingError, match="`--work-dir` to be a folder without checkpoints"):
        call("train", TEACHER, "--dry-run", "--work-dir", folder)
    seen = []
    monkeypatch.setattr(_StopHook, "before_train_iter", note(seen), raising=False)
    monkeypatch.setattr(ValLoop, "run", None)  # not the validation that this checkpoint is before
    call("train", TEACHER, *resume, folder)
    call("train", TEACHER, *resume, tmp_path / "new")  # nothing to resume from yet
    call("train", TEACHER, "--dry-run", "--resume", file, "--work-dir", tmp_path / "new")
    assert seen == [2, 0, 2]  # steps that were behind them
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def note(seen):
    def before_train_iter(hook, runner, batch_idx, data_batch=None):
        seen.append(runner.iter)

    return before_train_iter
