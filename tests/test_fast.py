"""The switches of the fast loop: what each changes, and that nothing else changes."""

from __future__ import annotations

import argparse
import copy
import functools
import os

import needs
import pytest
import torch
import toy
from mmengine.config import Config, ConfigDict
from mmengine.dataset import default_collate
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import OPTIMIZERS
from mmrazor.models.algorithms import SingleTeacherDistill

from mskd_plugin import launch, switches
from mskd_plugin.algorithms import FrozenTeacherDistill
from mskd_plugin.checks.settings import check_settings
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import build_runner, use_method
from mskd_plugin.optim import BFloat16OptimWrapper
from mskd_plugin.speed import (
    COMPILES_LOSSES,
    compile_backbones,
    compile_losses,
    to_channels_last,
)
from mskd_plugin.switches import use_fast

CONFIGS = toy.ROOT / "configs"
PAIR = CONFIGS / "_base_" / "pairs" / "resnet20_resnet8_digits.py"


# --- in a runner ---------------------------------------------------------------------------------


@needs.torch_2_4
def test_a_run_resumes_without_the_switches_that_wrote_its_checkpoint(tmp_path):
    constant = dict(param_scheduler=None)
    fast = {
        "default_hooks.networks.channels_last": True,
        "optim_wrapper.optimizer.fused": True,
        **constant,
    }
    whole, _ = toy.trained(tmp_path / "whole", **fast)
    for name, settings in (("without", constant), ("with", fast)):
        first = fast if name == "without" else constant
        toy.trained(tmp_path / name, **{"train_cfg.max_epochs": 1}, **first)
        file = str(tmp_path / name / "epoch_1.pth")
        parts, runner = toy.trained(tmp_path / name, resume=True, load_from=file, **settings)
        optimizer = runner.optim_wrapper.optimizer
        assert [group["fused"] for group in optimizer.param_groups] == [
            True if name == "with" else None
        ]
        for parameter, state in optimizer.state.items():
            assert state["momentum_buffer"].stride() == parameter.stride()
        # Rounding grows from step to step; scrambled momentum is off by its whole norm.
        difference = torch.cat([(parts[n] - v).flatten() for n, v in whole.items()])
        assert difference.norm() < 0.01 * torch.cat([v.flatten() for v in whole.values()]).norm()


