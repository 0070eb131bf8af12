"""Settings that are named before anything is built or written."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import FlexibleRunner
from mmrazor.models.algorithms import BaseAlgorithm

from mskd_plugin import launch
from mskd_plugin.checks.settings import MAX_SEED, check_settings
from mskd_plugin.errors import SettingError


@pytest.fixture(autouse=True)
def started_by_nobody(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"optim_wrapper.type": "OptimWraper"},
            r"optim_wrapper\.type.*Did you mean 'OptimWrapper'",
        ),
        (
            {"default_hooks.network": dict(compile=False)},
            r"default_hooks\.network`.*a hook with a type.*Did you mean 'networks'",
        ),
        ({"default_hooks.networks.compile": dict(mod="max")}, r"compile.*'mod': 'max'"),
        (
            {"default_hooks.checkpoint.intervall": 2},
            r"`default_hooks\.checkpoint\.intervall` .* but got 2\. Did you mean 'interval'",
        ),
        (
            {"optim_wrapper.clip_grad": dict(max_nrm=1.0)},
            r"`optim_wrapper\.clip_grad\.max_nrm` .* but got 1\.0\. Did you mean 'max_norm'",
        ),
        (
            {"optim_wrapper.clip_grad": dict(type="value", max_norm=1.0)},
            r"`optim_wrapper\.clip_grad\.max_norm` .* torch's clipping, but got 1\.0\.",
        ),
        ({"optim_wrapper.optimizer.lr": math.nan}, r"`optim_wrapper\.optimizer\.lr` .* got nan"),
        ({"optim_wrapper.optimizer.lr": math.inf}, r"`optim_wrapper\.optimizer\.lr` .* got inf"),
        ({"load_from": 1}, "`load_from` to be the path of a checkpoint, but got 1"),
        ({"load_from": "/"}, "`load_from` to be a checkpoint, but got '/', which is a folder"),
        ({"load_from": "no.pth"}, "`load_from` to be a checkpoint, but got 'no.pth', which is not"),
        ({"randomness.seed": 2**32}, "`randomness.seed` .* at most 4294967295, but got 4294967296"),
        ({"launcher": "pytorch"}, "`--launcher` .* but got 'pytorch' without RANK in the env"),
        ({"launcher": "slurm"}, "`--launcher` .* but got 'slurm' without SLURM_PROCID"),
        ({"launcher": "mpi"}, "`--launcher` .* but got 'mpi' without OMPI_COMM_WORLD_RANK"),
        (
            {"default_hooks.checkpoint": dict(type=CheckpointHook, intervall=2)},
            r"`default_hooks\.checkpoint\.intervall` .* but got 2\. Did you mean 'interval'",
        ),
    ],
    ids=[
        *[
            "wrapper",
            "hook",
            "compile",
            "checkpoint",
            "clip",
            "clip value",
            "nan",
            "inf",
            "number",
            "folder",
            "load_from",
            "seed",
        ],
        *["torchrun", "slurm", "mpi", "class"],
    ],
)
def test_a_mistyped_setting_is_named_before_anything_is_written(tmp_path, options, told):
    cfg = toy.runner_config(tmp_path, **options)
    cfg.work_dir = str(tmp_path / "run")
    with pytest.raises(SettingError, match=told):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"load_from": "https://example.org/epoch_1.pth"},
        {"randomness.seed": MAX_SEED},
        {"default_hooks.checkpoint.priority": "LOW"},
        {"default_hooks.checkpoint.file_client_args": None},
        {"default_hooks.checkpoint.save_param_scheduler": False},
        {"default_hooks.checkpoint.meta": dict(note="of the runner's method alone")},
        {"optim_wrapper.type": OptimWrapper, "optim_wrapper.optimizer.type": torch.optim.SGD},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_mmengine_takes_is_not_refused(tmp_path, options):
    check_settings(toy.runner_config(tmp_path, **options))


def test_an_optimizer_that_does_not_exist_is_named(tmp_path):
    cfg = toy.runner_config(tmp_path, **{"optim_wrapper.optimizer.type": "SDG"})
    with pytest.raises(
        SettingError, match=r"optim_wrapper\.optimizer\.type.* 'SDG'\. Did you mean 'SGD'\?"
    ):
        launch.build_runner(cfg)


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
def test_a_configs_missing_teacher_is_told_before_anything_is_written(tmp_path, kind):
    model = toy.algorithm(kind, teacher_ckpt=str(tmp_path / "no.pth"))
    cfg = toy.runner_config(tmp_path / "run", model)
    with pytest.raises(SettingError, match=r"`model\.teacher_ckpt`.*no\.pth', which is not there"):
        launch.build_runner(cfg)
    cfg.model.teacher_ckpt = 3
    with pytest.raises(SettingError, match=r"`model\.teacher_ckpt` .* but got 3"):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()


def test_mmrazors_own_algorithm_reads_addresses_that_ours_does_not(tmp_path):
    address = "open-mmlab://resnet34"
    cfg = toy.runner_config(tmp_path, toy.algorithm("SingleTeacherDistill", teacher_ckpt=address))
    check_settings(cfg)
    cfg.model.type = "FrozenTeacherDistill"
    with pytest.raises(SettingError, match=r"`model\.teacher_ckpt` .*'open-mmlab://resnet34'"):
        check_settings(cfg)


def test_an_algorithm_of_ones_own_reads_its_teachers_itself(tmp_path):
    class TwoTeachers(BaseAlgorithm):
        pass

    model = toy.algorithm(TwoTeachers, teacher_ckpt=["one.pth", "two.pth"])
    check_settings(toy.runner_config(tmp_path, model))


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
@pytest.mark.parametrize(
    "key, value, told",
    [
        (
            "distill_losses.loss_mskd_stage4",
            dict(negatives="all"),
            r"\{'negatives': 'all'\}\. Did you mean 'loss_mskd_stage3'\?",
        ),
        ("distill_losses.other", dict(), r"\{\}\. The config has loss_mskd_stage3\."),
        ("connectors.stage3_studnt", dict(overlap=0.5), "Did you mean 'stage3_student'"),
        ("student_recorders.stage4", dict(source="backbone"), "Did you mean 'stage3'"),
        ("teacher_recorders.classifier_wight", dict(a=1), "Did you mean 'classifier_weight'"),
    ],
)
def test_an_entry_of_a_distiller_without_a_type(tmp_path, kind, key, value, told):
    cfg = toy.runner_config(tmp_path, toy.algorithm(kind))
    cfg.merge_from_dict({f"model.distiller.{key}": value})
    cfg.work_dir = str(tmp_path / "run")
    with pytest.raises(SettingError, match=rf"`model\.distiller\.{key}` .* type, but got .*{told}"):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mappings", [None, {}])
def test_a_loss_that_would_never_be_computed(tmp_path, mappings):
    model = toy.algorithm(teacher_ckpt=str(toy.teacher_file(tmp_path)))
    model["distiller"]["loss_forward_mappings"] = mappings
    cfg = toy.runner_config(tmp_path / "run", model)
    with pytest.raises(SettingError, match="`model.distiller.loss_forward_mappings.loss_mskd_st"):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["FrozenTeacherDistill", "SingleTeacherDistill"])
def test_a_preprocessor_without_a_type(tmp_path, kind):
    """As mmpretrain's own bases state it, whose classifiers have a default."""
    cfg = toy.runner_config(tmp_path, toy.algorithm(kind))
    cfg.work_dir = str(tmp_path / "run")
    del cfg.model.data_preprocessor["type"]
    with pytest.raises(SettingError, match=r"`data_preprocessor\.type` .* but got None"):
        launch.build_runner(cfg)
    # Of a config that `load_config` has not read.
    cfg.data_preprocessor = stated = cfg.model.pop("data_preprocessor")
    with pytest.raises(SettingError, match=r"`data_preprocessor\.type` .*'mmpretrain\.ClsDataPre"):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()
    cfg.model.data_preprocessor = None  # the config's is not taken
    check_settings(cfg)
    cfg.model = dict(cfg.model.architecture, data_preprocessor=stated)
    check_settings(cfg)


