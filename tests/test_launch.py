"""What the tools share, function by function: options, config, teacher, resuming, the runner."""

from __future__ import annotations

import re

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import init_default_scope
from mmrazor.registry import MODELS
from tool_runs import MSKD, load, parse

from mskd_plugin import launch
from mskd_plugin.datasets import Digits
from mskd_plugin.errors import SettingError

PAIRS = toy.ROOT / "configs" / "_base_" / "pairs"


# --- reading the config --------------------------------------------------------------------------


def test_a_config_that_is_missing_or_none(tmp_path):
    with pytest.raises(SettingError, match=r"`config` to be a config file, but got 'no/such\.py'"):
        load(config="no/such.py")
    with pytest.raises(SettingError, match="`config` to be a config file, .* which is a folder"):
        load(config=tmp_path)
    (tmp_path / "epoch_1.pth").touch()
    with pytest.raises(SettingError, match=r"`config` to be a file in \.py, .*epoch_1\.pth"):
        load(config=tmp_path / "epoch_1.pth")


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("broken.py", "model = dict(\n", r"SyntaxError: .*line 1"),
        ("copied.py", "_base_ = '../_base_/gone.py'\n", r"FileNotFoundError: .*_base_/gone\.py"),
        ("wrong.py", "\nmodel = dict(type=ResNet)\n", r"/wrong\.py, line 2: NameError: .*'ResNet'"),
        ("imports.py", "custom_imports = dict(imports=['no_such'])\n", "No module named 'no_such'"),
        ("leaf.py", "_base_ = 'broken.py'\n", r"/broken\.py: SyntaxError: .*line 1"),
        ("broken.json", '{"model": \n', r"JSONDecodeError: .*line 2"),
        ("list.json", "[1]", "AttributeError: 'list'"),
        ("broken.yaml", "model: [\n  a: b:\n", "(Scanner|Parser)Error: .*line 2"),
        ("latin.py", "# \udce4\n", "UnicodeDecodeError: "),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_the_cause(tmp_path, name, text, told):
    (tmp_path / "broken.py").write_text("model = dict(\n")
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(SettingError) as refused:
        load(config=tmp_path / name)
    message = str(refused.value)
    assert message.startswith("Expected `config` to be a config that can be read, but got '/")
    assert re.search(rf"/{name}' \(.*{told}", message) and "\n" not in message


def test_a_recipe_in_a_config_speaks_for_itself(tmp_path):
    (tmp_path / "own.py").write_text(
        "_base_ = []\nfrom mskd_plugin.errors import SettingError\n"
        "raise SettingError('pair', 'another', 1)\n"
    )
    with pytest.raises(SettingError, match="^Expected `pair` to be another, but got 1.$"):
        load(config=tmp_path / "own.py")


@pytest.mark.parametrize("parts", [launch.TRAINING, launch.TESTING], ids=["train", "test"])
def test_a_config_that_lacks_a_part_of_what_is_done(tmp_path, parts):
    own = tmp_path / "own.py"
    states = [f"{part} = dict()" for part in parts]
    own.write_text("\n".join(["model = dict()", *states]))
    launch.load_config(parse(str(own)), parts)
    for part, state in zip(parts, states, strict=True):
        own.write_text("\n".join(["model = dict()", *(s for s in states if s != state)]))
        with pytest.raises(
            SettingError, match=rf"`{part}` to be a part of .*own\.py, but got None"
        ):
            launch.load_config(parse(str(own)), parts)


def test_options_of_every_type_reach_the_config():
    cfg = load(
        *["--cfg-options", "train_cfg.max_epochs=3", "optim_wrapper.optimizer.lr=1e-3"],
        *["train_dataloader.sampler.shuffle=False", "val_evaluator.topk=(1,5)", "load_from=None"],
        *["custom_hooks=[]", "train_dataloader.dataset.pipeline.0.padding=2"],
        *["--cfg-options", "visualizer.vis_backends=[]", "log_level=ERROR"],
        *["model.distiller.distill_losses.loss_mskd_stage3.loss_weight=0.5"],
        "env_cfg.dist_cfg.new=a=b",
    )
    assert cfg.train_cfg == dict(by_epoch=True, max_epochs=3, val_interval=2)
    assert cfg.optim_wrapper.optimizer.lr == 0.001
    assert cfg.optim_wrapper.optimizer.momentum == 0.9
    assert cfg.train_dataloader.sampler == dict(type="DefaultSampler", shuffle=False)
    assert cfg.val_evaluator.topk == (1, 5)
    assert cfg.load_from is None
    assert cfg.custom_hooks == [] and cfg.visualizer.vis_backends == []
    assert cfg.train_dataloader.dataset.pipeline[0].padding == 2
    assert cfg.log_level == "ERROR"
    assert cfg.model.distiller.distill_losses.loss_mskd_stage3.loss_weight == 0.5
    assert cfg.env_cfg.dist_cfg.new == "a=b"


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "train_dataloadr.batch_size=8",
            r"`--cfg-options` to be settings that MMEngine's runner or mskd_plugin reads, but got "
            r"'train_dataloadr.batch_size'\. Did you mean 'train_dataloader'\?",
        ),
        ("zzz=1", r"but got 'zzz'\.$"),
        ("epochs=3", r"but got 'epochs'\. Variables of the config's own are changed in the file"),
        ("launcher=mpi", r"but got 'launcher'\. --launcher sets it"),
        ("log_level.x.y=1", "`--cfg-options` to be settings of .* but got .*log_level|str"),
        ("custom_hooks.7=1", "`--cfg-options` to be settings of .*[Ii]ndex 7|custom_hooks"),
    ],
)
def test_options_that_do_not_fit_are_refused(option, message):
    with pytest.raises(SettingError, match=message):
        load("--cfg-options", option)


