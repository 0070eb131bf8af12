"""From a config file and the command line to the config that runs."""

from __future__ import annotations

import inspect
import re

import pytest
import toy
from mmengine.config import Config
from mmengine.runner import Runner
from tool_runs import MSKD, load, parse

from mskd_plugin import launch
from mskd_plugin.errors import SettingError

PAIRS = toy.ROOT / "configs" / "_base_" / "pairs"


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


def test_a_config_whose_import_fails_is_named_with_its_own_line(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("a = 1\nb = a.c\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text("_base_ = []\n\nimport half_written\n")
    with pytest.raises(SettingError, match=r"/own\.py, line 3: AttributeError: 'int' object"):
        load(config=tmp_path / "own.py")


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
        ("in_memory=no", "`in_memory` to be True or False, but got 'no'"),
        ("model=None", "`model` to be a dict with a type, but got None"),
        ("model=ResNet", "`model` to be a dict with a type, but got ResNet"),
    ],
)
def test_options_that_do_not_fit_are_refused(option, message):
    with pytest.raises(SettingError, match=message):
        load("--cfg-options", option)


def test_whatever_mmengines_runner_reads_is_an_option():
    """Some settings are none of its parameters."""
    keys = {*re.findall(r"self\.cfg\.get\(\s*'(\w+)'", inspect.getsource(Runner))}
    assert {"compile", "sync_bn"} < keys
    for key in keys:
        assert load("--cfg-options", f"{key}=True")[key] is True


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


def test_the_normalisation_stands_in_the_model_alone():
    for argv in ((), ("--method", "student")):
        config = PAIRS / "resnet20_resnet8_digits.py" if argv else MSKD
        options = ["data_preprocessor.mean=[1,2,3]", "data_preprocessor.pad_value=7"]
        cfg = load(*argv, "--cfg-options", *options, config=config)
        preprocessor = cfg.model.data_preprocessor
        assert preprocessor.mean == [1, 2, 3] and preprocessor.pad_value == 7
        assert "data_preprocessor" not in cfg
    alone = load("--cfg-options", "model.data_preprocessor.mean=[1,2,3]")
    assert alone.model.data_preprocessor.mean == [1, 2, 3] and "data_preprocessor" not in alone
    options = ["model.data_preprocessor.mean=[1,2,3]", "data_preprocessor.mean=[4,5,6]"]
    cfg = load("--cfg-options", *options)
    assert cfg.model.data_preprocessor.mean == [1, 2, 3] and "data_preprocessor" not in cfg


def test_a_preprocessor_that_only_the_config_states(tmp_path):
    """The runner would give it to a model without one, but not in the place of None."""
    own = Config.fromfile(MSKD)
    top = dict(own.data_preprocessor, type="mmpretrain.ClsDataPreprocessor")
    for stated, expected in (({}, top), (dict(data_preprocessor=None), None)):
        own.model.pop("data_preprocessor", None)
        own.merge_from_dict(dict(model=stated, data_preprocessor=top))
        own.dump(tmp_path / "own.py")
        cfg = load(config=tmp_path / "own.py")
        assert cfg.model.data_preprocessor == expected and "data_preprocessor" not in cfg
    own.model.pop("data_preprocessor")
    own.dump(tmp_path / "own.py")
    cfg = load("--cfg-options", "data_preprocessor.mean=[1,2,3]", config=tmp_path / "own.py")
    assert cfg.model.data_preprocessor == dict(top, mean=[1, 2, 3])


@pytest.mark.parametrize("beside", ["data_preprocessor = dict(mean=[1.0])", "fast = dict()"])
def test_a_model_of_the_file_that_is_no_dict(tmp_path, beside):
    (tmp_path / "own.py").write_text(f"model = 'ResNet'\n{beside}\n")
    with pytest.raises(SettingError, match="`model` to be a dict with a type, but got ResNet"):
        load(config=tmp_path / "own.py")


def test_what_the_model_is_made_from_is_set_before(tmp_path):
    pair = PAIRS / "resnet20_resnet8_digits.py"
    options = ["pair.teacher=resnet56", "num_train_images=7", "pair.settings.crd.temperature=0.5"]
    cfg = load("--method", "crd", "--cfg-options", *options, config=pair)
    assert cfg.model.teacher.backbone.depth == 56
    (loss,) = cfg.model.distiller.distill_losses.values()
    assert (loss.num_images, loss.temperature) == (7, 0.5)
    with pytest.raises(SettingError, match="already made from, but got pair.teacher, num_train"):
        load("--cfg-options", *options[:2], "train_cfg.max_epochs=3")
    (tmp_path / "own.py").write_text("model = dict()\nnum_train_images = 8\n")
    with pytest.raises(SettingError, match="already made from, but got num_train_images"):
        load("--cfg-options", "num_train_images=7", config=tmp_path / "own.py")
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


def test_a_method_in_two_phases_brings_the_epochs_of_its_first():
    pair = PAIRS / "resnet20_resnet8_digits.py"
    one, two = (load("--method", method, config=pair) for method in ("kd", "fsp"))
    assert two.train_cfg.max_epochs == one.train_cfg.max_epochs + two.model.init_epochs
    assert two.model.init_epochs > 0 and two.find_unused_parameters is True


def test_a_teacher_alone_takes_its_own_learning_rate():
    pair = PAIRS / "resnet32x4_shufflev1_cifar100.py"
    for method, rate in (("teacher", 0.05), ("student", 0.01), ("mskd", 0.01)):
        assert load("--method", method, config=pair).optim_wrapper.optimizer.lr == rate
    option = ("--cfg-options", "optim_wrapper.optimizer.lr=0.3")
    assert load("--method", "teacher", *option, config=pair).optim_wrapper.optimizer.lr == 0.3
