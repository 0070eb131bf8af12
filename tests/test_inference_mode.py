"""The teacher in inference mode: no bit changes, and where it cannot be."""

from __future__ import annotations

import pytest
import torch
import toy
from mmrazor.models.task_modules import RecorderManager
from torch import nn

from mskd_plugin.algorithms.records import copy_inference_records
from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import METHODS
from mskd_plugin.speed import to_channels_last


@pytest.mark.parametrize("settings", [{}, dict(loss_weight=2.0), dict(teacher_mode="loss")])
def test_inference_mode_changes_no_bit(settings):
    if "loss_weight" in settings:  # the one with categories, from recorded parameters
        settings = dict(distiller=toy.distiller(**settings))
    models = [toy.build(teacher_inference_mode=on, **settings).train() for on in (False, True)]
    seen = []
    for model in models:
        model.teacher.backbone.register_forward_hook(
            lambda *_: seen.append(torch.is_inference_mode_enabled())
        )
    for seed in range(2):
        toy.assert_same(*(toy.step(model, toy.batch(seed=seed)) for model in models))
    assert seen == [False, True] * 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_switches_of_the_model(method):
    # Views of maps, and what a loss saves for its backward, depend on layout and mode.
    steps = []
    for fast in (False, True):
        model = toy.digits_pair(method).double()
        model.teacher_inference_mode = fast
        batch = toy.batch()
        batch["inputs"] = batch["inputs"].double()
        if fast:
            to_channels_last(model)
            batch["inputs"] = batch["inputs"].contiguous(memory_format=torch.channels_last)
        torch.manual_seed(1)
        steps.append(toy.step(model, batch))
    toy.assert_same(*steps, rtol=1e-9, atol=1e-9)


def test_recorded_inference_tensors_are_copied_once_each():
    manager = RecorderManager(
        dict(
            one=dict(type="ModuleOutputs", source="0"),
            same=dict(type="ModuleInputs", source="1"),
            weight=dict(type="Parameter", source="0.weight"),
        )
    )
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    manager.initialize(model)
    inputs = torch.ones(1, 2)
    with torch.inference_mode(), manager:
        model(inputs)
    records = {name: manager.get_recorder(name) for name in ("one", "same", "weight")}
    before = records["one"].get_record_data()
    copy_inference_records(manager)
    one, same = records["one"].get_record_data(), records["same"].get_record_data(data_idx=0)
    assert before.is_inference() and not one.is_inference()
    assert torch.equal(one, before) and one is same
    assert records["weight"].get_record_data() is model[0].weight
    copy_inference_records(manager)  # nothing left to copy
    assert records["one"].get_record_data() is one


def test_whatever_is_recorded_beside_a_tensor_stays():
    class Stage(nn.Module):  # as those of Swin Transformer, with the size of their grid
        def forward(self, x):
            return x + 1, (2, 3), None

    manager = RecorderManager(dict(stage=dict(type="ModuleOutputs", source="0")))
    model = nn.Sequential(Stage())
    manager.initialize(model)
    with torch.inference_mode(), manager:
        model(torch.ones(1, 6))
    copy_inference_records(manager)
    tokens, *others = manager.get_recorder("stage").get_record_data()
    assert not tokens.is_inference() and torch.equal(tokens, torch.full((1, 6), 2.0))
    assert others == [(2, 3), None]


def test_where_inference_mode_cannot_be():
    match = "teacher_inference_mode.*False for a teacher that trains.*deliveries"
    with pytest.raises(SettingError, match=match):
        toy.build(teacher_inference_mode=True, teacher_trainable=True)
    deliveries = dict(rand=dict(type="FunctionOutputs", func_path="torch.rand", max_keep_data=1))
    with pytest.raises(SettingError, match=match):
        toy.build(
            teacher_inference_mode=True,
            distiller=dict(toy.distiller(), distill_deliveries=deliveries),
        )
    with pytest.raises(SettingError, match="teacher_inference_mode.*True or False.*'yes'"):
        toy.build(teacher_inference_mode="yes")
