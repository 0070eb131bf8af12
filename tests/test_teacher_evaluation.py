"""The teacher's evaluation before training, on a few digits."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import toy
from torch.utils.data import DataLoader

from mskd_plugin.hooks import TeacherEvaluationHook
from mskd_plugin.launch import build_runner


def test_teacher_is_evaluated_once_and_logged(tmp_path):
    cfg = toy.runner_config(tmp_path)
    runner = build_runner(cfg)
    calls = []
    runner.model.teacher.register_forward_hook(lambda *_: calls.append(1))
    runner.train()
    # One preflight batch, one validation batch of 20 images, six training steps.
    assert len(calls) == 1 + 1 + 6

    right = 0
    dataset = runner.val_dataloader.dataset
    for item in [dataset[i] for i in range(20)]:
        data = runner.model.data_preprocessor(
            {"inputs": item["inputs"][None], "data_samples": [item["data_samples"]]}, False
        )
        with torch.no_grad():
            logits = runner.model.teacher(data["inputs"], mode="tensor")
        right += int(logits.argmax()) == int(item["data_samples"].gt_label)
    assert runner.message_hub.get_info("teacher/accuracy/top1") == pytest.approx(100 * right / 20)
    scalars = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    logged = [json.loads(line) for line in scalars if "teacher/accuracy/top1" in line]
    assert [entry["teacher/accuracy/top1"] for entry in logged] == [100 * right / 20]


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
def test_teacher_is_evaluated_in_eval_mode_and_left_as_it_was(tmp_path, kind):
    model = toy.algorithm(kind, teacher_ckpt=str(toy.teacher_file(tmp_path)))
    runner = build_runner(toy.runner_config(tmp_path, model))
    runner.model.train()
    teacher, seen = runner.model.teacher, []
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.register_forward_hook(lambda module, *_: seen.append(module.training))
    was_training, augmented = teacher.training, []
    preprocess = runner.model.data_preprocessor.forward

    def noted(batch, training):
        augmented.append(training)
        return preprocess(batch, training)

    runner.model.data_preprocessor.forward = noted
    state = torch.get_rng_state()
    TeacherEvaluationHook().before_train(runner)
    assert torch.equal(torch.get_rng_state(), state) and augmented == [False]
    assert seen == [False] and teacher.training is was_training
    assert was_training is (kind == "SingleTeacherDistill")
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_metrics_that_are_no_numbers_and_data_without_classes_do_not_stop_the_evaluation(tmp_path):
    of_classes = dict(type="SingleLabelMetric", average=None, items=["recall"])
    metrics = [dict(type="Accuracy"), of_classes, dict(type="ConfusionMatrix")]
    cfg = toy.runner_config(tmp_path, val_evaluator=metrics, **{"train_cfg.max_epochs": 1})
    runner = build_runner(cfg)
    dataset = runner.val_dataloader.dataset
    plain = [dataset[i] for i in range(20)]  # which states no classes, as MMEngine allows
    runner.val_loop.dataloader = DataLoader(plain, 20, collate_fn=runner.val_dataloader.collate_fn)
    TeacherEvaluationHook().before_train(runner)
    assert 0 <= runner.message_hub.get_info("teacher/accuracy/top1") <= 100
    assert len(runner.message_hub.get_info("teacher/single-label/recall_classwise")) == toy.CLASSES
    scalars = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert [sorted(json.loads(line)) for line in scalars] == [["step", "teacher/accuracy/top1"]]


def test_metrics_that_are_numbers_of_other_packages_are_logged(tmp_path, monkeypatch):
    runner = build_runner(toy.runner_config(tmp_path))
    found = {"a": np.float32(0.5), "b": torch.tensor(2), "c": 3, "d": torch.ones(2), "e": "good"}
    monkeypatch.setattr(runner.val_loop.evaluator, "evaluate", lambda size: found)
    TeacherEvaluationHook().before_train(runner)
    (scalars,) = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    expected = {"teacher/a": 0.5, "teacher/b": 2, "teacher/c": 3}
    assert json.loads(scalars) == {**expected, "step": 0}


@pytest.mark.parametrize("bias, warned", [(100.0, True), (0.0, False)])
def test_a_teacher_near_chance_is_warned_of(tmp_path, caplog, bias, warned):
    path = toy.teacher_file(tmp_path)
    weights = torch.load(path)
    weights["state_dict"]["head.fc.weight"].zero_()
    weights["state_dict"]["head.fc.bias"].zero_()[3] = bias  # always the digit 3
    torch.save(weights, path)
    cfg = toy.runner_config(tmp_path, toy.algorithm(teacher_ckpt=str(path)))
    if not warned:  # a validation set of threes alone: the same teacher is perfect
        weights["state_dict"]["head.fc.bias"][3] = 100.0
        torch.save(weights, path)
        from mskd_plugin.datasets import Digits

        threes = [i for i, d in enumerate(Digits(split="test")) if d["gt_label"] == 3]
        cfg.val_dataloader.dataset.indices = threes[:20]
    cfg.train_cfg.max_epochs = 1
    runner = build_runner(cfg)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    runner.logger.addHandler(handler)
    runner.train()
    assert any("near chance" in record.getMessage() for record in records) == warned