@pytest.mark.parametrize(
    "setting, least",
    [
        *((f"train_cfg.{name}", 1) for name in ("max_epochs", "max_iters", "val_interval")),
        *[("optim_wrapper.accumulative_counts", 1), ("randomness.seed", 0)],
        *[("default_hooks.logger.interval", 1), ("default_hooks.checkpoint.interval", -1)],
        ("default_hooks.checkpoint.max_keep_ckpts", -1),
        *((f"{stage}_dataloader.batch_size", 1) for stage in ("train", "val", "test")),
        *((f"{stage}_dataloader.num_workers", 0) for stage in ("train", "val", "test")),
    ],
)
def test_counts(tmp_path, setting, least):
    part, *_ = setting.split(".")
    for value in (least - 1, "many", 1.5, True):
        cfg = toy.runner_config(tmp_path, **{setting: value})
        cfg.work_dir = str(tmp_path / "run")
        expected = rf"`{setting}` to be a whole number of at least {least}, but got {value!r}"
        with pytest.raises(SettingError, match=expected):
            launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()
    check_settings(toy.runner_config(tmp_path, **{setting: least}))
    cfg[part] = None  # nothing is asked of a part that is not there
    check_settings(cfg)


def test_a_file_in_the_place_of_the_work_folder(tmp_path):
    (tmp_path / "file").touch()
    for work_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        cfg = toy.runner_config(tmp_path)
        cfg.work_dir = str(work_dir)
        with pytest.raises(
            SettingError, match=r"`--work-dir` to be a folder .*file.*, which is no folder"
        ):
            launch.build_runner(cfg)


