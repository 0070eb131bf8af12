"""The run of a model in two phases: schedules, the hook, resuming."""

from __future__ import annotations

import copy
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmrazor.registry import MODELS

from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import PhaseHook
from mskd_plugin.launch import build_runner
from mskd_plugin.recipes import ab, distill, fsp, ft, kd, two_phases

METHODS = {"ab": ab, "fsp": fsp, "ft": ft}


def base(teacher="resnet14", student="resnet8"):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=toy.CLASSES),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[80.0] * 3, std=[80.0] * 3),
    )


def run_base(**settings):
    return {
        "train_cfg": dict(by_epoch=True, max_epochs=240, val_interval=1),
        "param_scheduler": dict(type="MultiStepLR", by_epoch=True, milestones=[150, 180, 210]),
        "optim_wrapper": dict(optimizer=dict(type="SGD", lr=0.05)),
        **settings,
    }


def test_the_run_of_the_benchmark():
    run = two_phases(run_base(), kd(base()), ft(base()))
    assert run["train_cfg"] == dict(by_epoch=True, max_epochs=270, val_interval=1, val_begin=31)
    constant, steps = run["param_scheduler"]
    assert constant["factor"] == pytest.approx(0.2) and (constant["begin"], constant["end"]) == (
        0,
        30,
    )
    assert (steps["begin"], steps["milestones"]) == (30, [150, 180, 210])
    assert run["find_unused_parameters"] is True
    # AB and FSP keep the base's learning rate, and so does FT where 0.01 is not below it.
    assert len(two_phases(run_base(), ab(base()))["param_scheduler"]) == 1
    low = run_base(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)))
    assert len(two_phases(low, ft(base()))["param_scheduler"]) == 1
    assert two_phases(run_base(), kd(base())) == {}


@pytest.mark.parametrize("stated, moved", [(0, 31), (1, 31), (5, 35)])
def test_validation_begins_as_late_in_phase_2(stated, moved):
    run = two_phases(run_base(train_cfg=dict(max_epochs=240, val_begin=stated)), ft(base()))
    assert run["train_cfg"]["val_begin"] == moved


def test_other_schedules_move_too():
    warmup = dict(type="LinearLR", begin=0, end=5, convert_to_iter_based=True)
    cosine = dict(type="CosineAnnealingLR", T_max=95, begin=5, end=100)
    given = run_base(param_scheduler=[warmup, cosine])
    run = two_phases(given, fsp(base(), init_epochs=7))
    assert [(s["begin"], s["end"]) for s in run["param_scheduler"]] == [(7, 12), (12, 107)]
    assert run["param_scheduler"][1]["T_max"] == 95
    assert given["param_scheduler"][0]["begin"] == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(train_cfg=dict(by_epoch=False, max_iters=10)), "`train_cfg`.*epochs"),
        (dict(train_cfg=dict(by_epoch=False, max_iters=10, max_epochs=240)), "`train_cfg`.*epochs"),
        (dict(param_scheduler=dict(type="StepLR", by_epoch=False)), "`param_scheduler`.*by_epoch"),
    ],
)
def test_runs_that_cannot_have_phases(settings, match):
    with pytest.raises(SettingError, match=match):
        two_phases(run_base(**settings), ft(base()))


class Seen(Hook):
    """Note phase, learning rate and momentum before each step's update, and the losses."""

    priority = "LOWEST"

    def __init__(self):
        self.steps = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        optimizer = runner.optim_wrapper.optimizer
        self.now = (
            runner.epoch,
            runner.model.phase,
            round(optimizer.param_groups[0]["lr"], 9),
            len(optimizer.state),
        )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        names = sorted(name for name in outputs if "loss_" in name)
        logged = runner.message_hub.get_scalar("train/phase").current()
        self.steps.append((*self.now, logged, names))


