"""The checks before training by themselves; test_preflight.py has them inside a run."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample
from torch.utils import checkpoint
from torch.utils.data import DataLoader

from mskd_plugin.checks.settings import check_data_roots
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.data_checks import tell_batch_augments
from mskd_plugin.hooks.preflight import (
    PreflightHook,
    _unchanged,
    _watch_categorization,
    check_batch_size,
    check_losses,
    check_schedules,
    check_teacher,
    tell_accumulation,
)
from mskd_plugin.hooks.trial import check_recorded, first_images, read_items
from mskd_plugin.launch import build_runner
from mskd_plugin.switches import use_in_memory


def test_a_teacher_that_trains_may_begin_at_random():
    check_teacher(toy.build(teacher_trainable=True), torch.nn.Identity())
    with pytest.raises(SettingError, match="teacher_ckpt"):
        check_teacher(toy.build(), torch.nn.Identity())


def test_data_sets_of_none_and_of_one_image():
    for loader in ("train_dataloader", "val_dataloader"):
        with pytest.raises(SettingError, match=f"{loader}.dataset.*at least one.*empty"):
            read_items([], loader)
    assert first_images(DataLoader([7])).tolist() == [7, 7]
    assert first_images(DataLoader([7, 8, 9])).tolist() == [7, 8]


def test_images_are_read_as_torch_would():
    class Batches(list):
        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            return [10 * index for index in indices]

    assert first_images(DataLoader(Batches([7, 8, 9]))).tolist() == [0, 10]


def test_model_and_mode_stay_as_they_were():
    model = toy.build(distiller=toy.distiller(keep="consistent"))
    handles = _watch_categorization(model)
    assert len(handles) == 2 and not _watch_categorization(toy.build())
    for handle in handles:
        handle.remove()
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    check_losses(model.eval(), DataLoader(samples, collate_fn=default_collate))
    hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks]
    assert not hooked and not model.teacher._forward_hooks
    for training in (False, True):
        model.train(training)
        with _unchanged(model):
            assert not model.student.training and not torch.is_grad_enabled()
        assert model.student.training is training


def test_a_stage_of_another_width_than_the_classifiers_is_named():
    distiller = toy.distiller(keep="consistent")
    distiller["teacher_recorders"]["stage3"]["source"] = "backbone.layer2"
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    with pytest.raises(SettingError, match="`classifier_weight`.*this stage's 8 channels"):
        check_losses(
            toy.build(distiller=distiller), DataLoader(samples, collate_fn=default_collate)
        )


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
    loader = DataLoader(samples, collate_fn=default_collate)
    with model.distiller.student_recorders:
        model.train().student(**model.data_preprocessor(first_images(loader)), mode="loss")
    record = model.distiller.get_record("stage3", from_student=True, record_idx=-1)
    assert record.requires_grad is trains
    model.eval()
    with torch.no_grad():
        if trains:
            check_recorded(model, loader)
        else:
            with pytest.raises(SettingError, match="`with_cp`.*'backbone.layer1.0.conv2'"):
                check_recorded(model, loader)
    hooks = dict(model.student.named_modules())[f"backbone.{source}"]._forward_hooks
    assert len(hooks) == 1  # the recorder's


@pytest.mark.parametrize("shared, told", [({}, True), ({"batch_augments": True}, False)])
def test_batch_augments_that_the_student_alone_states_are_told(shared, told):
    mixing = dict(augments=[dict(type="mmpretrain.Mixup", alpha=0.8)])
    preprocessor = dict(toy.PREPROCESSOR, num_classes=toy.CLASSES)
    if shared:
        preprocessor["batch_augments"] = mixing
    messages = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=messages.append))
    student = dict(toy.classifier("student"), train_cfg=mixing)
    tell_batch_augments(runner, toy.build(architecture=student, data_preprocessor=preprocessor))
    tell_batch_augments(runner, toy.build())  # nobody states any
    assert [message.split(" are ")[0] for message in messages] == (
        ["The student's own batch augments (Mixup)"] * told
    )


def test_a_loss_of_the_students_own_that_fails_is_not_the_distillers():
    student = toy.classifier("student")
    student["head"]["loss"]["use_sigmoid"] = True  # wants one-hot labels
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    loader = DataLoader(samples, collate_fn=default_collate)
    with pytest.raises(SettingError, match="`model.architecture`.*AssertionError.*no message"):
        check_losses(toy.build(architecture=student), loader)
    distiller = toy.distiller()
    distiller["loss_forward_mappings"]["loss_mskd_stage3"]["student_regions"]["record_idx"] = 7
    with pytest.raises(SettingError, match="`model.distiller`.*Error on two training images"):
        check_losses(toy.build(distiller=distiller), loader)


def test_mmrazors_losses_of_another_input_are_named():
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample().set_gt_label(0))] * 2
    loader = DataLoader(samples, collate_fn=default_collate)
    distiller = toy.distiller()
    mappings, losses = distiller["loss_forward_mappings"], distiller["distill_losses"]
    losses["loss_mskd_stage3"] = dict(type="L2Loss")  # given tuples of regions
    regions = mappings["loss_mskd_stage3"].values()
    mappings["loss_mskd_stage3"] = dict(zip(("s_feature", "t_feature"), regions))
    with pytest.raises(SettingError, match="`model.distiller`.*AttributeError on two training"):
        check_losses(toy.build(distiller=distiller), loader)
    losses["loss_mskd_stage3"] = dict(type="MGDLoss")  # given vectors
    distiller["student_recorders"]["stage3"]["source"] = "neck"
    vectors = dict(recorder="stage3", from_student=True, data_idx=0)
    mappings["loss_mskd_stage3"] = dict(preds_S=vectors, preds_T=vectors)
    with pytest.raises(SettingError, match="`model.distiller`.*ValueError on two training"):
        check_losses(toy.build(distiller=distiller), loader)


def test_images_without_labels_are_named():
    samples = [dict(inputs=torch.zeros(3, 32, 32), data_samples=DataSample())] * 2
    loader = DataLoader(samples, collate_fn=default_collate)
    with pytest.raises(SettingError, match="`model.architecture`.*these images and labels.*gt_lab"):
        check_losses(toy.build(), loader)


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


def test_data_roots_inside_wrappers_and_elsewhere(tmp_path):
    inner = dict(type="CIFAR10", data_root=str(tmp_path / "nowhere"))
    wrapped = dict(type="RepeatDataset", times=2, dataset=dict(type="KFoldDataset", dataset=inner))
    with pytest.raises(SettingError, match="val_dataloader.dataset.data_root.*nowhere"):
        check_data_roots(Config(dict(val_dataloader=dict(dataset=wrapped))))
    inner["data_root"] = "s3://bucket/images"  # not on this machine
    check_data_roots(Config(dict(val_dataloader=dict(dataset=wrapped))))


def test_no_scaling_is_advised_where_it_is_refused():
    messages = []
    runner = SimpleNamespace(
        cfg=Config(dict(auto_scale_lr=dict(base_batch_size=16), param_scheduler=[])),
        train_dataloader=DataLoader(range(64), batch_size=8),
        world_size=1,
        logger=SimpleNamespace(warning=messages.append),
    )
    for schedulers in ([], [dict(type="OneCycleLR", eta_max=0.1)]):
        runner.cfg.param_scheduler = schedulers
        check_batch_size(runner)
    follows, states_its_own = messages
    assert follows.endswith("auto_scale_lr.base_batch_size=16: --auto-scale-lr scales it.")
    assert states_its_own.endswith("auto_scale_lr.base_batch_size=16.")


@pytest.mark.parametrize(
    ("world_size", "size", "accumulated", "told"),
    [(1, 8, 2, False), (2, 8, 1, False), (2, 8, 2, True), (1, 8, 1, True), (4, 2, 2, False)],
)
def test_a_step_takes_the_images_of_all_processes_and_batches(world_size, size, accumulated, told):
    messages = []
    runner = SimpleNamespace(
        cfg=dict(
            auto_scale_lr=dict(base_batch_size=16),
            optim_wrapper=dict(accumulative_counts=accumulated),
        ),
        train_dataloader=DataLoader(range(64), batch_size=size),
        world_size=world_size,
        logger=SimpleNamespace(warning=messages.append),
    )
    check_batch_size(runner)
    assert len(messages) == told
    messages.clear()
    tell_accumulation(runner)
    assert len(messages) == (accumulated > 1)


def test_an_optimizer_for_each_network_is_no_reason_to_refuse(tmp_path):
    runner = build_runner(toy.runner_config(tmp_path))
    runner.optim_wrapper = OptimWrapperDict(architecture=runner.optim_wrapper)
    PreflightHook().before_train(runner)


@pytest.mark.parametrize(
    ("begin", "end", "fits"),
    [(0, 3, True), (1, 4, True), (2, 9, True), (0, 9, False), (1, 5, False)],
)
def test_a_cycle_takes_the_steps_between_its_begin_and_its_end(begin, end, fits):
    cycle = SimpleNamespace(total_steps=3, by_epoch=True, begin=begin, end=end)
    runner = SimpleNamespace(param_schedulers=[cycle], max_epochs=5, max_iters=50)
    if fits:
        return check_schedules(runner)
    with pytest.raises(SettingError, match=f"at least the {5 - begin} epochs .* but got 3 of"):
        check_schedules(runner)
