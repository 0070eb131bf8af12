"""What torch.compile does to backbones, connectors and losses: one graph each, equal numbers."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import needs
import pytest
import torch
import toy
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.models import VisionTransformer
from torch import nn

from mskd_plugin.functional import contrastive, decoupling
from mskd_plugin.functional.constants import kept
from mskd_plugin.hooks import FastNetworksHook, LossWarmupHook, PreflightHook
from mskd_plugin.launch import build_runner
from mskd_plugin.networks import network
from mskd_plugin.speed import (
    CompiledMethods,
    compile_backbones,
    compile_losses,
)

# --- backbones -----------------------------------------------------------------------------------


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


@needs.torch_2_4
def test_backbones_become_one_graph_each_and_the_numbers_stay(graphs):
    model, other = toy.build().train(), toy.build().train()
    names = list(model.state_dict())
    compiled = compile_backbones(model, dict(backend="noting", fullgraph=True, dynamic=False))
    assert compiled.names == ["architecture.backbone", "teacher.backbone"]
    toy.step(model)
    assert graphs.shapes == []  # not before it is enabled
    compiled.enabled = True
    assert list(model.state_dict()) == names
    for seed in range(3):
        toy.assert_same(
            toy.step(model, toy.batch(seed=seed)), toy.step(other, toy.batch(seed=seed))
        )
    assert graphs.shapes == [(4, 3, 32, 32)] * 2 and graphs.runs == 6
    toy.assert_same(toy.step(model, toy.batch(3)), toy.step(other, toy.batch(3)))
    toy.assert_same(toy.step(model), toy.step(other))
    assert graphs.shapes[2:] == [(3, 3, 32, 32)] * 2  # a smaller batch: graphs of its own
    compiled.enabled = False
    runs = graphs.runs
    toy.step(model)
    assert graphs.runs == runs
    compiled.remove()
    assert "forward" not in vars(model.student.backbone)
    copy.deepcopy(model)


@needs.torch_2_4
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
    toy.step(first)
    toy.assert_same(
        toy.step(second), toy.step(other)
    )  # torch's default finds nothing recorded here


@needs.torch_2_4
def test_compiled_with_a_teacher_in_inference_mode(graphs):
    model, other = toy.build(teacher_inference_mode=True).train(), toy.build().train()
    compiled = compile_backbones(model, dict(backend="aot_eager", fullgraph=True, dynamic=False))
    compiled.enabled = True
    for seed in range(2):
        toy.assert_same(
            toy.step(model, toy.batch(seed=seed)),
            toy.step(other, toy.batch(seed=seed)),
            rtol=1e-5,
            atol=1e-6,
        )


@needs.torch_2_4
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


@needs.torch_2_9  # mmengine's decorator around attention stops older graphs
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


# --- connectors and losses -----------------------------------------------------------------------

#: Methods that look at numbers of the device, on CPUs at least, and so have more than one graph.
BREAKING = {"crd", "mlkd"}


@needs.torch_2_9
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
            steps.append(toy.step(model, toy.batch(seed=seed)))
        toy.assert_same(*steps)
        for loss, other in zip(*(model.distiller.distill_losses.values() for model in models)):
            assert getattr(loss, "terms", {}) == getattr(other, "terms", {})
    if whole and models[0].distiller.loss_forward_mappings:
        assert graphs.made <= 1 and graphs.runs == 3 * graphs.made  # all steps but the first
    compiled.remove()
    assert "compute_distill_losses" not in vars(models[1].distiller)


@needs.torch_2_9
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


@torch._dynamo.register_backend
def off_by_rounding(graph, inputs):
    """Other kernels round otherwise."""
    return lambda *args: tuple(out * (1 + 1e-6) for out in graph.forward(*args))


@needs.torch_2_9
def test_a_run_with_compiled_losses_resumes_exactly(tmp_path, graphs):
    fast = {"default_hooks.networks.compile_losses": dict(backend="off_by_rounding")}
    fast |= dict(param_scheduler=None)
    whole, _ = toy.trained(tmp_path / "whole", **fast)
    plain, _ = toy.trained(tmp_path / "plain", param_scheduler=None)
    assert not all(torch.equal(value, whole[name]) for name, value in plain.items())
    toy.trained(tmp_path / "parts", **{"train_cfg.max_epochs": 1}, **fast)
    file = str(tmp_path / "parts" / "epoch_1.pth")
    parts, _ = toy.trained(tmp_path / "parts", resume=True, load_from=file, **fast)
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())


@needs.torch_2_9
@pytest.mark.parametrize("preflight, runs", [("whole", 6), ("without losses", 5), (None, 5)])
def test_losses_that_have_not_run_take_their_first_step_without(
    tmp_path, graphs, monkeypatch, preflight, runs
):
    for module, name in ((decoupling, "_pooling_matrix"), (contrastive, "_repeated")):
        monkeypatch.setattr(module, name, kept(getattr(module, name).__wrapped__))
    settings = {"default_hooks.networks.compile_losses": dict(backend="noting", fullgraph=True)}
    if preflight is None:
        settings["custom_hooks"] = []
    elif preflight == "without losses":  # as for networks with an optimizer each
        monkeypatch.setattr(PreflightHook, "before_train", lambda hook, runner: None)
    toy.trained(tmp_path, **settings)
    assert (graphs.made, graphs.runs) == (1, runs)


@needs.torch_2_9
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
        toy.assert_same(*(toy.step(model, toy.batch(seed=epoch)) for model in models))
    assert graphs.made == 1


def test_the_first_calls_run_as_they_are(graphs):
    layer, runs = nn.Linear(2, 2), []
    methods = CompiledMethods({"layer": (layer, "forward")}, dict(backend="noting"), after=1)
    for enabled in (False, True, True, True, False):  # what is not enabled does not count
        methods.enabled = enabled
        layer(torch.zeros(1, 2))
        runs.append(graphs.runs)
    assert runs == [0, 0, 1, 2, 2]


# --- in a runner ---------------------------------------------------------------------------------


@needs.torch_2_4
def test_networks_in_a_distributed_wrapper_are_compiled():
    model = toy.build()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    hook = FastNetworksHook(compile=dict(backend="eager"))
    runner = SimpleNamespace(
        model=nn.DataParallel(model), optim_wrapper=optimizer, logger=logging.getLogger()
    )
    hook.before_train(runner)
    assert "forward" in vars(model.student.backbone)
    enabled = []
    for point in ("train_epoch", "val"):  # a validation between epochs
        for moment in ("before", "after"):
            getattr(hook, f"{moment}_{point}")(runner)
            enabled.append(hook._compiled[0].enabled)
    assert enabled == [True, False, False, False]
    hook.after_train(runner)
    assert "forward" not in vars(model.student.backbone)


@needs.torch_2_4
def test_a_run_compiles_its_training_alone(tmp_path, graphs):
    expected, _ = toy.trained(tmp_path / "plain")
    found, runner = toy.trained(
        tmp_path / "fast",
        **{"default_hooks.networks.compile": dict(backend="noting", fullgraph=True)},
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    # Two networks, two epochs of three steps; neither preflight nor validation.
    assert graphs.shapes == [(8, 3, 32, 32)] * 2 and graphs.runs == 12
    assert "forward" not in vars(runner.model.student.backbone)


@needs.torch_2_4
@pytest.mark.parametrize("compile", [False, dict(backend="noting")], ids=["plain", "compiled"])
def test_cuda_graphs_are_told_of_each_step(tmp_path, graphs, monkeypatch, compile):
    told = []  # how many graphs had run by then
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(graphs.runs)
    )
    toy.trained(tmp_path, **{"default_hooks.networks.compile": compile})
    assert told == ([0, 2, 4, 6, 8, 10] if compile else [])


@needs.torch_2_4
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


@needs.torch_2_4
def test_student_and_teacher_alone_have_the_switches(tmp_path, graphs):
    model = dict(toy.classifier("student"), data_preprocessor=toy.PREPROCESSOR)
    model["data_preprocessor"] = dict(model["data_preprocessor"], num_classes=10)
    _, runner = toy.trained(
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
