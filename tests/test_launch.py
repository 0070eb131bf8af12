"""What the tools share, function by function: the student, the teacher, resuming, the runner."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import init_default_scope
from mmpretrain.datasets import RandomResizedCrop
from mmrazor.registry import MODELS
from tool_runs import MSKD, load

from mskd_plugin import launch
from mskd_plugin.datasets import Digits
from mskd_plugin.errors import SettingError
from mskd_plugin.launch.config import for_classifier

# --- the student, the teacher, resuming ----------------------------------------------------------


def test_the_student_takes_the_algorithms_place():
    cfg = load()
    preprocessor, student = cfg.model.data_preprocessor, cfg.model.architecture
    launch.keep_student_only(cfg)
    assert cfg.model == {**student, "data_preprocessor": preprocessor}
    assert cfg.model.type == "ImageClassifier" and cfg.model.backbone.depth == 8
    before = cfg.copy()
    launch.keep_student_only(cfg)  # nothing to take out any more
    assert cfg.model == before.model


@pytest.mark.parametrize("stated", ["by the algorithm", "by the config", "None"])
def test_the_student_gets_the_images_as_in_training(stated):
    model, other = toy.algorithm(), dict(toy.PREPROCESSOR, mean=[1.0] * 3)
    model["architecture"]["data_preprocessor"] = dict(mean=[2.0] * 3, std=[2.0] * 3)
    if stated == "by the config":
        del model["data_preprocessor"]
    elif stated == "None":
        model["data_preprocessor"] = None
    cfg = Config(dict(model=model, data_preprocessor=other))
    trained = MODELS.build({"data_preprocessor": other, **model})  # as the runner does
    launch.keep_student_only(cfg)
    tested = MODELS.build(cfg.model)
    assert torch.equal(tested.data_preprocessor.mean, trained.data_preprocessor.mean)


def test_the_runners_preprocessor_is_not_kept_from_the_student():
    cfg = Config(dict(model=toy.algorithm(data_preprocessor=None), data_preprocessor=dict(a=1)))
    launch.keep_student_only(cfg)
    assert "data_preprocessor" not in cfg.model  # a key with None would hide the config's own


def test_a_student_named_by_another_packages_config():
    path = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"
    cfg = Config(dict(model=dict(toy.algorithm(), architecture=dict(cfg_path=path))))
    launch.keep_student_only(cfg)
    assert (cfg.model.backbone.type, cfg.model.backbone.depth) == ("ResNet_CIFAR", 18)
    assert cfg.model.data_preprocessor.mean == [80.0] * 3


def test_mmengines_preprocessor_becomes_a_classifiers():
    images = (torch.rand(2, 3, 4, 4) * 255).round()
    own = dict(type="mmengine.ImgDataPreprocessor", mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    own |= dict(bgr_to_rgb=True, pad_size_divisor=3, non_blocking=True)
    cfg = Config(dict(model=toy.algorithm(data_preprocessor=own), data_preprocessor=own))
    expected = MODELS.build(dict(own))(dict(inputs=list(images)))["inputs"]
    launch.keep_student_only(cfg)
    assert "data_preprocessor" not in cfg
    classifiers = cfg.model.data_preprocessor.copy()
    student = MODELS.build(cfg.model)  # which hands it batch augmentations
    given = student.data_preprocessor(dict(inputs=list(images)))["inputs"]
    assert torch.equal(given, expected) and given.shape == (2, 3, 6, 6)
    assert for_classifier(dict(own, bgr_to_rgb=False))["to_rgb"] is False
    as_class = for_classifier(dict(own, type=ImgDataPreprocessor))
    assert as_class == classifiers
    classes = dict(type="ClsDataPreprocessor")  # of a pure Python config it would not print copied
    assert for_classifier(classes) is classes
    other = for_classifier(dict(own, bgr_to_rgb=False, rgb_to_bgr=True))
    assert other == for_classifier(own) and other["to_rgb"] is True


def test_the_teachers_weights(tmp_path, monkeypatch):
    cfg = load()
    with pytest.raises(SettingError, match=r"`--teacher` to be a file, a URL or .*'none\.pth'"):
        launch.set_teacher(cfg, "none.pth")
    with pytest.raises(SettingError, match="`--teacher`.*which is a folder"):
        launch.set_teacher(cfg, str(tmp_path))  # a folder
    assert cfg.model.teacher_ckpt is None
    for source in ("torchvision://resnet34", "https://example.org/teacher.pth"):
        launch.set_teacher(cfg, source)
        assert cfg.model.teacher_ckpt == source
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.pth").touch()
    for source in (str(tmp_path / "t.pth"), "~/t.pth"):
        launch.set_teacher(cfg, source)
        assert cfg.model.teacher_ckpt == source
    cfg.model.type = "mmrazor.FrozenTeacherDistill"
    launch.set_teacher(cfg, str(tmp_path / "t.pth"))
    cfg.model.type = "SingleTeacherDistill"  # weights that do not fit would leave it at random
    with pytest.raises(SettingError, match="`--teacher` .*FrozenTeacherDistill.* a SingleTeacher"):
        launch.set_teacher(cfg, str(tmp_path / "t.pth"))
    alone = load(config=toy.ROOT / "configs" / "demo" / "student_resnet8_digits.py")
    with pytest.raises(SettingError, match="`--teacher` to be no value for a config without a tea"):
        launch.set_teacher(alone, str(tmp_path / "t.pth"))
    assert "teacher_ckpt" not in alone.model


def test_resuming(tmp_path, monkeypatch):
    cfg = load()
    with pytest.raises(SettingError, match=r"`--resume` to be a checkpoint, .*epoch_9\.pth"):
        launch.set_resume(cfg, str(tmp_path / "epoch_9.pth"))
    cfg = load()
    launch.set_resume(cfg, "auto")
    assert (cfg.resume, cfg.load_from) == (True, None)
    (tmp_path / "epoch_9.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (str(tmp_path / "epoch_9.pth"), "~/epoch_9.pth"):  # MMEngine reads both
        launch.set_resume(cfg, file)
        assert (cfg.resume, cfg.load_from) == (True, file)


def test_the_work_folder_goes_before_initial_weights(tmp_path):
    class PowerCut(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                raise KeyboardInterrupt

    torch.save(toy.build(seed=5).state_dict(), tmp_path / "init.pth")

    def train(name, *hooks):
        cfg = toy.runner_config(tmp_path / name, load_from=str(tmp_path / "init.pth"))
        launch.set_resume(cfg, "auto")
        runner = launch.build_runner(cfg)
        for hook in hooks:
            runner.register_hook(hook)
        runner.train()
        return cfg, runner.model.state_dict()

    with pytest.raises(KeyboardInterrupt):
        train("parts", PowerCut())
    cfg, resumed = train("parts")
    assert cfg.resume and cfg.load_from == str(tmp_path / "parts" / "epoch_1.pth")
    cfg, whole = train("whole")
    assert not cfg.resume and cfg.load_from == str(tmp_path / "init.pth")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_used_work_dir(tmp_path, monkeypatch):
    cfg = load("--work-dir", str(tmp_path))
    launch.check_work_dir(cfg)
    (tmp_path / "20260101_000000").mkdir()  # logs alone
    launch.check_work_dir(cfg)
    (tmp_path / "last_checkpoint").touch()
    with pytest.raises(SettingError, match="`--work-dir` .* --resume to continue .*overwritten"):
        launch.check_work_dir(cfg)
    cfg.resume = True
    launch.check_work_dir(cfg)
    cfg.load_from = str(tmp_path / "epoch_9.pth")
    launch.check_work_dir(cfg)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "out_dir" / "epoch_8.pth"))
    cfg.load_from = str(tmp_path / "out_dir" / "epoch_7.pth")  # CheckpointHook's
    launch.check_work_dir(cfg)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_9.pth"))
    monkeypatch.chdir(tmp_path.parent)
    cfg.load_from = f"{tmp_path.name}/epoch_9.pth"
    launch.check_work_dir(cfg)
    cfg.load_from = str(tmp_path / "another run" / "epoch_9.pth")
    with pytest.raises(SettingError, match="`--work-dir` .* --resume to continue from its own"):
        launch.check_work_dir(cfg)
    (tmp_path / "last_checkpoint").write_text("/where/the/folder/was/epoch_9.pth")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    cfg.work_dir = tmp_path.name
    for path in (tmp_path, f"~/{tmp_path.name}"):
        cfg.load_from = f"{path}/epoch_9.pth"
        launch.check_work_dir(cfg)


HELD = []


def begin_to_train(cfg):
    """Take the work folder, for as long as the process lives."""
    HELD.append(launch.work_dir_held(cfg))
    HELD[-1].__enter__()
    return os.getpid()


def test_one_process_at_a_time_trains_in_a_work_folder(tmp_path, monkeypatch):
    cfg = load("--work-dir", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply(begin_to_train, (cfg,))
        message = rf"`--work-dir` to be a folder that no other .* of process {other} on "
        with pytest.raises(SettingError, match=message), launch.work_dir_held(cfg):
            pass
        cfg.launcher = "pytorch"
        monkeypatch.setenv("RANK", "1")  # the first process of the training asks
        with launch.work_dir_held(cfg):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SettingError, match=message):
            toy.tool("train").main([MSKD, "--work-dir", str(tmp_path)])
    for _ in range(2):  # the pool has killed it
        with launch.work_dir_held(cfg):
            assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_training_goes_on(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    cfg = load("--work-dir", str(tmp_path / "run"))
    for name, missing in (("fcntl.lockf", lockf), ("fcntl", None)):  # on some disks, on Windows
        monkeypatch.setattr(f"mskd_plugin.launch.work_dir.{name}", missing)
        with launch.work_dir_held(cfg):
            pass


def test_a_refused_training_leaves_no_work_folder(tmp_path):
    cfg = load("--work-dir", str(tmp_path / "new" / "run"))
    with pytest.raises(ZeroDivisionError), launch.work_dir_held(cfg):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


# --- the images' size ----------------------------------------------------------------------------

CROP, RESIZED = dict(type="mmpretrain.RandomCrop", crop_size=28), dict(type=RandomResizedCrop)


@pytest.mark.parametrize(
    "dataset, side",
    [
        (dict(pipeline=[dict(RESIZED, scale=(224, 224)), dict(type="PackInputs")]), 224),
        (dict(pipeline=[dict(RESIZED, scale=64), CROP]), 28),  # the images are the last one's
        (dict(type="RepeatDataset", dataset=dict(pipeline=[CROP])), 28),
        (dict(type="InMemoryImages", crop_size=24, dataset=dict(pipeline=[])), 24),
        (dict(type="InMemoryImages", dataset=dict(pipeline=[dict(type="Resize", scale=9)])), None),
        (None, None),
    ],
)
def test_the_side_of_the_crops(dataset, side):
    assert launch.image_side(dict(dataset=dataset)) == side


# --- the runner ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("model.architecture.backbone.type", "CIFARResNeXt", "CIFARResNeXt"),
        ("model.architecture.backbone.dept", 8, "dept"),
        ("model.distiller.distill_losses.loss_mskd_stage3.temprature", 1, "temprature"),
        ("train_dataloader.batch_sise", 8, "batch_sise"),
        ("train_dataloader.dataset.splt", "train", "splt"),
        ("train_cfg.max_epoch", 3, "max_epoch"),
        ("optim_wrapper.optimizer.learning_rate", 0.1, "learning_rate"),
        ("val_evaluator.top", 1, "top"),
        ("default_hooks.checkpoint.type", "CheckpointHok", "CheckpointHok"),
    ],
)
def test_a_type_or_setting_that_does_not_exist_is_named(tmp_path, key, value, named):
    cfg = toy.runner_config(tmp_path, **{key: value})
    with pytest.raises(SettingError, match=rf"`the config` to be types that are .*\b{named}\b"):
        launch.build_runner(cfg)


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = toy.runner_config(tmp_path)
    backends = [dict(type="WandbVisBackend")]
    cfg.visualizer = dict(type="UniversalVisualizer", vis_backends=backends)
    with pytest.raises(SettingError, match="`the config` .* ImportError: .*pip install wandb"):
        launch.build_runner(cfg)


def test_a_runner_type_of_ones_own(tmp_path):
    cfg = toy.runner_config(tmp_path)
    cfg.runner_type = "Runner"
    assert launch.build_runner(cfg).max_epochs == 2


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_data_that_do_not_fit_their_type_are_named(tmp_path, stage):
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    cfg = toy.runner_config(tmp_path / "run")
    cfg[f"{stage}_dataloader"].dataset = dict(
        type="ImageNet", data_root=str(tmp_path / "images"), split="train", pipeline=[]
    )
    expected = rf"{stage}_dataloader.dataset.*\(1\) doesn't match .*\(1000\)"
    with pytest.raises(SettingError, match=expected):
        launch.build_runner(cfg)


@pytest.mark.parametrize("error", [RuntimeError, FileNotFoundError])  # torchvision's, a folder's
def test_data_that_cannot_be_fetched_are_named(tmp_path, monkeypatch, error):
    load_data_list, fetched = Digits.load_data_list, []

    def fetch(self):
        fetched.append(self.split)
        if self.split == "test":
            raise error("Dataset not found or corrupted")
        return load_data_list(self)

    monkeypatch.setattr(Digits, "load_data_list", fetch)
    cfg = toy.runner_config(tmp_path)
    init_default_scope(cfg.default_scope)
    for build in (launch.build_datasets, launch.build_runner):
        with pytest.raises(SettingError, match=r"`val_dataloader\.dataset` .*: Dataset not found"):
            build(cfg)
    cfg.val_dataloader = None
    fetched.clear()
    launch.build_datasets(cfg)
    assert fetched == ["train"]
    cfg.train_dataloader.dataset.data_root = str(tmp_path / "nowhere")
    with pytest.raises(SettingError, match=r"`train_dataloader\.dataset\.data_root` .*nowhere"):
        launch.build_datasets(cfg)


def test_a_hook_may_be_switched_off(tmp_path):
    cfg = toy.runner_config(tmp_path, **{"default_hooks.timer": None})
    names = {type(hook).__name__ for hook in launch.build_runner(cfg).hooks}
    assert "IterTimerHook" not in names and "FastNetworksHook" in names


def test_testing_a_checkpoint_that_is_missing_writes_nothing(tmp_path):
    argv = [MSKD, str(tmp_path / "no.pth"), "--work-dir", str(tmp_path / "run")]
    with pytest.raises(SettingError, match=r"`checkpoint`.*no\.pth', which is not there"):
        toy.tool("test").main(argv)
    assert not (tmp_path / "run").exists()
