"""What a training is resumed from: a checkpoint of its own method and networks, or one error."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from tool_runs import MSKD

from mskd_plugin import launch
from mskd_plugin.checks.resumed import (
    Resumed,
    check_groups,
    check_resumed,
)
from mskd_plugin.errors import SettingError
from mskd_plugin.launch.config import state_preprocessor_once
from mskd_plugin.switches import use_mixed_precision

PAIR = str(Path(MSKD).parents[1] / "_base_" / "pairs" / "resnet20_resnet8_digits.py")
LOSS = "model.distiller.distill_losses.loss_kd"
AS_CLASSES = """
from mmrazor.models import ConfigurableDistiller, KLDivergence

from mskd_plugin.connectors import FullPrecisionConnector

model = {model}
model["distiller"]["type"] = ConfigurableDistiller
model["distiller"]["distill_losses"]["loss_kd"]["type"] = KLDivergence
model["distiller"]["connectors"]["logits_full_precision"]["type"] = FullPrecisionConnector
"""


def config(*options, method="kd"):
    """Load the digits' pair with a method, and with options of the command line."""
    parser = argparse.ArgumentParser()
    launch.add_common_options(parser)
    launch.add_switches(parser)
    args = parser.parse_args([PAIR, "--method", method, *options])
    cfg = launch.load_config(args)
    if args.amp:
        use_mixed_precision(cfg)
    return cfg


def written(path, cfg, **parts):
    """Write a checkpoint with the parts that MMEngine resumes from, and return the file."""
    init_default_scope(cfg.default_scope)
    whole = dict(
        state_dict=MODELS.build(cfg.model).state_dict(),
        meta=dict(epoch=1, iter=2, cfg=cfg.pretty_text),
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
    )
    torch.save({key: value for key, value in {**whole, **parts}.items() if value is not None}, path)
    return str(path)


@pytest.fixture(scope="module")
def of_kd(tmp_path_factory):
    return written(tmp_path_factory.mktemp("kd") / "epoch_1.pth", config())


def resumed(cfg, file):
    DefaultScope._instance_dict.clear()  # as a tool's process begins
    launch.set_resume(cfg, str(file))
    return check_resumed(cfg)


# --- files that are none of a training -----------------------------------------------------------


@pytest.mark.parametrize(
    "parts, told",
    [
        (dict(message_hub=None), r"has no message_hub\. .*load_from=FILE"),
        (dict(meta={}), "has no meta.epoch, meta.iter"),
        (dict(meta=None), r"has no meta\. "),
        (dict(state_dict=None), "has no state_dict"),
        (dict(state_dict=[1]), "has no state_dict"),
    ],
)
def test_what_holds_no_progress_is_refused(tmp_path, parts, told):
    file = written(tmp_path / "epoch_1.pth", config(), **parts)
    with pytest.raises(SettingError, match=f"`--resume` to be a checkpoint that a .*{told}"):
        resumed(config(), file)


def test_what_is_no_checkpoint_is_refused(tmp_path, of_kd):
    whole = Path(of_kd).read_bytes()
    for name, content in {
        "text": b"weights",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SettingError, match="`--resume` to be a checkpoint that torch can read"):
            resumed(config(), tmp_path / name)
    torch.save([1], tmp_path / "list")
    with pytest.raises(SettingError, match="`--resume` to be a file with a dict of weights"):
        resumed(config(), tmp_path / "list")
    with pytest.raises(SettingError, match="`--resume` to be a checkpoint, .* which is a folder"):
        resumed(config(), tmp_path)


def test_a_config_that_mmengine_would_run_is_refused(tmp_path):
    meta = dict(epoch=1, iter=2, config="import os")
    file = written(tmp_path / "epoch_1.pth", config(), meta=meta)
    with pytest.raises(SettingError, match="`--resume` to be a checkpoint without meta.config"):
        resumed(config(), file)


def test_another_network_is_refused_before_anything_is_written(tmp_path):
    file = written(tmp_path / "epoch_1.pth", toy.runner_config(tmp_path))
    narrow = toy.algorithm()
    narrow["architecture"]["backbone"]["widths"] = (4, 4, 6, 10)
    narrow["architecture"]["head"]["in_channels"] = 10
    narrow["distiller"]["connectors"]["stage3_student"]["in_channels"] = 10
    cfg = toy.runner_config(tmp_path / "run", narrow)
    launch.set_resume(cfg, file)
    with pytest.raises(SettingError, match="`--resume` .* config's networks, .* differing shapes"):
        launch.build_runner(cfg)
    assert not (tmp_path / "run").exists()
    deeper = config("--cfg-options", "pair.student=resnet14")
    with pytest.raises(SettingError, match="`--resume` .*networks, .* missing keys: architecture"):
        resumed(deeper, written(tmp_path / "epoch_2.pth", config()))


