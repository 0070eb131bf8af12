"""The switches of the fast loop: what each changes, and that nothing else changes."""

from __future__ import annotations

import argparse
import copy
import functools
import operator
import os
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.models import VisionTransformer
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.task_modules import RecorderManager
from torch import nn

from mskd_plugin import launch, speed, switches
from mskd_plugin.algorithms.records import copy_inference_records
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import FastNetworksHook, LossWarmupHook
from mskd_plugin.launch import build_runner, use_method
from mskd_plugin.networks import network
from mskd_plugin.optim import BFloat16OptimWrapper
from mskd_plugin.recipes import METHODS
from mskd_plugin.speed import (
    COMPILES_LOSSES,
    check_compile,
    compile_backbones,
    compile_losses,
    lay_out_like_parameters,
    to_channels_last,
)
from mskd_plugin.switches import use_fast

CONFIGS = toy.ROOT / "configs"
PAIR = CONFIGS / "_base_" / "pairs" / "resnet20_resnet8_digits.py"


def step(model, batch=None):
    """Return a training step's losses and gradients."""
    model.zero_grad()
    losses = model(**(batch or toy.batch()), mode="loss")
    model.parse_losses(losses)[0].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, gradients


def assert_same(found, expected, **tolerance):
    """Assert that two steps' losses and gradients agree, by default to the last bit."""
    for part, other in zip(found, expected, strict=True):
        assert part.keys() == other.keys() and part
        for name, value in part.items():
            torch.testing.assert_close(
                value, other[name], **(tolerance or dict(rtol=0, atol=0)), msg=name
            )


# --- the teacher in inference mode ---------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(loss_weight=2.0), dict(teacher_mode="loss")])
def test_inference_mode_changes_no_bit(settings):
    if "loss_weight" in settings:  # the one with categories, from recorded parameters
        settings = dict(distiller=toy.distiller(**settings))
    models = [toy.build(teacher_inference_mode=on, **settings).train() for on in (False, True)]
    seen = []
    for model in models:
        model.teacher.backbone.register_forward_hook(
            lambda *_: seen.append(torch.is_inference_mode_enabled())
        )
    for seed in range(2):
        assert_same(*(step(model, toy.batch(seed=seed)) for model in models))
    assert seen == [False, True] * 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_switches_of_the_model(method):
    # Views of maps, and what a loss saves for its backward, depend on layout and mode.
    steps = []
    for fast in (False, True):
        model = toy.digits_pair(method).double()
        model.teacher_inference_mode = fast
        batch = toy.batch()
        batch["inputs"] = batch["inputs"].double()
        if fast:
            to_channels_last(model)
            batch["inputs"] = batch["inputs"].contiguous(memory_format=torch.channels_last)
        torch.manual_seed(1)
        steps.append(step(model, batch))
    assert_same(*steps, rtol=1e-9, atol=1e-9)


def test_recorded_inference_tensors_are_copied_once_each():
    manager = RecorderManager(
        dict(
            one=dict(type="ModuleOutputs", source="0"),
            same=dict(type="ModuleInputs", source="1"),
            weight=dict(type="Parameter", source="0.weight"),
        )
    )
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    manager.initialize(model)
    inputs = torch.ones(1, 2)
    with torch.inference_mode(), manager:
        model(inputs)
    records = {name: manager.get_recorder(name) for name in ("one", "same", "weight")}
    before = records["one"].get_record_data()
    copy_inference_records(manager)
    one, same = records["one"].get_record_data(), records["same"].get_record_data(data_idx=0)
    assert before.is_inference() and not one.is_inference()
    assert torch.equal(one, before) and one is same
    assert records["weight"].get_record_data() is model[0].weight
    copy_inference_records(manager)  # nothing left to copy
    assert records["one"].get_record_data() is one


def test_where_inference_mode_cannot_be():
    match = "teacher_inference_mode.*False for a teacher that trains.*deliveries"
    with pytest.raises(SettingError, match=match):
        toy.build(teacher_inference_mode=True, teacher_trainable=True)
    deliveries = dict(rand=dict(type="FunctionOutputs", func_path="torch.rand", max_keep_data=1))
    with pytest.raises(SettingError, match=match):
        toy.build(
            teacher_inference_mode=True,
            distiller=dict(toy.distiller(), distill_deliveries=deliveries),
        )
    with pytest.raises(SettingError, match="teacher_inference_mode.*True or False.*'yes'"):
        toy.build(teacher_inference_mode="yes")


