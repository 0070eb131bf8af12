"""The checks of networks and losses by themselves; test_preflight.py has them inside a run."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.dataset import default_collate
from mmengine.optim import OptimWrapperDict
from mmpretrain.structures import DataSample
from torch.utils import checkpoint
from torch.utils.data import DataLoader

from mskd_plugin.checks.data import first_images
from mskd_plugin.checks.distillation import _watch_categorization, check_losses, check_recorded
from mskd_plugin.checks.networks import check_teacher
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import PreflightHook
from mskd_plugin.launch import build_runner
from mskd_plugin.unchanged import unchanged


def runner_of(samples):
    """Return what the checks look at of a runner that trains on these images."""
    return SimpleNamespace(train_dataloader=DataLoader(samples, collate_fn=default_collate))


def test_a_teacher_that_trains_may_begin_at_random():
    check_teacher(None, toy.build(teacher_trainable=True))
    with pytest.raises(SettingError, match="teacher_ckpt"):
        check_teacher(None, toy.build())


def test_model_and_mode_stay_as_they_were():
    model = toy.build(distiller=toy.distiller(keep="consistent"))
    handles = _watch_categorization(model)
    assert len(handles) == 2 and not _watch_categorization(toy.build())
    for handle in handles:
        handle.remove()
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    check_losses(runner_of(samples), model.eval())
    hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks]
    assert not hooked and not model.teacher._forward_hooks
    for training in (False, True):
        model.train(training)
        with unchanged(model):
            assert not model.student.training and not torch.is_grad_enabled()
        assert model.student.training is training


def test_a_stage_of_another_width_than_the_classifiers_is_named():
    distiller = toy.distiller(keep="consistent")
    distiller["teacher_recorders"]["stage3"]["source"] = "backbone.layer2"
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    with pytest.raises(SettingError, match="`classifier_weight`.*this stage's 8 channels"):
        check_losses(runner_of(samples), toy.build(distiller=distiller))


@pytest.mark.parametrize(
    "source, trains",
    [
        ("layer1.0.conv2", False),
        ("layer1.0.relu", True),
        ("layer1.0.bn2", True),
        ("layer1.0", True),
    ],
)
def test_records_inside_blocks_that_are_recomputed_are_refused(source, trains, monkeypatch):
    reentrant = functools.partial(checkpoint.checkpoint, use_reentrant=True)  # as mmpretrain's
    monkeypatch.setattr(checkpoint, "checkpoint", reentrant)
    student = toy.classifier("student")
    student["backbone"] = dict(
        type="ResNet_CIFAR", depth=18, stem_channels=4, base_channels=4, with_cp=True
    )
    student["head"]["in_channels"] = 32
    distiller = toy.distiller()
    recorders = distiller["student_recorders"]
    recorders["stage3"]["source"] = f"backbone.{source}"
    recorders["weight"] = dict(type="Parameter", source="head.fc.weight")  # of no module
    model = toy.build(architecture=student, distiller=distiller)
    model.distiller.connectors["stage3_student"] = torch.nn.Identity()
    model.distiller.connectors["stage3_teacher"] = torch.nn.Identity()
    samples = [dict(inputs=torch.rand(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    runner = runner_of(samples)
    with model.distiller.student_recorders:
        model.train().student(
            **model.data_preprocessor(first_images(runner.train_dataloader)), mode="loss"
        )
    record = model.distiller.get_record("stage3", from_student=True, record_idx=-1)
    assert record.requires_grad is trains
    model.eval()
    with torch.no_grad():
        if trains:
            check_recorded(runner, model)
        else:
            with pytest.raises(SettingError, match="`with_cp`.*'backbone.layer1.0.conv2'"):
                check_recorded(runner, model)
    hooks = dict(model.student.named_modules())[f"backbone.{source}"]._forward_hooks
    assert len(hooks) == 1  # the recorder's


def test_a_loss_of_the_students_own_that_fails_is_not_the_distillers():
    student = toy.classifier("student")
    student["head"]["loss"]["use_sigmoid"] = True  # wants one-hot labels
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    runner = runner_of(samples)
    with pytest.raises(SettingError, match="`model.architecture`.*AssertionError.*no message"):
        check_losses(runner, toy.build(architecture=student))
    distiller = toy.distiller()
    distiller["loss_forward_mappings"]["loss_mskd_stage3"]["student_regions"]["record_idx"] = 7
    with pytest.raises(SettingError, match="`model.distiller`.*Error on two training images"):
        check_losses(runner, toy.build(distiller=distiller))


def test_mmrazors_losses_of_another_input_are_named():
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    runner = runner_of(samples)
    distiller = toy.distiller()
    mappings, losses = distiller["loss_forward_mappings"], distiller["distill_losses"]
    losses["loss_mskd_stage3"] = dict(type="L2Loss")  # given tuples of regions
    regions = mappings["loss_mskd_stage3"].values()
    mappings["loss_mskd_stage3"] = dict(zip(("s_feature", "t_feature"), regions))
    with pytest.raises(SettingError, match="`model.distiller`.*AttributeError on two training"):
        check_losses(runner, toy.build(distiller=distiller))
    losses["loss_mskd_stage3"] = dict(type="MGDLoss")  # given vectors
    distiller["student_recorders"]["stage3"]["source"] = "neck"
    vectors = dict(recorder="stage3", from_student=True, data_idx=0)
    mappings["loss_mskd_stage3"] = dict(preds_S=vectors, preds_T=vectors)
    with pytest.raises(SettingError, match="`model.distiller`.*ValueError on two training"):
        check_losses(runner, toy.build(distiller=distiller))


def test_images_without_labels_are_named():
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample())] * 2
    runner = runner_of(samples)
    with pytest.raises(SettingError, match="`model.architecture`.*these images and labels.*gt_lab"):
        check_losses(runner, toy.build())


def test_an_optimizer_for_each_network_is_no_reason_to_refuse(tmp_path, monkeypatch):
    runner = build_runner(toy.runner_config(tmp_path))
    runner.optim_wrapper = OptimWrapperDict(architecture=runner.optim_wrapper)
    told = []
    monkeypatch.setattr(runner.logger, "info", told.append)
    PreflightHook().before_train(runner)
    assert told[-1] == "Preflight passed: data, teacher."  # the losses were not tried