# --- other methods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, told",
    [
        ("dkd", r"distill_losses\.loss_dkd\.type is DecoupledKDLoss and was absent"),
        ("ls_kd", r"connectors\.logits_standardized\.type is LogitStandardizationConnector and"),
        ("dkd", r"was absent; distill_losses\.loss_kd\.type is absent and was KLDivergence"),
        ("mskd+kd", r"loss_mskd_stage3\.type is MultiScaleContrastiveLoss and was absent"),
        ("student", r"loss_kd\.type is absent and was KLDivergence"),
    ],
)
def test_the_checkpoint_of_another_method_is_refused(of_kd, method, told):
    expected = f"`--resume` to be a checkpoint of this config's method, .*epoch_1.*{told}"
    with pytest.raises(SettingError, match=expected):
        resumed(config(method=method), of_kd)


def test_an_automatic_resume_looks_at_the_method_too(tmp_path):
    file = written(tmp_path / "epoch_1.pth", config())
    (tmp_path / "last_checkpoint").write_text(file)
    for method in ("kd", "dkd"):
        cfg = config("--work-dir", str(tmp_path), method=method)
        launch.set_resume(cfg, "auto")
        assert cfg.load_from is None
        if method == "kd":
            assert check_resumed(cfg).changes == ""
            continue
        with pytest.raises(SettingError, match="`--resume` to be a checkpoint of this config's me"):
            check_resumed(cfg)


def test_what_may_change(of_kd, tmp_path):
    for options in (
        ["--amp"],
        ["--fast", "--in-memory"],
        ["--work-dir", "other", "--cfg-options", "train_cfg.max_epochs=9", "param_scheduler=[]"],
        ["--cfg-options", "optim_wrapper.optimizer.lr=0.5", "model.teacher_ckpt=no/such.pth"],
        ["--cfg-options", f"{LOSS}.type=KLDivergence", "model.save_teacher=True"],
        ["--cfg-options", "model.distiller.init_cfg=None"],
    ):
        assert resumed(config(*options), of_kd).changes == "", options


def test_what_changed_is_told_by_its_name(tmp_path, of_kd):
    pooling, loss = "model.distiller.connectors.stage3_teacher", "distill_losses.loss_kd"
    file = written(tmp_path / "epoch_1.pth", config(method="mskd"))
    assert resumed(config(method="mskd"), file).changes == ""
    one = config("--cfg-options", f"{pooling}.scales=[1,3,4]", method="mskd")
    assert resumed(one, file).changes == "connectors.stage3_teacher.scales.1 is 3 and was 2"
    mapping = "loss_forward_mappings.loss_kd.preds_S"
    several = {
        f"{loss}.loss_weight": 0.5,
        f"{loss}.reduction": "mean",
        f"{loss}.tau": 2,
        f"{mapping}.from_student": False,
        "student_recorders.logits.type": "ModuleInputs",
    }
    cfg = config()
    cfg.merge_from_dict({f"model.distiller.{key}": value for key, value in several.items()})
    assert resumed(cfg, of_kd).changes == (
        f"{loss}.loss_weight is 0.5 and was 0.9; {loss}.reduction is mean and was batchmean; "
        f"{loss}.tau is 2 and was 4.0; {mapping}.from_student is False and was True; "
        "student_recorders.logits.type is ModuleInputs and was ModuleOutputs"
    )


@pytest.mark.parametrize("method", ["kd", "student"])
def test_the_config_stays_as_it_was(tmp_path, method):
    file = written(tmp_path / "epoch_1.pth", config(method=method))
    cfg = config(method=method)
    before = copy.deepcopy(cfg.to_dict())
    resumed(cfg, file)
    assert cfg.to_dict() == {**before, "resume": True, "load_from": file}


def test_the_file_that_is_named_goes_before_the_newest(of_kd, tmp_path):
    newest = written(tmp_path / "epoch_2.pth", config(method="dkd"))
    (tmp_path / "last_checkpoint").write_text(newest)
    assert resumed(config("--work-dir", str(tmp_path)), of_kd).changes == ""


def test_without_a_checkpoint_there_is_nothing_to_check(tmp_path):
    assert resumed(config("--work-dir", str(tmp_path)), "auto") is None


def test_a_teacher_that_is_not_known_to_be_frozen_belongs_to_the_networks(tmp_path):
    class Pair(BaseModel):
        def __init__(self, **_):
            super().__init__()
            self.teacher, self.student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

        def forward(self):
            pass

    state = {key: value for key, value in Pair().state_dict().items() if "student" in key}
    cfg = config()
    cfg.model = dict(type=Pair)
    file = written(tmp_path / "epoch_1.pth", config(), state_dict=state, meta=dict(epoch=1, iter=2))
    with pytest.raises(SettingError, match="2 missing keys: teacher.weight, teacher.bias"):
        resumed(cfg, file)


def test_what_the_runner_adds_to_the_model(tmp_path):
    class Counting(BaseDataPreprocessor):
        def __init__(self, **_):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

    cfg = config(method="student")
    del cfg.model.data_preprocessor
    cfg.model.pop("_scope_", None)  # as in configs of mmpretrain alone
    cfg.data_preprocessor = dict(type=Counting)
    state = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor}).state_dict()
    assert "data_preprocessor.count" in state
    file = written(tmp_path / "epoch_1.pth", config(method="student"), state_dict=state)
    state_preprocessor_once(cfg)
    assert resumed(cfg, file).changes == ""