# --- channels_last -------------------------------------------------------------------------------


def test_channels_last_moves_memory_alone():
    model, other = toy.build().train(), toy.build().train()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        to_channels_last(model)
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for network_ in (model.student, model.teacher):
        weights = [m.weight for m in network_.modules() if isinstance(m, nn.Conv2d)]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    raw = dict(inputs=torch.randint(0, 256, (2, 3, 8, 8)), data_samples=None)
    ready = model.data_preprocessor(dict(raw), True)["inputs"]
    assert ready.stride() == (192, 1, 24, 3)
    assert torch.equal(ready, other.data_preprocessor(dict(raw), True)["inputs"])
    assert len(model.data_preprocessor._forward_hooks) == 1
    maps = []
    model.student.backbone.layer3.register_forward_hook(lambda *io: maps.append(io[-1]))
    batch = toy.batch()
    batch["inputs"] = batch["inputs"].contiguous(memory_format=torch.channels_last)
    assert_same(step(model, batch), step(other), rtol=1e-4, atol=1e-6)
    assert maps[0].is_contiguous(memory_format=torch.channels_last)


def test_channels_last_in_a_distributed_wrapper_keeps_the_gradients(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        steps = []
        for channels_last in (False, True):
            model = toy.build().train().double()
            wrapped = MMDistributedDataParallel(module=model)
            if channels_last:
                to_channels_last(wrapped)
            batch = dict(toy.batch(), mode="loss")
            data = model.data_preprocessor(dict(inputs=batch["inputs"]), True)
            batch["inputs"] = data["inputs"].double()
            assert batch["inputs"].stride()[1] == (1 if channels_last else 1024)
            losses = wrapped(**batch)
            model.parse_losses(losses)[0].backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            steps.append(({n: v.detach() for n, v in losses.items()}, gradients))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(*steps, rtol=1e-9, atol=1e-12)


def test_optimizer_state_follows_the_layout():
    layer = nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    layer.to(memory_format=torch.channels_last)
    lay_out_like_parameters(optimizer)
    assert optimizer.state[layer.weight]["exp_avg"].stride() == layer.weight.stride()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, expected[index][name])


# --- compilation ---------------------------------------------------------------------------------


class Graphs:
    """A backend that runs graphs as they are, and counts them, their images and their runs."""

    current: Graphs

    def __init__(self):
        Graphs.current = self
        self.shapes, self.runs, self.made = [], 0, 0

    def note(self, graph, inputs):
        self.made += 1
        self.shapes += [tuple(x.shape) for x in inputs if x.dim() == 4 and x.shape[-1] > 7]

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@torch._dynamo.register_backend
def noting(graph, inputs):
    """The backend's name, since configs hold names."""
    return Graphs.current.note(graph, inputs)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def test_backbones_become_one_graph_each_and_the_numbers_stay(graphs):
    model, other = toy.build().train(), toy.build().train()
    names = list(model.state_dict())
    compiled = compile_backbones(model, dict(backend="noting", fullgraph=True, dynamic=False))
    assert compiled.names == ["architecture.backbone", "teacher.backbone"]
    step(model)
    assert graphs.shapes == []  # not before it is enabled
    compiled.enabled = True
    assert list(model.state_dict()) == names
    for seed in range(3):
        assert_same(step(model, toy.batch(seed=seed)), step(other, toy.batch(seed=seed)))
    assert graphs.shapes == [(4, 3, 32, 32)] * 2 and graphs.runs == 6
    assert_same(step(model, toy.batch(3)), step(other, toy.batch(3)))
    assert_same(step(model), step(other))
    assert graphs.shapes[2:] == [(3, 3, 32, 32)] * 2  # a smaller batch: graphs of its own
    compiled.enabled = False
    runs = graphs.runs
    step(model)
    assert graphs.runs == runs
    compiled.remove()
    assert "forward" not in vars(model.student.backbone)
    copy.deepcopy(model)