@pytest.mark.parametrize("option", ["log_level", "=3", "custom_hooks=[1", "env_cfg.x=(1,2"])
def test_options_that_are_no_pairs_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("--cfg-options", "log_level=INFO", option)
    assert stopped.value.code == 2
    assert f"--cfg-options: expected KEY=VALUE, but got {option!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "optim_wrapper.optimizer={'type':'SGD'}",
        "val_evaluator=[{'type':'Accuracy','topk':(1,5)},{'type':'SingleLabelMetric'}]",
    ],
)
def test_dicts_are_given_key_by_key(option, capsys):
    with pytest.raises(SystemExit):
        load("--cfg-options", option)
    assert "expected a dict as KEY.SUBKEY=VALUE" in capsys.readouterr().err
    name = load("--cfg-options", "default_hooks.checkpoint.filename_tmpl={}_of_8.pth")
    assert name.default_hooks.checkpoint.filename_tmpl == "{}_of_8.pth"


def test_the_models_copy_of_the_normalisation_follows():
    for argv in ((), ("--method", "student")):
        config = PAIRS / "resnet20_resnet8_digits.py" if argv else MSKD
        options = ["data_preprocessor.mean=[1,2,3]", "data_preprocessor.pad_value=7"]
        cfg = load(*argv, "--cfg-options", *options, config=config)
        for preprocessor in (cfg.data_preprocessor, cfg.model.data_preprocessor):
            assert preprocessor.mean == [1, 2, 3] and preprocessor.pad_value == 7
    alone = load("--cfg-options", "model.data_preprocessor.mean=[1,2,3]")
    assert alone.model.data_preprocessor.mean == [1, 2, 3] != alone.data_preprocessor.mean


def test_what_the_model_is_made_from_is_set_before():
    pair = PAIRS / "resnet20_resnet8_digits.py"
    options = ["pair.teacher=resnet56", "num_train_images=7", "pair.settings.crd.temperature=0.5"]
    cfg = load("--method", "crd", "--cfg-options", *options, config=pair)
    assert cfg.model.teacher.backbone.depth == 56
    (loss,) = cfg.model.distiller.distill_losses.values()
    assert (loss.num_images, loss.temperature) == (7, 0.5)
    with pytest.raises(SettingError, match="already made from, but got pair.teacher, num_train"):
        load("--cfg-options", *options[:2], "train_cfg.max_epochs=3")
    with pytest.raises(SettingError, match="`--cfg-options` .* but got 'num_train_image'"):
        load("--method", "crd", "--cfg-options", "num_train_image=7", config=pair)


def test_a_model_of_none(tmp_path):
    (tmp_path / "own.py").write_text("model = None\n")
    with pytest.raises(SettingError, match="`--method` to be given with"):
        load(config=tmp_path / "own.py")


def test_work_dir_and_launcher(tmp_path):
    cfg = load()
    assert cfg.work_dir == "work_dirs/mskd_resnet20_resnet8_digits"
    assert cfg.launcher == "none"
    own = tmp_path / "own.py"
    own.write_text("model = {}\nwork_dir = 'from/config'\nlauncher = 'pytorch'\n")
    assert load(config=own).work_dir == "from/config"
    assert load(config=own).launcher == "none"
    assert load("--work-dir", "given", "--launcher", "slurm", config=own).work_dir == "given"
    for option in ("--local-rank", "--local_rank"):  # torch's launchers, new and old
        assert load("--launcher", "slurm", option, "1", config=own).launcher == "slurm"
    assert load("--cfg-options", "work_dir=option", config=own).work_dir == "option"


