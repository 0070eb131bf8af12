"""The hooks inside a real runner, on a few digits."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint

from mskd_plugin.hooks.epoch_seed import EpochSeedHook
from mskd_plugin.hooks.missed_validation import MissedValidationHook
from mskd_plugin.hooks.teacher_identity import TeacherIdentityHook, weights_digest
from mskd_plugin.launch import build_runner
from mskd_plugin.unchanged import unchanged_random_state

MISSED = [dict(type="EpochSeedHook"), dict(type="MissedValidationHook")]


# --- random numbers and resuming -----------------------------------------------------------------


def test_unchanged_random_state():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with pytest.raises(ZeroDivisionError), unchanged_random_state():
        draw()
        raise ZeroDivisionError
    assert draw() == expected


def test_unchanged_random_state_of_the_current_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: asked.append(devices) or nullcontext()
    )
    with unchanged_random_state():
        pass
    assert asked == [[3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, workers):
    teacher = str(toy.teacher_file(tmp_path))

    def config(name, **settings):
        return toy.runner_config(
            tmp_path / name,
            toy.algorithm(teacher_ckpt=teacher),
            **{
                "train_cfg.max_epochs": 3,
                "train_dataloader.num_workers": workers,
                "train_dataloader.worker_init_fn": dict(type="keep_worker_seed"),
                "val_dataloader.num_workers": 0,
            },
            **settings,
        )

    class PowerCut(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 4:  # inside the second epoch
                raise KeyboardInterrupt

    whole, whole_steps = toy.train(config("whole"))
    interrupted = build_runner(config("parts"))
    interrupted.register_hook(PowerCut())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed, resumed_steps = toy.train(config("parts", resume=True))

    assert resumed_steps.count == 6
    assert resumed_steps.inputs == whole_steps.inputs[3:]
    assert len({value for _, value in whole_steps.inputs}) == 9  # every epoch draws anew
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for name, value in whole.model.teacher.state_dict().items():
        assert torch.equal(resumed.model.teacher.state_dict()[name], value), name
    states = [runner.optim_wrapper.state_dict()["state"] for runner in (whole, resumed)]
    for key, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])


def top1(work_dir):
    """Return (epoch or step, top-1) of each logged validation."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(e["step"], e["accuracy/top1"]) for e in entries if "accuracy/top1" in e]


class PowerCutWhileValidating(Hook):
    """Stop a training in its last validation."""

    def before_val_epoch(self, runner):
        if runner.iter == runner.max_iters:
            raise KeyboardInterrupt


def interrupted_and_resumed(folder, train_cfg=None, **settings):
    """Return the logged validations of an uninterrupted training and of one that is resumed."""
    teacher = str(toy.teacher_file(folder))
    cfgs = [
        toy.runner_config(folder / name, toy.algorithm(teacher_ckpt=teacher), **settings)
        for name in ("whole", "parts", "parts")
    ]
    for cfg in cfgs:
        cfg.custom_hooks = MISSED
        cfg.train_cfg = train_cfg or cfg.train_cfg
    toy.train(cfgs[0])
    interrupted = build_runner(cfgs[1])
    interrupted.register_hook(PowerCutWhileValidating())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    cfgs[2].resume = True
    _, steps = toy.train(cfgs[2])
    assert steps.count == 0  # all that was missing is the validation
    return top1(folder / "whole"), top1(folder / "parts")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path, epochs):
    save_best = {"default_hooks.checkpoint.save_best": "accuracy/top1"}
    whole, parts = interrupted_and_resumed(
        tmp_path, **save_best, **{"train_cfg.max_epochs": epochs}
    )
    assert parts == whole and [epoch for epoch, _ in whole] == [*range(1, epochs + 1)]
    best = [sorted(f.name for f in (tmp_path / n).glob("best_*")) for n in ("whole", "parts")]
    assert best[0] == best[1] and len(best[0]) == 1


def test_of_an_iteration_based_training_too(tmp_path):
    by_steps = {
        "train_cfg": dict(type="IterBasedTrainLoop", max_iters=4, val_interval=2),
        "param_scheduler": None,
        "default_hooks.checkpoint.by_epoch": False,
    }
    whole, parts = interrupted_and_resumed(tmp_path, **by_steps)
    assert parts == whole and len(whole) == 2


def test_no_validation_is_made_where_none_was_due(tmp_path):
    settings = {"train_cfg.max_epochs": 3, "train_cfg.val_interval": 2}
    for epochs, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 2, 3])):
        cfg = toy.runner_config(tmp_path, **{**settings, "train_cfg.max_epochs": epochs})
        cfg.custom_hooks = MISSED
        cfg.resume = epochs > 1
        toy.train(cfg)
        # Epoch 1 was the last one once, and is not due with an interval of 2.
        assert [epoch for epoch, _ in top1(tmp_path)] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"train_cfg.val_interval": 2},
        {"train_cfg.val_interval": 2, "train_cfg.val_begin": 3},
        {"train_cfg.val_interval": 9, "train_cfg.dynamic_intervals": [(3, 1)]},
    ],
    ids=str,
)
def test_a_validation_is_due_where_mmengine_would_make_it(tmp_path, monkeypatch, settings):
    runner = build_runner(toy.runner_config(tmp_path, **{"train_cfg.max_epochs": 5, **settings}))
    loop, due, made = runner.train_loop, [], []
    monkeypatch.setattr(loop, "run_iter", lambda *_: None)
    monkeypatch.setattr(runner.val_loop, "run", lambda: due.append(runner.epoch))
    monkeypatch.setattr(runner, "_hooks", [])
    monkeypatch.setattr(runner, "optim_wrapper", SimpleNamespace(initialize_count_status=print))
    runner.train_loop.run()
    monkeypatch.setattr(runner.val_loop, "run", lambda: made.append(runner.epoch))
    for epoch in range(6):
        loop._epoch = epoch
        MissedValidationHook().before_train(runner)
    assert made == due and due[-1] == 5
    runner._val_loop = None
    MissedValidationHook().before_train(runner)  # none without validation