def test_one_graph_does_not_serve_networks_with_other_recorders(graphs):
    plain = toy.distiller()
    for side in ("student_recorders", "teacher_recorders"):
        plain[side] = dict(logits=dict(type="ModuleOutputs", source="head.fc"))
    plain.update(
        connectors=None,
        distill_losses=dict(loss_kd=dict(type="KLDivergence", tau=4)),
        loss_forward_mappings=dict(
            loss_kd=dict(
                preds_S=dict(from_student=True, recorder="logits"),
                preds_T=dict(from_student=False, recorder="logits"),
            )
        ),
    )
    first, second, other = toy.build(distiller=plain), toy.build().train(), toy.build().train()
    for model in (first.train(), second):
        compile_backbones(model, dict(backend="noting", dynamic=False)).enabled = True
    step(first)
    assert_same(step(second), step(other))  # torch's default finds nothing recorded here


def test_compiled_with_a_teacher_in_inference_mode(graphs):
    model, other = toy.build(teacher_inference_mode=True).train(), toy.build().train()
    compiled = compile_backbones(model, dict(backend="aot_eager", fullgraph=True, dynamic=False))
    compiled.enabled = True
    for seed in range(2):
        assert_same(
            step(model, toy.batch(seed=seed)),
            step(other, toy.batch(seed=seed)),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8"])
def test_own_networks_have_no_graph_break(name, graphs):
    model = MODELS.build(
        dict(
            _scope_="mmpretrain",
            type="ImageClassifier",
            backbone=dict(network(name).backbone),
        )
    )
    compile_backbones(model, dict(backend="noting", fullgraph=True)).enabled = True
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
    assert len(graphs.shapes) == 1


def test_drop_path_of_a_transformer_has_no_graph_break(graphs):
    arch = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8)
    model = nn.Module()
    model.backbone = VisionTransformer(arch, img_size=8, patch_size=4, drop_path_rate=0.5)
    rate = model.backbone.layers[1].attn.out_drop
    assert not isinstance(rate.drop_prob, float) or type(rate.drop_prob) is not float
    compile_backbones(model, dict(backend="noting", fullgraph=True)).enabled = True
    assert type(rate.drop_prob) is float and rate.drop_prob == 0.5
    model.train().backbone(torch.randn(2, 3, 8, 8))
    assert len(graphs.shapes) == 1


# --- compiled losses -----------------------------------------------------------------------------

needs_torch_2_9 = pytest.mark.skipif(
    not COMPILES_LOSSES, reason="torch before 2.9 traces backward passes under autocast"
)
#: Methods that look at numbers of the device, on CPUs at least, and so have more than one graph.
BREAKING = {"crd", "mlkd"}


@needs_torch_2_9
@pytest.mark.parametrize("method, phase", toy.PHASES)
def test_losses_of_every_method_are_one_graph_and_the_numbers_stay(method, phase, graphs):
    models = [toy.digits_pair(method, phase) for _ in range(2)]
    whole = method not in BREAKING
    compiled = compile_losses(models[1], dict(backend="noting", fullgraph=whole, dynamic=False))
    assert compiled.names == ["connectors and losses"]
    compiled.enabled = True
    for seed in range(4):
        steps = []
        for model in models:
            torch.manual_seed(1)
            steps.append(step(model, toy.batch(seed=seed)))
        assert_same(*steps)
        terms = [[getattr(m, "terms", {}) for m in mo.distiller.distill_losses] for mo in models]
        assert terms[0] == terms[1]
    if whole and models[0].distiller.loss_forward_mappings:
        assert graphs.made <= 1 and graphs.runs == 3 * graphs.made  # all steps but the first
    compiled.remove()
    assert "compute_distill_losses" not in vars(models[1].distiller)


@needs_torch_2_9
def test_compiled_losses_keep_float32_under_autocast(graphs):
    # torch by default traces the backward pass under autocast, whatever the forward says.
    models = [toy.digits_pair("mskd") for _ in range(2)]
    compile_losses(models[1], dict(backend="aot_eager", dynamic=False)).enabled = True
    for seed in range(2):
        gradients = []
        for model in models:
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(**toy.batch(seed=seed), mode="loss")
            projector = model.distiller.connectors["stage3_student"].projector
            gradients.append(
                torch.autograd.grad(
                    losses["distill.loss_mskd_stage3"], list(projector.parameters())
                )
            )
        for found, expected in zip(*gradients, strict=True):
            # 1e-2 if the similarities' gradients are bfloat16
            assert (found - expected).norm() < 1e-4 * expected.norm()