def test_a_method_for_the_config_of_a_pair():
    pair = toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py"
    with pytest.raises(SettingError, match=r"`--method` to be given with .*_digits\.py"):
        load(config=pair)
    cfg = load("--method", "mskd", config=pair)
    assert cfg.work_dir == "work_dirs/mskd_resnet20_resnet8_digits"
    assert cfg.model == load().model  # the leaf config says the same
    assert load("--method", "student", config=pair).model.backbone.depth == 8
    with pytest.raises(SettingError, match=r"`--method` to be .* 'msk'\. Did you mean 'mskd'\?"):
        load("--method", "msk", config=pair)
    with pytest.raises(SettingError, match=r"`--method` to be different methods .* 'kd\+mskd\+kd'"):
        load("--method", "kd+mskd+kd", config=pair)
    # Its schedule may be that of another method.
    with pytest.raises(
        SettingError, match=r"`--method` .*pairs/\*\.py, but got 'kd' with a config"
    ):
        load("--method", "kd", config=MSKD)


def test_a_teacher_alone_takes_its_own_learning_rate():
    pair = PAIRS / "resnet32x4_shufflev1_cifar100.py"
    for method, rate in (("teacher", 0.05), ("student", 0.01), ("mskd", 0.01)):
        assert load("--method", method, config=pair).optim_wrapper.optimizer.lr == rate
    option = ("--cfg-options", "optim_wrapper.optimizer.lr=0.3")
    assert load("--method", "teacher", *option, config=pair).optim_wrapper.optimizer.lr == 0.3


# --- the student, the teacher, resuming
# ------------------------------------------------------------


def test_the_student_takes_the_algorithms_place():
    cfg = load()
    preprocessor, student = cfg.model.data_preprocessor, cfg.model.architecture
    launch.keep_student_only(cfg)
    assert cfg.model == {**student, "data_preprocessor": preprocessor}
    assert cfg.model.type == "ImageClassifier" and cfg.model.backbone.depth == 8
    before = cfg.copy()
    launch.keep_student_only(cfg)  # nothing to take out any more
    assert cfg.model == before.model


def test_the_students_own_preprocessor_goes_first():
    model = toy.algorithm()
    model["architecture"]["data_preprocessor"] = dict(mean=[1.0] * 3)
    cfg = Config(dict(model=model))
    launch.keep_student_only(cfg)
    assert cfg.model.data_preprocessor == dict(mean=[1.0] * 3)


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
    assert cfg.data_preprocessor == cfg.model.data_preprocessor
    student = MODELS.build(cfg.model)  # which hands it batch augmentations
    given = student.data_preprocessor(dict(inputs=list(images)))["inputs"]
    assert torch.equal(given, expected) and given.shape == (2, 3, 6, 6)
    assert launch.for_classifier(dict(own, bgr_to_rgb=False))["to_rgb"] is False
    as_class = launch.for_classifier(dict(own, type=ImgDataPreprocessor))
    assert as_class == cfg.data_preprocessor
    classes = dict(type="ClsDataPreprocessor")  # of a pure Python config it would not print copied
    assert launch.for_classifier(classes) is classes
    other = launch.for_classifier(dict(own, bgr_to_rgb=False, rgb_to_bgr=True))
    assert other == launch.for_classifier(own) and other["to_rgb"] is True


def test_the_teachers_weights(tmp_path, monkeypatch):
    cfg = load()
    with pytest.raises(SettingError, match=r"`--teacher` to be a file, a URL or .*'none\.pth'"):
        launch.set_teacher(cfg, "none.pth")
    with pytest.raises(SettingError, match="`--teacher`.*which is not there"):
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


def test_resuming(tmp_path):
    cfg = load()
    with pytest.raises(SettingError, match=r"`--resume` to be a checkpoint, .*epoch_9\.pth"):
        launch.set_resume(cfg, str(tmp_path / "epoch_9.pth"))
    cfg = load()
    launch.set_resume(cfg, "auto")
    assert (cfg.resume, cfg.load_from) == (True, None)
    (tmp_path / "epoch_9.pth").touch()
    launch.set_resume(cfg, str(tmp_path / "epoch_9.pth"))
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / "epoch_9.pth"))


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


# --- the runner
# ------------------------------------------------------------------------------------


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


def test_data_that_cannot_be_fetched_are_named(tmp_path, monkeypatch):
    load_data_list = Digits.load_data_list

    def fetch(self):
        if self.split == "test":
            raise RuntimeError("Dataset not found or corrupted")  # as torchvision's
        return load_data_list(self)

    monkeypatch.setattr(Digits, "load_data_list", fetch)
    cfg = toy.runner_config(tmp_path)
    init_default_scope(cfg.default_scope)
    for build in (launch.build_datasets, launch.build_runner):
        with pytest.raises(SettingError, match=r"`val_dataloader\.dataset` .*: Dataset not found"):
            build(cfg)
    cfg.val_dataloader = None
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