def config(folder, name="ft", epochs=2, **settings):
    """Return a run of two epochs of phase 1 and ``epochs`` of phase 2, of three steps each."""
    method = METHODS[name](base(), init_epochs=2)
    model = distill(base(), method)
    torch.manual_seed(1)
    teacher = MODELS.build(model["teacher"])
    path = folder / "teacher.pth"
    torch.save(teacher.state_dict(), path)
    model["teacher_ckpt"] = str(path)
    cfg = toy.runner_config(folder, ConfigDict(model), **{"train_cfg.max_epochs": epochs})
    cfg.optim_wrapper.optimizer = dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4)
    cfg.update(two_phases(cfg, method))
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=1)
    cfg.merge_from_dict(settings)
    return cfg


def train(cfg):
    runner = build_runner(cfg)
    seen = Seen()
    runner.register_hook(seen)
    runner.train()
    return runner, seen.steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    runner, steps = train(config(folder))
    return folder, runner, steps


def test_phases_learning_rates_and_momentum_of_a_run(whole):
    folder, runner, steps = whole
    assert [s[0] for s in steps] == [e for e in range(4) for _ in range(3)]
    assert [s[1] for s in steps] == [s[4] for s in steps] == [1] * 6 + [2] * 6
    # The base's milestone after its first epoch is counted from phase 2.
    assert [s[2] for s in steps[::3]] == [0.01, 0.01, 0.05, 0.005]
    state = [s[3] for s in steps]
    assert state[0] == 0 and all(state[1:6]) and state[6] == 0 and all(state[7:])
    assert all(s[5] == ["distill.loss_ft_paraphraser"] for s in steps[:6])
    assert all(s[5] == ["distill.loss_ft"] for s in steps[6:])
    log = (folder / runner.timestamp / f"{runner.timestamp}.log").read_text()
    assert "Phase 1 of 2 from epoch 1: losses loss_ft_paraphraser;" in log
    assert "Phase 2 of 2 from epoch 3: losses loss_ft;" in log
    assert log.count(" of 2 from epoch ") == 2  # told once each
    assert "begins before the end of phase 1" not in log
    validated = re.findall(r"Epoch\(val\) +\[(\d+)\]", log)
    assert set(validated) == {"3", "4"}  # the classifier does not train before
    lines = (folder / runner.timestamp / "vis_data" / "scalars.json").read_text().splitlines()
    lines = [line for line in map(json.loads, lines) if "phase" in line]
    assert {line["phase"] for line in lines} == {1.0, 2.0}
    for line in lines:  # each phase's own losses, and no value left over from the other
        found = {name for name in line if name.startswith("distill.loss")}
        assert found == {f"distill.loss_ft{'_paraphraser' if line['phase'] == 1 else ''}"}


class Rates(Hook):
    def __init__(self):
        self.rates = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append(runner.optim_wrapper.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    "schedule",
    [
        dict(type="MultiStepLR", milestones=[1]),
        dict(type="OneCycleLR", eta_max=0.1, total_steps=2, convert_to_iter_based=True),
        [
            dict(type="LinearLR", start_factor=0.1, end=1, convert_to_iter_based=True),
            dict(type="CosineAnnealingLR", begin=1, T_max=1, end=2),
        ],
    ],
    ids=str,
)
def test_phase_2_has_the_learning_rates_of_a_run_without_phase_1(tmp_path, schedule):
    method = ft(base(), init_epochs=2)
    plain = toy.runner_config(tmp_path / "plain")
    plain.param_scheduler = schedule
    plain.optim_wrapper.optimizer = dict(type="SGD", lr=0.05)
    phased = copy.deepcopy(plain)
    phased.work_dir = str(tmp_path / "phased")
    phased.update(two_phases(plain, method))
    rates = []
    for cfg in (plain, phased):
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.experiment_name = f"rates_{len(rates)}"
        runner = build_runner(cfg)
        hook = Rates()
        runner.register_hook(hook)
        runner.train()
        rates.append(hook.rates)
    assert len(rates[0]) == 6
    assert rates[1] == pytest.approx([0.01] * 6 + rates[0], rel=1e-12)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_is_in_its_phase_and_ends_alike(whole, tmp_path, epoch):
    folder, runner, steps = whole
    cfg = config(tmp_path)
    cfg.model.teacher_ckpt = str(folder / "teacher.pth")
    cfg.resume, cfg.load_from = True, str(folder / f"epoch_{epoch}.pth")
    resumed, later = train(cfg)
    assert later == steps[3 * epoch :]
    expected = runner.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_the_hook_leaves_other_models_alone(tmp_path):
    cfg = toy.runner_config(tmp_path)
    assert dict(type="PhaseHook") in [dict(hook) for hook in cfg.custom_hooks]
    cfg.train_cfg.max_epochs = 1
    runner = build_runner(cfg)
    runner.train()
    assert "train/phase" not in runner.message_hub.log_scalars