@needs_torch_2_9
def test_a_loss_that_warms_up_is_compiled_once(graphs):
    models = [toy.digits_pair("mskd") for _ in range(2)]
    hooks = [LossWarmupHook({"loss_mskd_stage3": 20}) for _ in models]
    runners = [SimpleNamespace(model=model, train_loop=None, epoch=0) for model in models]
    compile_losses(models[1], dict(backend="noting", fullgraph=True)).enabled = True
    for hook, runner in zip(hooks, runners):
        hook.before_train(runner)
    for epoch in range(12):
        for hook, runner in zip(hooks, runners):
            runner.epoch = epoch
            hook.before_train_epoch(runner)
        assert_same(*(step(model, toy.batch(seed=epoch)) for model in models))
    assert graphs.made == 1


def test_losses_before_torch_2_9_are_refused_and_left_out(monkeypatch):
    monkeypatch.setattr(speed, "COMPILES_LOSSES", False)
    with pytest.raises(SettingError, match="compile_losses.*False before torch 2.9"):
        compile_losses(toy.build(), {})
    monkeypatch.setattr(switches, "COMPILES_LOSSES", False)
    networks = load(CONFIGS / "kd_r34_r18_imagenet.py").default_hooks.networks
    assert networks.compile and "compile_losses" not in networks


def test_a_model_without_distillation_has_no_losses_to_compile():
    if COMPILES_LOSSES:
        assert compile_losses(nn.Linear(1, 1), {}).names == []


def test_compile_settings():
    assert check_compile("compile", False) is None
    assert check_compile("compile", True) == dict(dynamic=False)
    assert check_compile("compile", dict(mode="max-autotune", dynamic=True)) == dict(
        mode="max-autotune", dynamic=True
    )
    for wrong in ("True", 1, dict(backnd="eager")):
        with pytest.raises(SettingError, match="compile.*True, False or a dict.*backend"):
            FastNetworksHook(compile=wrong)
    with pytest.raises(SettingError, match="channels_last.*True or False"):
        FastNetworksHook(channels_last=1)


def test_what_cannot_be_compiled(monkeypatch):
    with pytest.raises(SettingError, match="compile.*without a `backbone`.*Linear"):
        compile_backbones(nn.Linear(1, 1), {})
    cfg = toy.distiller()
    cfg["teacher_recorders"]["noise"] = dict(type="FunctionOutputs", source="torch.rand")
    with pytest.raises(SettingError, match="compile.*recorders of functions.*noise"):
        compile_backbones(toy.build(distiller=cfg), {})
    deliveries = dict(drawn=dict(type="FunctionOutputs", func_path="torch.rand", max_keep_data=1))
    with pytest.raises(SettingError, match="compile.*deliveries.*drawn"):
        compile_backbones(
            toy.build(distiller=dict(toy.distiller(), distill_deliveries=deliveries)), {}
        )

    def unsupported(*_, **__):
        raise RuntimeError("Dynamo is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", unsupported)
    with pytest.raises(SettingError, match=r"compile.*since torch cannot.*Python 3\.99"):
        compile_backbones(toy.build(), {})


# --- in a runner ---------------------------------------------------------------------------------


def trained(folder, **settings):
    """Train, and return the weights and the runner."""
    runner = build_runner(toy.runner_config(folder, **settings))
    runner.train()
    return runner.model.state_dict(), runner


def test_a_run_compiles_its_training_alone(tmp_path, graphs):
    expected, _ = trained(tmp_path / "plain")
    found, runner = trained(
        tmp_path / "fast",
        **{"default_hooks.networks.compile": dict(backend="noting", fullgraph=True)},
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    # Two networks, two epochs of three steps; neither preflight nor validation.
    assert graphs.shapes == [(8, 3, 32, 32)] * 2 and graphs.runs == 12
    assert "forward" not in vars(runner.model.student.backbone)


def test_an_iteration_based_run_validates_without(tmp_path, graphs):
    cfg = toy.runner_config(tmp_path)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=2)
    cfg.param_scheduler = None
    cfg.default_hooks.networks.compile = dict(backend="noting")
    cfg.default_hooks.checkpoint.by_epoch = False
    runner = build_runner(cfg)
    assert isinstance(runner.train_loop, IterBasedTrainLoop)
    runner.train()
    assert graphs.runs == 8 and set(graphs.shapes) == {(8, 3, 32, 32)}


