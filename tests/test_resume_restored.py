"""Settings of optimizer and schedules that a checkpoint brings: what is told is what happens."""

from __future__ import annotations

import pytest
import toy
from mmengine.config import Config

from mskd_plugin import launch
from mskd_plugin.checks.resumed import _restored


def interrupted(folder, **settings):
    """Train, and leave what an interruption in the second of two epochs leaves."""
    both = {"default_hooks.checkpoint.max_keep_ckpts": 2}
    toy.train(toy.runner_config(folder, **both, **settings))
    (folder / "epoch_2.pth").unlink()
    (folder / "last_checkpoint").write_text(str(folder / "epoch_1.pth"))


def resume(folder, **settings):
    """Go on, and return the runner and its log."""
    cfg = toy.runner_config(folder, **settings)
    launch.set_resume(cfg, "auto")
    runner, steps = toy.train(cfg)
    assert steps.count == 3 * (cfg.train_cfg.max_epochs - 1)
    (log,) = folder.glob(f"*/{runner.timestamp}.log")
    return runner, log.read_text()


def test_changed_settings_without_effect_are_told(tmp_path):
    interrupted(tmp_path, **{"optim_wrapper.optimizer.lr": 0.05})
    changed = {"optim_wrapper.optimizer.lr": 0.5, "optim_wrapper.optimizer.weight_decay": 0.25}
    changed |= {"param_scheduler.milestones": [7], "param_scheduler.gamma": 0.5}
    runner, log = resume(tmp_path, **changed, **{"optim_wrapper.optimizer.foreach": False})
    (group,) = runner.optim_wrapper.param_groups
    assert group["lr"] == 0.05 * 0.1 and group["weight_decay"] != 0.25  # a milestone after 1 epoch
    (told,) = [line for line in log.splitlines() if "Resuming restores" in line]
    listed = told.partition("Without effect: ")[2]
    assert [part.split(" is ")[0] for part in listed.split("; ")] == [
        "optim_wrapper.optimizer.lr",
        "optim_wrapper.optimizer.weight_decay",
        "param_scheduler.0.gamma",
        "param_scheduler.0.milestones.0",
    ]
    assert "optim_wrapper.optimizer.lr is 0.5 and was 0.05" in listed


@pytest.mark.parametrize(
    "left_out, lacking, restored",
    [
        (["save_optimizer"], "optimizer", ["param_scheduler.0.gamma"]),
        (["save_param_scheduler"], "param_schedulers", ["optim_wrapper.optimizer.lr"]),
        (["save_optimizer", "save_param_scheduler"], "optimizer and param_schedulers", []),
    ],
)
def test_what_a_checkpoint_was_saved_without_is_told(tmp_path, left_out, lacking, restored):
    interrupted(tmp_path, **{f"default_hooks.checkpoint.{name}": False for name in left_out})
    changed = {"optim_wrapper.optimizer.lr": 0.5, "param_scheduler.gamma": 0.5}
    log = resume(tmp_path, **changed)[1]
    assert f"The checkpoint was saved without {lacking}: resuming is not exact." in log
    told = [line.partition("Without effect: ")[2] for line in log.splitlines()]
    assert [text.partition(" is ")[0] for text in told if text] == restored


def test_what_takes_effect_is_not_told(tmp_path):
    interrupted(tmp_path)
    log = resume(tmp_path)[1]
    assert "Without effect" not in log and "saved without" not in log


def test_a_schedule_does_not_grow_with_the_training(tmp_path):
    interrupted(tmp_path, **{"param_scheduler.milestones": [2]})
    longer = {"param_scheduler.milestones": [2], "train_cfg.max_epochs": 4}
    runner, log = resume(tmp_path, **longer)
    assert "Without effect: param_scheduler.0.end is 4 and was 2." in log
    rate = runner.cfg.optim_wrapper.optimizer.lr
    assert runner.optim_wrapper.param_groups[0]["lr"] == rate  # not a tenth, as from the start


def test_schedules_that_are_new_take_effect(tmp_path):
    interrupted(tmp_path, param_scheduler=None)
    runner, log = resume(tmp_path)
    assert "Without effect" not in log and len(runner.param_schedulers) == 1


def test_kernels_follow_the_config():
    was, now = (
        Config(dict(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, **kernels))))
        for kernels in (dict(foreach=True), dict(fused=True))
    )
    assert _restored(now, {"meta": {"cfg": was.pretty_text}}) == ""


def test_a_schedule_of_steps_ends_with_them():
    was, now = (
        Config(dict(train_cfg=dict(max_iters=steps), param_scheduler=dict(type="PolyLR")))
        for steps in (4, 9)
    )
    told = _restored(now, {"meta": {"cfg": was.pretty_text}, "param_schedulers": []})
    assert told == "param_scheduler.0.end is 9 and was 4"
    for cfg in (was, now):
        cfg.param_scheduler.end = 3  # of its own
    assert _restored(now, {"meta": {"cfg": was.pretty_text}, "param_schedulers": []}) == ""