class PowerCutInTheSecondEpoch(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("save_best, expected", [(None, [1, 1, 2]), ("accuracy/top1", [1, 2])])
def test_a_checkpoint_that_was_written_after_its_validation_needs_no_other(
    tmp_path, save_best, expected
):
    # The first validation is the best so far: its epoch's checkpoint is written anew.
    cfgs = [
        toy.runner_config(tmp_path, **{"default_hooks.checkpoint.save_best": save_best})
        for _ in range(2)
    ]
    for cfg in cfgs:
        cfg.custom_hooks = MISSED
    runner = build_runner(cfgs[0])
    runner.register_hook(PowerCutInTheSecondEpoch())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfgs[1].resume = True
    toy.train(cfgs[1])
    assert [epoch for epoch, _ in top1(tmp_path)] == expected


def test_every_generator_is_seeded_by_seed_epoch_and_rank(monkeypatch):
    def draw(seed, epoch, rank):
        monkeypatch.setattr("mskd_plugin.hooks.epoch_seed.get_rank", lambda: rank)
        EpochSeedHook().before_train_epoch(SimpleNamespace(seed=seed, epoch=epoch))
        return random.random(), np.random.rand(), torch.rand(1).item()

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draw(*case) for case in cases]
    assert drawn == [draw(*case) for case in cases]
    for generator in zip(*drawn, strict=True):
        assert len(set(generator)) == 4


def test_random_numbers_are_seeded_before_any_other_hook_draws(tmp_path):
    drawn = []

    class Drawing(Hook):
        priority = "VERY_HIGH"

        def before_train_epoch(self, runner):
            drawn.append(torch.rand(1).item())

    for consumed in (0, 1):  # before training, by a preflight for example
        runner = build_runner(toy.runner_config(tmp_path, **{"train_cfg.max_epochs": 1}))
        runner.register_hook(Drawing())
        torch.rand(consumed)
        runner.call_hook("before_train_epoch")
    assert drawn[0] == drawn[1]


def test_other_seeds_draw_other_numbers(tmp_path):
    first = toy.train(toy.runner_config(tmp_path / "a", **{"randomness.seed": 0}))[1].inputs
    again = toy.train(toy.runner_config(tmp_path / "b", **{"randomness.seed": 0}))[1].inputs
    other = toy.train(toy.runner_config(tmp_path / "c", **{"randomness.seed": 1}))[1].inputs
    assert first == again
    assert not {v for _, v in first} & {v for _, v in other}


# --- the teacher's identity ----------------------------------------------------------------------


def test_resuming_with_another_teacher_is_refused(tmp_path):
    run = tmp_path / "run"
    teachers = [str(toy.teacher_file(tmp_path, seed=seed)) for seed in (1, 2)]
    settings = {"train_cfg.max_epochs": 1}
    toy.train(toy.runner_config(run, toy.algorithm(teacher_ckpt=teachers[0]), **settings))
    checkpoint = load_checkpoint(torch.nn.Identity(), str(run / "epoch_1.pth"))
    assert not [key for key in checkpoint["state_dict"] if key.startswith("teacher.")]
    assert len(checkpoint["meta"]["teacher_sha256"]) == 64

    other = toy.runner_config(run, toy.algorithm(teacher_ckpt=teachers[1]), resume=True)
    toy.fails(other, "teacher_ckpt.*began with.*but got another")
    same = toy.runner_config(run, toy.algorithm(teacher_ckpt=teachers[0]), resume=True)
    runner = build_runner(same)
    seen = []
    runner.model.teacher.register_forward_hook(lambda module, *_: seen.append(module.training))
    runner.train()
    # One preflight batch and three steps: its accuracy was measured when the run began.
    assert seen == [False] * 4
    # A training that only starts from the student's weights may have any teacher.
    fresh = toy.runner_config(tmp_path / "b", toy.algorithm(teacher_ckpt=teachers[1]), **settings)
    fresh.load_from = str(run / "epoch_2.pth")
    assert toy.train(fresh)[1].count == 3


def test_a_teacher_that_trains_has_no_digest():
    hook, checkpoint = TeacherIdentityHook(), dict(meta={})
    runner = SimpleNamespace(model=toy.build(teacher_trainable=True), _resume=True)
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint["meta"] == {}
    hook.after_load_checkpoint(runner, dict(meta=dict(teacher_sha256="0" * 64)))  # once frozen


def test_digest_depends_on_values_and_names():
    network = torch.nn.Linear(2, 2)
    first = weights_digest(network)
    assert first == weights_digest(network)
    assert first != weights_digest(torch.nn.Sequential(network))
    norm = torch.nn.BatchNorm1d(2)
    before = weights_digest(norm)
    norm.running_mean += 1
    assert before != weights_digest(norm)
    with torch.no_grad():
        network.bias[0] += 1
    assert first != weights_digest(network)