def test_what_a_type_refuses_is_told_with_its_place(tmp_path):
    for settings, told in (
        (
            {"optim_wrapper.optimizer.lr": -1},
            r"ValueError: Invalid learning rate: -1 \(sgd\.py:\d+",
        ),
        ({"model.teacher": None}, r"AttributeError: 'NoneType' .*frozen_teacher_distill\.py:\d+"),
        ({"param_scheduler.type": "Nope"}, r"KeyError: 'Nope is not in the .* scheduler registry"),
        (
            {"param_scheduler.begin": 5, "param_scheduler.end": 4},
            "ValueError: end should be larger",
        ),
        ({"default_hooks.checkpoint.save_best": "foo"}, "ValueError: Cannot infer the rule for"),
    ):
        cfg = toy.runner_config(tmp_path, **settings)
        with pytest.raises(SettingError, match=f"`the config` .* but got {told}"):
            launch.build_runner(cfg)


def test_a_file_that_a_type_cannot_open_is_told(tmp_path, monkeypatch):
    def from_cfg(_):
        raise PermissionError(13, "Permission denied", "runs/log")

    monkeypatch.setattr(Runner, "from_cfg", from_cfg)
    with pytest.raises(SettingError, match="`the config` .* but got PermissionError: .*runs/log"):
        launch.build_runner(toy.runner_config(tmp_path))


def test_a_base_of_another_package(tmp_path):
    """Its dicts state the package that their types are of."""
    (tmp_path / "own.py").write_text('_base_ = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"\n')
    cfg = Config.fromfile(tmp_path / "own.py")
    assert cfg.default_hooks.checkpoint._scope_ == "mmpretrain"
    cfg.work_dir = str(tmp_path)
    check_settings(cfg)
    cfg.default_hooks.checkpoint.intervall = 1
    with pytest.raises(SettingError, match="checkpoint.intervall"):
        check_settings(cfg)


def test_optimizers_of_the_configs_package(tmp_path):
    DefaultScope._instance_dict.clear()  # as a tool's process begins
    settings = {"optim_wrapper.optimizer": dict(type="Lamb", lr=0.1, _delete_=True)}
    cfg = toy.runner_config(tmp_path, **settings)
    check_settings(cfg)
    cfg.default_scope = "mmengine"
    with pytest.raises(SettingError, match="optimizer.type.* 'Lamb'"):
        check_settings(cfg)


def test_an_optimizer_that_needs_another_model_is_one_error(tmp_path):
    cfg = toy.runner_config(tmp_path)
    # It reads the depths of layers, which a distillation does not tell.
    cfg.optim_wrapper.constructor = "LearningRateDecayOptimWrapperConstructor"
    cfg.optim_wrapper.paramwise_cfg = dict(layer_decay_rate=0.7)
    with pytest.raises(SettingError, match="NotImplementedError.*get_layer_depth"):
        launch.build_runner(cfg)


def test_initial_weights_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "start.pth").touch()
    check_settings(toy.runner_config(tmp_path / "run", load_from="~/start.pth"))


def test_a_rate_that_a_schedule_states_is_not_scaled(tmp_path):
    cfg = Config.fromfile(toy.ROOT / "configs" / "demo" / "student_resnet8_digits.py")
    cfg.work_dir = str(tmp_path)
    check_settings(cfg)
    cfg.auto_scale_lr.enable = True
    with pytest.raises(SettingError, match="`auto_scale_lr.enable` .* OneCycleLR of eta_max"):
        check_settings(cfg)


def test_a_runner_that_is_not_mmengines_own_builds_by_itself(tmp_path):
    cfg = toy.runner_config(tmp_path, runner_type="FlexibleRunner", env_cfg={})
    runner = launch.build_runner(cfg)
    assert isinstance(runner, FlexibleRunner) and isinstance(runner._train_dataloader, dict)