def test_a_run_in_channels_last_resumes(tmp_path):
    constant = dict(param_scheduler=None)
    fast = {"default_hooks.networks.channels_last": True, **constant}
    plain, _ = toy.trained(tmp_path / "plain", **constant)
    whole, runner = toy.trained(tmp_path / "whole", **fast)
    weight = runner.model.student.backbone.layer3[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # What a run without the switch wrote goes on with it.
    toy.trained(tmp_path / "parts", **{"train_cfg.max_epochs": 1}, **constant)
    file = str(tmp_path / "parts" / "epoch_1.pth")
    parts, runner = toy.trained(tmp_path / "parts", resume=True, load_from=file, **fast)
    momentum = runner.optim_wrapper.optimizer.state
    assert all(state["momentum_buffer"].stride() == p.stride() for p, state in momentum.items())
    # Rounding grows from step to step; other first weights would differ by their whole norm.
    for run in (whole, plain):
        difference = torch.cat([(parts[n] - v).flatten() for n, v in run.items()])
        assert difference.norm() < 0.01 * torch.cat([v.flatten() for v in run.values()]).norm()


# --- --fast --------------------------------------------------------------------------------------


def load(config, *options, fast=True, **settings):
    parser = argparse.ArgumentParser()
    launch.add_common_options(parser)
    args = parser.parse_args([str(config), *options])
    return launch.load_config(argparse.Namespace(**{**vars(args), "fast": fast, **settings}))


@needs.torch_2_4
def test_fast_sets_every_switch_for_every_kind_of_config():
    for config, options, distils in [
        (CONFIGS / "mskd_r34_r18_imagenet.py", [], True),
        (CONFIGS / "fsp_r34_r18_imagenet.py", [], True),  # in two phases
        (CONFIGS / "student_r18_imagenet.py", [], False),
        (PAIR, ["--method", "teacher"], False),
        (PAIR, ["--method", "dkd+mskd"], True),
    ]:
        plain, fast = load(config, *options, fast=False), load(config, *options)
        assert fast.optim_wrapper.type == "BFloat16OptimWrapper"
        assert fast.optim_wrapper.optimizer == dict(plain.optim_wrapper.optimizer, fused=True)
        assert fast.default_hooks.networks.channels_last
        assert fast.default_hooks.networks.compile
        assert ("compile_losses" in fast.default_hooks.networks) == COMPILES_LOSSES
        assert fast.default_hooks.runtime_info.type == "DeferredRuntimeInfoHook"
        assert fast.model.get("teacher_inference_mode", False) == distils
        assert fast.train_dataloader.collate_fn.type == "collate_batch"
        assert fast.val_dataloader == plain.val_dataloader
        assert fast.model.data_preprocessor.type == "mmpretrain.BatchDataPreprocessor"
        assert "fast" not in fast
        # Nothing else, and no switch without being asked.
        for part in (fast.model, fast.optim_wrapper, fast.default_hooks):
            for key in ("teacher_inference_mode", "runtime_info", "networks"):
                part.pop(key, None)
        fast.optim_wrapper.type = "OptimWrapper"
        del fast.optim_wrapper.optimizer.fused
        fast.train_dataloader.collate_fn.type = "default_collate"
        fast.model.data_preprocessor.type = plain.model.data_preprocessor.type
        assert plain.default_hooks.pop("networks") == dict(type="FastNetworksHook")
        assert fast.to_dict() == plain.to_dict()


def test_fast_as_a_second_base_is_the_same_and_options_come_later(tmp_path):
    leaf = tmp_path / "mskd_r34_r18_imagenet.py"
    leaf.write_text(
        f'_base_ = ["{CONFIGS}/mskd_r34_r18_imagenet.py", "{CONFIGS}/_base_/fast.py"]\n'
        "fast = dict(model=dict(teacher_inference_mode=False))\n"
    )
    options = ["--cfg-options", "default_hooks.networks.compile=False"]
    cfg = load(leaf, *options, fast=False)
    assert load(leaf, *options).to_dict() == cfg.to_dict()  # --fast besides changes nothing
    expected = load(CONFIGS / "mskd_r34_r18_imagenet.py", *options)
    assert not cfg.default_hooks.networks.compile and cfg.default_hooks.networks.channels_last
    assert expected.model.pop("teacher_inference_mode")
    assert not cfg.model.pop("teacher_inference_mode")
    assert cfg.to_dict() == expected.to_dict()


def test_fast_without_mixed_precision(tmp_path):
    base, own = CONFIGS / "mskd_r34_r18_imagenet.py", tmp_path / "own.py"
    bases = [str(base), str(CONFIGS / "_base_" / "fast.py")]
    own.write_text(f"_base_ = {bases}\nfast = dict(optim_wrapper=dict(type=None))\n")
    found, expected = load(own, fast=False), load(base)
    assert found.optim_wrapper.type == load(base, fast=False).optim_wrapper.type == "OptimWrapper"
    expected.optim_wrapper.type = "OptimWrapper"
    assert found.optim_wrapper == expected.optim_wrapper  # fused all the same


def test_fast_without_the_configs_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(switches, "FAST", tmp_path / "fast.py")  # as pip install . leaves it
    with pytest.raises(SettingError, match=r"`--fast` .* \(pip install -e \.\), but got "):
        load(CONFIGS / "kd_r34_r18_imagenet.py")


def test_fast_leaves_out_what_cannot_be(monkeypatch):
    settings = switches.fast_settings()
    cfg = load(CONFIGS / "kd_r34_r18_imagenet.py", fast=False)
    for change in (
        dict(teacher_trainable=True),
        dict(distiller=dict(distill_deliveries=dict(drop=dict()))),
        dict(type="SingleTeacherDistill"),
    ):
        other = copy.deepcopy(cfg)
        other.merge_from_dict(dict(model=change))
        use_fast(other, settings)
        assert "teacher_inference_mode" not in other.model

    for change in (
        dict(model=dict(data_preprocessor=dict(batch_augments=dict(augments=[])))),
        dict(model=dict(data_preprocessor=dict(pad_size_divisor=8))),
        dict(train_dataloader=dict(collate_fn=dict(type="pseudo_collate"))),
    ):
        other = copy.deepcopy(cfg)
        other.merge_from_dict(change)
        expected = copy.deepcopy(other)
        use_fast(other, settings)
        assert other.model.data_preprocessor == expected.model.data_preprocessor
        assert other.train_dataloader == expected.train_dataloader

    build = torch.optim.SGD.__init__

    def of_gpus_alone(self, params, *args, fused=None, **kwargs):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be CUDA")
        build(self, params, *args, **kwargs)

    def of_old_torch(self, params, lr, momentum=0, weight_decay=0):
        build(self, params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    monkeypatch.setattr(switches, "get_device", lambda: "cpu")
    for optimizer in (of_gpus_alone, of_old_torch):
        other = copy.deepcopy(cfg)
        monkeypatch.setattr(torch.optim.SGD, "__init__", optimizer)
        use_fast(other, settings)
        assert "fused" not in other.optim_wrapper.optimizer
    assert settings.optim_wrapper.optimizer.fused  # untouched
    monkeypatch.setattr(switches, "get_device", lambda: "cuda")
    monkeypatch.setattr(torch.optim.SGD, "__init__", of_gpus_alone)
    use_fast(cfg, settings)  # the GPU is not touched
    assert cfg.optim_wrapper.optimizer.fused


def test_a_frozen_teacher_is_found_by_name_and_by_class():
    for kind in (FrozenTeacherDistill, "FrozenTeacherDistill", "mmrazor.TwoPhaseDistill"):
        assert switches.has_frozen_teacher(ConfigDict(type=kind))
    for kind in (SingleTeacherDistill, "SingleTeacherDistill", None):
        assert not switches.has_frozen_teacher(ConfigDict(type=kind))


@needs.torch_2_9
@pytest.mark.parametrize(
    "preprocessor", [ClsDataPreprocessor, "mmpretrain.models.ClsDataPreprocessor"]
)
def test_fast_with_types_as_pure_python_configs_have_and_dump_them(preprocessor):
    cfg = load(CONFIGS / "mskd_r34_r18_imagenet.py", fast=False)
    cfg.model.data_preprocessor.type = preprocessor
    cfg.train_dataloader.collate_fn.type = default_collate
    use_fast(cfg, switches.fast_settings())
    assert cfg.train_dataloader.collate_fn.type == "collate_batch"
    assert cfg.model.data_preprocessor.type == "mmpretrain.BatchDataPreprocessor"


@needs.torch_2_9
def test_fast_over_switches_of_ones_own(tmp_path):
    base, own = CONFIGS / "kd_r34_r18_imagenet.py", tmp_path / "own.py"
    expected = load(base).default_hooks.networks
    for networks in ("dict(compile=True, compile_losses=False)", "None"):
        own.write_text(f"_base_ = {str(base)!r}\ndefault_hooks = dict(networks={networks})\n")
        assert load(own).default_hooks.networks == expected


@pytest.mark.parametrize(
    "lacking, left",
    [
        (["COMPILES_LOSSES"], {"type", "channels_last", "compile"}),
        (["COMPILES_LOSSES", "COMPILES_BACKBONES"], {"type", "channels_last"}),
    ],
)
def test_fast_compiles_what_this_torch_can(monkeypatch, lacking, left):
    for name in ("COMPILES_LOSSES", "COMPILES_BACKBONES"):
        monkeypatch.setattr(switches, name, name not in lacking)
    assert load(CONFIGS / "kd_r34_r18_imagenet.py").default_hooks.networks.keys() == left


def test_fused_by_hand_is_refused_where_it_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setattr("mskd_plugin.checks.settings.computes_fused", lambda *_: False)
    cfg = toy.runner_config(tmp_path, **{"optim_wrapper.optimizer.fused": True})
    with pytest.raises(SettingError, match="optimizer.fused.*no fused SGD on c"):
        build_runner(cfg)


@needs.torch_2_4
def test_fused_kernels_of_the_configs_package(monkeypatch):
    class OwnSGD(torch.optim.SGD):
        pass

    OPTIMIZERS.register_module(module=OwnSGD, force=True)
    DefaultScope._instance_dict.clear()  # as a tool's process begins
    monkeypatch.setattr(switches, "get_device", lambda: "cpu")
    for optimizer in (dict(type="OwnSGD"), dict(type="SGD", _scope_="mmpretrain")):
        cfg = load(CONFIGS / "kd_r34_r18_imagenet.py", fast=False)
        cfg.optim_wrapper.optimizer = dict(optimizer, lr=0.1)
        use_fast(cfg, switches.fast_settings())
        assert cfg.optim_wrapper.optimizer.fused
        check_settings(cfg)
    cfg.optim_wrapper.optimizer = dict(type="SDG", lr=0.1)  # there is none, as is told later
    use_fast(cfg, switches.fast_settings())
    assert "fused" not in cfg.optim_wrapper.optimizer


@needs.torch_2_9
def test_train_py_takes_all_switches_and_keeps_an_exact_log(tmp_path):
    teacher = tmp_path / "teacher.pth"
    torch.manual_seed(0)
    init_default_scope("mmpretrain")
    cfg = Config.fromfile(PAIR)
    use_method(cfg, "teacher")
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, teacher)
    toy.tool("train").main(
        [
            *[str(PAIR), "--method", "mskd", "--fast", "--teacher", str(teacher)],
            *["--work-dir", str(tmp_path / "run"), "--cfg-options", "train_cfg.max_epochs=1"],
            *["train_dataloader.dataset.indices=40", "train_dataloader.batch_size=16"],
            *["val_dataloader.dataset.indices=20", "default_hooks.networks.compile.backend=eager"],
            "default_hooks.networks.compile_losses.backend=eager",
            *["train_cfg.val_interval=1", "param_scheduler=None"],
        ]
    )
    dumped = Config.fromfile(next((tmp_path / "run").rglob("resnet20_resnet8_digits.py")))
    assert dumped.model.teacher_inference_mode and "fast" not in dumped
    saved = torch.load(tmp_path / "run" / "epoch_1.pth")
    assert len(saved["message_hub"]["log_scalars"]["train/loss"].data[0]) == 3
    assert not [key for key in saved["state_dict"] if "_orig_mod" in key or "teacher." in key]


# --- the effect of each switch on the numbers ----------------------------------------------------

#: Steps, and switch -> largest relative difference of a loss and of all weights after them. With
#: MSKD_STEPS=20 and MSKD_BACKEND=inductor, `pytest tests/test_fast.py -k effect -s` prints the
#: figures of docs/performance.md.
STEPS = int(os.environ.get("MSKD_STEPS", "5"))
EFFECTS = {
    "bf16": (0.05, 0.1),
    "channels_last": (0.02, 0.1),
    "compile": (1e-2, 1e-2),
    "compile_losses": (1e-2, 1e-2),
    "teacher_inference_mode": (0, 0),
    "fused": (1e-2, 1e-2),
}
NEEDS = {
    "compile": needs.torch_2_4,
    "compile_losses": needs.torch_2_9,
    "fused": needs.torch_2_4,
}


@functools.cache
def digits():
    """Return batches of 16 real digits."""
    dataset = DATASETS.build(dict(type="Digits", pipeline=[dict(type="PackInputs")]))
    return [
        default_collate([dataset[(16 * i + j) % len(dataset)] for j in range(16)])
        for i in range(STEPS)
    ]


@functools.cache
def after_training(switch=None):
    """Train ResNet20 -> ResNet8 on digits by MSKD; return each step's loss and the weights."""
    model = toy.digits_pair("mskd")
    model.teacher_inference_mode = switch == "teacher_inference_mode"
    if switch == "channels_last":
        to_channels_last(model)
    options = dict(backend=os.environ.get("MSKD_BACKEND", "aot_eager"), dynamic=False)
    if switch == "compile":
        compile_backbones(model, options).enabled = True
    if switch == "compile_losses":
        compile_losses(model, options).enabled = True
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = dict(fused=True) if switch == "fused" else {}
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=5e-4, **fused)
    wrapper = (BFloat16OptimWrapper if switch == "bf16" else OptimWrapper)(optimizer)
    losses = [model.train_step(copy.deepcopy(batch), wrapper)["loss"] for batch in digits()]
    weights = [p.detach().flatten() for p in model.architecture.parameters()]
    return torch.stack(losses).detach(), torch.cat(weights)