def test_a_run_that_ends_in_phase_1(tmp_path):
    cfg = config(tmp_path, **{"train_cfg.max_epochs": 2})
    with pytest.raises(SettingError, match="max_epochs.*above the 2 epochs"):
        build_runner(cfg)  # before the schedules, which would begin after the end


def test_a_run_counted_in_iterations(tmp_path):
    cfg = config(tmp_path)
    cfg.train_cfg = dict(by_epoch=False, max_iters=4, val_interval=10)
    cfg.param_scheduler = None
    with pytest.raises(SettingError, match="by_epoch.*True.*False"):
        train(cfg)


def test_a_schedule_that_does_not_begin_anew_is_named(tmp_path):
    cfg = config(tmp_path)
    cfg.param_scheduler = dict(type="MultiStepLR", milestones=[3])
    runner = build_runner(cfg)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    assert any("MultiStepLR begins before the end of phase 1 and goes on" in m for m in messages)


def test_phase_2_drops_the_momentum_of_every_optimizer(tmp_path):
    runner = build_runner(config(tmp_path))
    model, optimizers = runner.model, []
    for part in (model.architecture, model.distiller.connectors):
        optimizers.append(torch.optim.SGD(part.parameters(), 0.1, momentum=0.9))
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers[-1].step()
    pair = OptimWrapperDict(one=OptimWrapper(optimizers[0]), other=OptimWrapper(optimizers[1]))
    hook = PhaseHook()
    hook.before_train(runner)
    runner.optim_wrapper = pair
    for runner.train_loop._epoch, kept in ((1, True), (2, False)):
        assert runner.epoch in (1, 2)
        hook.before_train_epoch(runner)
        assert [bool(optimizer.state) for optimizer in optimizers] == [kept, kept]


@pytest.mark.parametrize(
    ("by_epoch", "begin", "end", "warned"),
    [
        # Of 2 epochs of 5 steps each; one that ends a step later takes its factor back then.
        (True, 0, 2, False),
        (True, 0, 3, False),
        (True, 0, 4, True),
        (True, 1, 100, True),
        (True, 2, 100, False),
        (False, 0, 11, False),
        (False, 0, 12, True),
        (False, 9, 500, True),
        (False, 10, 500, False),
    ],
)
def test_which_schedules_reach_over_the_change(by_epoch, begin, end, warned):
    scheduler = SimpleNamespace(by_epoch=by_epoch, begin=begin, end=end)
    for schedulers in ([scheduler], {"one": [], "other": [scheduler]}):
        messages = []
        runner = SimpleNamespace(
            param_schedulers=schedulers,
            train_dataloader=range(5),
            logger=SimpleNamespace(warning=messages.append),
        )
        PhaseHook()._warn_of_schedule(runner, 2)
        assert len(messages) == warned


def test_several_processes_need_the_setting(tmp_path):
    runner = build_runner(config(tmp_path))
    runner.model = type("Wrapped", (), {"module": runner.model, "find_unused_parameters": False})()
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == "PhaseHook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mskd_plugin.unwrapped.is_model_wrapper", lambda model: True)
        with pytest.raises(SettingError, match="find_unused_parameters.*True.*False"):
            hook.before_train(runner)
