"""Schedules and recipes that would not fit the training's epochs are named before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.registry import DefaultScope
from mmpretrain.engine import SwitchRecipeHook

from mskd_plugin.checks.schedule import check_recipes, check_schedules
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import build_runner
from mskd_plugin.switches import use_in_memory


def test_recipes_that_could_not_be_switched_to(tmp_path):
    def config(**recipe):
        cfg = toy.runner_config(tmp_path)
        schedule = [dict(action_epoch=2, **recipe)]
        cfg.custom_hooks.append(dict(type="SwitchRecipeHook", schedule=schedule))
        return cfg

    loss, pipeline = dict(type="CrossEntropyLoss"), [dict(type="PackInputs")]
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        toy.fails(config(loss=loss), "`SwitchRecipeHook.schedule`.*`loss`.*CrossEntropyLoss")
        cfg = config(train_pipeline=pipeline)
        use_in_memory(cfg)
        toy.fails(cfg, "`SwitchRecipeHook.schedule`.*`train_pipeline`.*PackInputs")
        for student, recipe in (
            (None, dict(train_pipeline=pipeline)),
            ("student", dict(loss=loss)),
        ):
            cfg = config(**recipe)
            if student:
                cfg.model = toy.classifier(student)
            runner = build_runner(cfg)
            runner.train()
            assert runner.epoch == 2


def test_a_loss_of_the_model_itself_is_switched():
    hook = SwitchRecipeHook([dict(action_epoch=2, loss=torch.nn.CrossEntropyLoss())])
    runner = SimpleNamespace(hooks=[hook], train_dataloader=SimpleNamespace(dataset=None))
    model = SimpleNamespace(loss_module=torch.nn.MSELoss())
    check_recipes(runner, model)
    hook._switch_loss(SimpleNamespace(model=model), hook.schedule[2]["loss"])  # mmpretrain's
    assert model.loss_module is hook.schedule[2]["loss"]
    with pytest.raises(SettingError, match="`SwitchRecipeHook.schedule`.*`loss`"):
        check_recipes(runner, SimpleNamespace(head=None))


@pytest.mark.parametrize(
    ("begin", "end", "fits"),
    [(0, 3, True), (1, 4, True), (2, 9, True), (0, 9, False), (1, 5, False)],
)
def test_a_cycle_takes_the_steps_between_its_begin_and_its_end(begin, end, fits):
    cycle = SimpleNamespace(total_steps=3, by_epoch=True, begin=begin, end=end)
    runner = SimpleNamespace(param_schedulers=[cycle], max_epochs=5, max_iters=50)
    if fits:
        return check_schedules(runner, None)
    with pytest.raises(SettingError, match=f"at least the {5 - begin} epochs .* but got 3 of"):
        check_schedules(runner, None)