@pytest.mark.parametrize(
    "switch",
    [pytest.param(name, marks=NEEDS[name]) if name in NEEDS else name for name in EFFECTS],
)
def test_effect_of_each_switch(switch):
    (losses, weights), (found, moved) = after_training(), after_training(switch)
    of_losses = ((found - losses).abs() / losses.abs()).max().item()
    of_weights = ((moved - weights).norm() / weights.norm()).item()
    print(f"| {switch} | {of_losses:.2g} | {of_weights:.2g} |")
    most_of_losses, most_of_weights = EFFECTS[switch]
    assert of_losses <= most_of_losses and of_weights <= most_of_weights


# --- what the fast loop is compared with ---------------------------------------------------------


def test_the_stock_config_is_mmrazors_and_nothing_of_ours():
    cfg = Config.fromfile(CONFIGS / "benchmark" / "stock-kd_r34_r18_imagenet.py")
    assert "mskd_plugin" not in cfg.pretty_text and "custom_hooks" not in cfg
    assert cfg.optim_wrapper.get("type", "OptimWrapper") == "OptimWrapper"  # float32
    init_default_scope(cfg.default_scope)
    cfg.model.teacher_ckpt = None
    model = MODELS.build(cfg.model)
    assert type(model) is SingleTeacherDistill
    depths = [len(n.backbone.layer3) for n in (model.student, model.teacher)]
    assert depths == [2, 6]  # ResNet-18 and ResNet-34
    loss = model.distiller.distill_losses["loss_kl"]
    assert (loss.tau, loss.loss_weight) == (1, 3)
    losses = model(**toy.batch(2, side=32), mode="loss")
    assert set(losses) == {"student.loss", "distill.loss_kl"}