def test_files_of_other_runners_and_places_are_left_to_them(tmp_path):
    cfg = config()
    cfg.resume, cfg.load_from = True, "s3://bucket/epoch_1.pth"
    assert check_resumed(cfg) is None
    cfg.load_from, cfg.runner_type = str(tmp_path), "FlexibleRunner"  # DeepSpeed writes folders
    assert check_resumed(cfg) is None
    cfg.pop("runner_type")
    with pytest.raises(SettingError, match="`--resume`"):
        check_resumed(cfg)


def test_types_may_be_classes(of_kd, tmp_path):
    dumped, classes = tmp_path / "dumped.py", tmp_path / "classes.py"
    cfg = config()
    cfg.dump(dumped)
    assert resumed(Config.fromfile(dumped), of_kd).changes == ""
    classes.write_text(AS_CLASSES.format(model=cfg.model.to_dict()))
    types = Config.fromfile(classes)
    types.default_scope, types.work_dir = "mmpretrain", str(tmp_path)
    assert isinstance(types.model.distiller.distill_losses.loss_kd.type, type)
    assert resumed(types, of_kd).changes == ""
    assert resumed(cfg, written(tmp_path / "epoch_1.pth", types)).changes == ""


def test_a_checkpoint_that_states_no_config_is_taken_by_its_weights(tmp_path):
    for text in ({}, {"cfg": "model = build()"}):
        meta = dict(epoch=1, iter=2, **text)
        file = written(tmp_path / "epoch_1.pth", config(), meta=meta)
        assert resumed(config(method="dkd"), file).changes == ""
    with pytest.raises(SettingError, match="`--resume` .* config's networks"):
        resumed(config(method="student"), file)


def test_other_settings_of_the_method_are_logged(tmp_path):
    toy.trained(tmp_path, **{"train_cfg.max_epochs": 1})
    weight = "model.distiller.distill_losses.loss_mskd_stage3.loss_weight"
    again = {weight: 0.25, "resume": True}
    runner = launch.build_runner(toy.runner_config(tmp_path, **again))
    log = (Path(runner.log_dir) / f"{runner.timestamp}.log").read_text()
    assert "other settings: distill_losses.loss_mskd_stage3.loss_weight is 0.25 and was ab" in log


# --- the optimizer, the scope --------------------------------------------------------------------


def test_another_optimizer(of_kd):
    option = ("--cfg-options", "optim_wrapper.optimizer.type=AdamW")
    with pytest.raises(SettingError, match=r"`--resume` .* optimizer, AdamW, but got .* of SGD"):
        resumed(config(*option), of_kd)
    for same in ("lr=1", "type=mmengine.SGD"):
        cfg = config("--cfg-options", f"optim_wrapper.optimizer.{same}")
        assert resumed(cfg, of_kd).changes == ""
    cfg.optim_wrapper = None
    assert resumed(cfg, of_kd).changes == ""


def test_other_groups_of_parameters(tmp_path):
    one_epoch = {"train_cfg.max_epochs": 1}
    toy.train(toy.runner_config(tmp_path, **one_epoch))
    split = {"optim_wrapper.paramwise_cfg": dict(bias_decay_mult=0.0)}
    cfg = toy.runner_config(tmp_path, resume=True, **split)
    with pytest.raises(
        SettingError, match=r"`--resume` .* groups of parameters, \[1, 1, .* \[\d+\]\."
    ):
        launch.build_runner(cfg)
    assert toy.train(toy.runner_config(tmp_path, resume=True))[1].count == 3


def test_groups_are_those_of_one_optimizer(of_kd):
    def wrapper(*sizes):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1)) for _ in range(n)]} for n in sizes]
        return OptimWrapper(torch.optim.SGD(groups, lr=0.1))

    one, several = wrapper(2, 1), OptimWrapperDict(a=wrapper(2), b=wrapper(1))
    without_optimizer = resumed(config(), of_kd)
    for before in (None, without_optimizer, Resumed("", wrapper(2, 1).state_dict())):
        check_groups(one, before)
    check_groups(several, Resumed("", several.state_dict()))
    with pytest.raises(SettingError, match=r"groups of parameters, \[2, 1\], .* one with \[1, 2\]"):
        check_groups(one, Resumed("", wrapper(1, 2).state_dict()))
    with pytest.raises(SettingError, match=r"groups of parameters, \[2, 1\], .* one with None"):
        check_groups(one, Resumed("", several.state_dict()))


def test_a_config_without_a_default_scope(tmp_path):
    cfg = toy.runner_config(tmp_path, toy.algorithm())
    file = written(tmp_path / "epoch_1.pth", cfg)
    cfg.default_scope = None
    assert resumed(cfg, file).changes == ""
    assert DefaultScope.get_current_instance() is None
    cfg.pop("default_scope")
    assert resumed(cfg, file).changes == ""
    assert DefaultScope.get_current_instance().scope_name == "mmengine"  # as the runner sets it