def test_a_run_in_channels_last_resumes(tmp_path):
    constant = dict(param_scheduler=None)
    fast = {"default_hooks.networks.channels_last": True, **constant}
    plain, _ = trained(tmp_path / "plain", **constant)
    whole, runner = trained(tmp_path / "whole", **fast)
    weight = runner.model.student.backbone.layer3[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # What a run without the switch wrote goes on with it.
    trained(tmp_path / "parts", **{"train_cfg.max_epochs": 1}, **constant)
    file = str(tmp_path / "parts" / "epoch_1.pth")
    parts, runner = trained(tmp_path / "parts", resume=True, load_from=file, **fast)
    momentum = runner.optim_wrapper.optimizer.state
    assert all(state["momentum_buffer"].stride() == p.stride() for p, state in momentum.items())
    # Rounding grows from step to step; other first weights would differ by their whole norm.
    for run in (whole, plain):
        difference = torch.cat([(parts[n] - v).flatten() for n, v in run.items()])
        assert difference.norm() < 0.01 * torch.cat([v.flatten() for v in run.values()]).norm()


def test_student_and_teacher_alone_have_the_switches(tmp_path, graphs):
    model = dict(toy.classifier("student"), data_preprocessor=toy.PREPROCESSOR)
    model["data_preprocessor"] = dict(model["data_preprocessor"], num_classes=10)
    _, runner = trained(
        tmp_path,
        model=model,
        **{
            "default_hooks.networks": dict(
                type="FastNetworksHook", channels_last=True, compile=dict(backend="noting")
            )
        },
    )
    assert graphs.runs == 6
    assert runner.model.backbone.conv1.weight.stride()[1] == 1


# --- --fast --------------------------------------------------------------------------------------


def load(config, *options, fast=True, **settings):
    parser = argparse.ArgumentParser()
    launch.add_common_options(parser)
    args = parser.parse_args([str(config), *options])
    return launch.load_config(argparse.Namespace(**{**vars(args), "fast": fast, **settings}))


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
        kind = plain.model.data_preprocessor.type.replace("Cls", "Batch")
        assert fast.model.data_preprocessor.type == kind
        assert fast.data_preprocessor.type == "BatchDataPreprocessor"
        assert "fast" not in fast
        # Nothing else, and no switch without being asked.
        for part in (fast.model, fast.optim_wrapper, fast.default_hooks):
            for key in ("teacher_inference_mode", "runtime_info", "networks"):
                part.pop(key, None)
        fast.optim_wrapper.type = "OptimWrapper"
        del fast.optim_wrapper.optimizer.fused
        fast.train_dataloader.collate_fn.type = "default_collate"
        for part in ("model.data_preprocessor.type", "data_preprocessor.type"):
            fast.merge_from_dict({part: operator.attrgetter(part)(plain)})
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
    expected = load(CONFIGS / "mskd_r34_r18_imagenet.py", *options)
    assert not cfg.default_hooks.networks.compile and cfg.default_hooks.networks.channels_last
    assert expected.model.pop("teacher_inference_mode")
    assert not cfg.model.pop("teacher_inference_mode")
    assert cfg.to_dict() == expected.to_dict()


def test_fast_leaves_out_what_cannot_be(monkeypatch):
    settings = Config.fromfile(switches.FAST).fast
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


def test_fused_by_hand_is_refused_where_it_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "computes_fused", lambda _: False)
    cfg = toy.runner_config(tmp_path, **{"optim_wrapper.optimizer.fused": True})
    with pytest.raises(SettingError, match="optimizer.fused.*no fused SGD on c"):
        build_runner(cfg)


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
    saved = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=True)
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
    fused = switch == "fused" or None
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=fused)
    wrapper = (BFloat16OptimWrapper if switch == "bf16" else OptimWrapper)(optimizer)
    losses = [model.train_step(copy.deepcopy(batch), wrapper)["loss"] for batch in digits()]
    weights = [p.detach().flatten() for p in model.architecture.parameters()]
    return torch.stack(losses).detach(), torch.cat(weights)


@pytest.mark.parametrize(
    "switch",
    [
        pytest.param(name, marks=needs_torch_2_9) if name == "compile_losses" else name
        for name in EFFECTS
    ],
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
