"""The checks before training, in a real runner on a few digits: nothing has been trained when they
fail."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.optim import ZeroRedundancyOptimizer
from mmpretrain.datasets import CIFAR100
from mmpretrain.registry import DATASETS
from mmrazor.engine.hooks import StopDistillHook

from mskd_plugin.checks.data import check_data_roots
from mskd_plugin.checks.processes import check_saved_optimizer, check_stop
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import PreflightHook
from mskd_plugin.launch import build_runner


def test_preflight_counts_classes(tmp_path):
    networks = dict(architecture=toy.classifier("student", 7), teacher=toy.classifier("teacher", 7))
    networks["teacher_ckpt"] = str(toy.teacher_file(tmp_path, num_classes=7))
    toy.fails(
        toy.runner_config(tmp_path, toy.algorithm(**networks)),
        r"student\.head\.num_classes.*10, the number of classes of Digits, but got 7",
    )


def test_preflight_counts_the_classes_of_a_teacher_that_nobody_else_checks(tmp_path):
    model = toy.algorithm("SingleTeacherDistill", teacher=toy.classifier("teacher", 7))
    toy.fails(
        toy.runner_config(tmp_path, model),
        r"teacher\.head\.num_classes.*10, the number of classes of Digits, but got 7",
    )


def test_preflight_wants_a_loaded_teacher(tmp_path):
    toy.fails(
        toy.runner_config(tmp_path, toy.algorithm()), "teacher_ckpt.*--teacher FILE.*got None"
    )


@pytest.mark.parametrize("name, mean, std", [("mean", 1.0, 80.0), ("std", 80.0, 2.0)])
def test_preflight_compares_normalisations(tmp_path, name, mean, std):
    own = dict(mean=[mean] * 3, std=[std] * 3)
    teacher = dict(toy.classifier("teacher"), data_preprocessor=own)
    model = toy.algorithm(teacher=teacher, teacher_ckpt=str(toy.teacher_file(tmp_path)))
    value = f"{own[name][0]:.1f}"
    toy.fails(toy.runner_config(tmp_path, model), rf"data_preprocessor.*own {name} \[{value},")


@pytest.mark.parametrize("pipeline", [[], [dict(type="RandomFlip", prob=0.5)]], ids=len)
@pytest.mark.parametrize("model", [None, toy.classifier("student")], ids=["pair", "student"])
def test_preflight_wants_packed_images(tmp_path, model, pipeline):
    toy.fails(
        toy.runner_config(tmp_path, model, **{"train_dataloader.dataset.pipeline": pipeline}),
        r"`train_dataloader\.dataset\.pipeline` .* end with PackInputs, but got \[.*'img'.*\] from",
    )


def broken(path, value, **loss):
    """Return the toy distiller with one entry replaced."""
    cfg = toy.distiller(**loss)
    target = cfg
    *parents, last = path
    for key in parents:
        target = target[key]
    target[last] = value
    return cfg


@pytest.mark.parametrize(
    "path, value, match",
    [
        (
            ("connectors", "stage3_student", "in_channels"),
            9,
            "in_channels.*8 channels.*got 9",
        ),
        (("connectors", "stage3_teacher", "scales"), (1, 2), "student_regions.*2.*got 3"),
        (("connectors", "stage3_teacher", "scales"), (1, 2, 9), "scales.*scale 9.*side of 8"),
        (
            ("teacher_recorders", "stage3"),
            dict(type="ModuleInputs", source="head.loss_module"),
            "model.distiller.*record_idx",  # the teacher computes no loss: nothing is recorded
        ),
    ],
)
def test_preflight_runs_connectors_and_losses(tmp_path, path, value, match):
    model = toy.algorithm(
        distiller=broken(path, value), teacher_ckpt=str(toy.teacher_file(tmp_path))
    )
    toy.fails(toy.runner_config(tmp_path, model), match)


def test_preflight_refuses_to_categorize_another_stage(tmp_path):
    # The map before the last ReLU has the right width, and is not what the classifier reads.
    source = dict(type="ModuleOutputs", source="backbone.layer3.0.preact")
    teacher = str(toy.teacher_file(tmp_path))
    wrong = broken(("teacher_recorders", "stage3"), source, keep="consistent")
    model = toy.algorithm(distiller=wrong, teacher_ckpt=teacher)
    toy.fails(toy.runner_config(tmp_path / "wrong", model), "teacher_regions.*feeds the teacher's")
    right = toy.algorithm(distiller=toy.distiller(keep="consistent"), teacher_ckpt=teacher)
    _, steps = toy.train(toy.runner_config(tmp_path / "right", right))
    assert steps.count == 6


def test_preflight_finds_a_loss_that_is_not_finite(tmp_path):
    path = toy.teacher_file(tmp_path)
    weights = torch.load(path)
    weights["state_dict"]["backbone.layer3.0.bn2.weight"].fill_(float("nan"))
    torch.save(weights, path)
    model = toy.algorithm(teacher_ckpt=str(path))
    toy.fails(toy.runner_config(tmp_path, model), "distill.loss_mskd_stage3.*finite.*nan")


@pytest.mark.parametrize(
    "model, passed",
    [
        (None, "data, teacher, recorders, connectors, losses"),
        (toy.classifier("student"), "data"),
    ],
    ids=["pair", "student"],
)
def test_preflight_tells_what_was_looked_at(tmp_path, model, passed, monkeypatch):
    runner = build_runner(toy.runner_config(tmp_path, model))
    told = []
    monkeypatch.setattr(runner.logger, "info", told.append)
    PreflightHook().before_train(runner)
    assert told[-1] == f"Preflight passed: {passed}."


def test_preflight_changes_nothing(tmp_path):
    results = []
    for hooks in ([dict(type="PreflightHook"), dict(type="TeacherEvaluationHook")], []):
        cfg = toy.runner_config(tmp_path / str(len(hooks)), custom_hooks=hooks)
        runner, steps = toy.train(cfg)
        results.append((steps.inputs, runner.model.state_dict()))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


@pytest.mark.parametrize("wrapper", ["OptimWrapper", "BFloat16OptimWrapper"])
def test_preflight_computes_as_the_training(tmp_path, wrapper):
    runner = build_runner(toy.runner_config(tmp_path, **{"optim_wrapper.type": wrapper}))
    preprocess, training, autocast = runner.model.data_preprocessor.forward, [], []

    def noted(batch, mode=False):
        training.append(mode)
        return preprocess(batch, mode)

    runner.model.data_preprocessor.forward = noted
    runner.model.student.head.register_forward_hook(
        lambda *_: autocast.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
    )
    PreflightHook().before_train(runner)
    assert training == [False, True]  # validation, then the losses
    last = torch.bfloat16 if wrapper == "BFloat16OptimWrapper" else torch.float32
    assert autocast == [torch.float32, last]


def test_preflight_compares_the_starts_of_the_processes(tmp_path, monkeypatch):
    starts = lambda own: [own, (1, 3)]  # noqa: E731
    monkeypatch.setattr("mskd_plugin.checks.processes.all_gather_object", starts)
    toy.fails(toy.runner_config(tmp_path), r"--work-dir.*all nodes share.*\[\(0, 0\), \(1, 3\)\]")


@pytest.mark.parametrize("unused", [False, True, None])
def test_preflight_wants_unused_parameters_found_where_distillation_stops(tmp_path, unused):
    runner = build_runner(toy.runner_config(tmp_path))
    runner.register_hook(StopDistillHook(stop_epoch=1))
    model = runner.model
    if unused is not None:  # as in DistributedDataParallel
        model.find_unused_parameters = unused
    if unused is False:
        with pytest.raises(SettingError, match="find_unused_parameters.*StopDistillHook"):
            check_stop(runner, model)
        model.distiller.requires_grad_(False)
    check_stop(runner, model)
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, StopDistillHook)]
    model.distiller.requires_grad_(True)
    check_stop(runner, model)


@pytest.mark.parametrize(
    "processes, saved, refused", [(2, True, True), (2, False, False), (1, True, False)]
)
def test_preflight_refuses_an_optimizer_that_one_process_cannot_save(
    tmp_path, processes, saved, refused
):
    save = {"default_hooks.checkpoint.save_optimizer": saved}
    runner = build_runner(toy.runner_config(tmp_path, **save))
    check_saved_optimizer(runner, runner.model)
    spread = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)  # made by several processes
    runner.optim_wrapper.optimizer, runner._world_size = spread, processes
    told = "`optim_wrapper.optimizer.type` .* one process can save, but got 'ZeroRedundancyOptim"
    with pytest.raises(SettingError, match=told) if refused else nullcontext():
        check_saved_optimizer(runner, runner.model)


def test_preflight_refuses_records_inside_what_is_recomputed(tmp_path):
    cfg = toy.runner_config(tmp_path, activation_checkpointing=["architecture.backbone"])
    toy.fails(
        cfg, "activation_checkpointing.*'architecture.backbone', with a recorder of 'backbone"
    )
    cfg = toy.runner_config(tmp_path / "b", activation_checkpointing="architecture.backbone.layer3")
    toy.train(cfg)  # the record is what the module returns


def test_missing_data_are_named(tmp_path):
    cfg = toy.runner_config(tmp_path)
    cfg.train_dataloader.dataset.data_root = str(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="train_dataloader.dataset.data_root.*nowhere"):
        build_runner(cfg)


def test_cifar_100_is_downloaded_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(toy.ROOT / "configs" / "cifar100" / "teacher_resnet32x4.py")
    check_data_roots(cfg)  # passes, although the folder is not there

    def download(url, root, **_):
        assert (url, Path(root)) == (CIFAR100.url, Path("data/cifar100"))
        for name, count in (("train", 3), ("test", 2)):
            file = Path(root, CIFAR100.base_folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            images = dict(data=np.zeros((count, 3072), np.uint8), fine_labels=[*range(count)])
            file.write_bytes(pickle.dumps(images))

    monkeypatch.setattr("mmpretrain.datasets.cifar.download_and_extract_archive", download)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda _: Path("data/cifar100").exists())
    for loader, count in (("train_dataloader", 3), ("test_dataloader", 2)):
        assert len(DATASETS.build(cfg[loader].dataset)) == count


def test_a_teacher_without_weights_is_told_before_data_are_downloaded(tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError("downloaded")

    monkeypatch.setattr("mmpretrain.datasets.cifar.download_and_extract_archive", download)
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(toy.ROOT / "configs" / "cifar100" / "mskd_resnet32x4_resnet8x4.py")
    cfg.update(work_dir=str(tmp_path), launcher="none", log_level="ERROR")
    with pytest.raises(SettingError, match="`teacher_ckpt` to be the teacher's weights"):
        build_runner(cfg)
