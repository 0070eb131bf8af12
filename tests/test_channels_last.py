"""The layout channels_last: what it moves, and that nothing else changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import needs
import pytest
import torch
import toy
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from mskd_plugin.hooks import FastNetworksHook
from mskd_plugin.speed import place_state, to_channels_last


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
    toy.assert_same(toy.step(model, batch), toy.step(other), rtol=1e-4, atol=1e-6)
    assert maps[0].is_contiguous(memory_format=torch.channels_last)


def test_other_data_keep_their_layout():
    model = nn.Module()
    model.data_preprocessor = nn.Identity()
    to_channels_last(model)
    video, rows = torch.rand(2, 3, 4, 8, 8), torch.rand(2, 3)
    for data in (video, rows):
        found = model.data_preprocessor(dict(inputs=data))["inputs"]
        assert found is data
    assert model.data_preprocessor([rows]) == [rows]


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
    toy.assert_same(*steps, rtol=1e-9, atol=1e-12)


def test_optimizer_state_follows_the_layout():
    layer = nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    layer.to(memory_format=torch.channels_last)
    place_state(optimizer)
    assert optimizer.state[layer.weight]["exp_avg"].stride() == layer.weight.stride()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, expected[index][name])

    layer = layer.to(torch.bfloat16, memory_format=torch.contiguous_format)
    place_state(optimizer)  # the weights' type is not the state's
    assert optimizer.state[layer.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[layer.weight]["exp_avg"].is_contiguous()

    row = torch.arange(3.0)  # of another shape, as Adafactor's
    optimizer.state[layer.weight]["row"] = row
    place_state(optimizer)
    assert optimizer.state[layer.weight]["row"] is row


@pytest.mark.parametrize(
    "kernels, device", [(None, "cpu"), ("capturable", "meta"), ("fused", "meta")]
)
def test_counts_of_steps_are_where_the_optimizer_reads_them(monkeypatch, kernels, device):
    weight = nn.Parameter(torch.zeros(3, device="meta"))  # which stands in for a GPU
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    states = optimizer.state_dict()
    assert states["state"][0]["step"].is_cpu
    # MMEngine reads a checkpoint onto the device, where torch leaves the counts.
    states["state"][0]["step"] = states["state"][0]["step"].to("meta")
    resumed = torch.optim.AdamW([weight])
    resumed.load_state_dict(states)
    if kernels:
        resumed.param_groups[0][kernels] = True
    with pytest.raises(RuntimeError, match=r"item\(\) cannot|_local_scalar_dense"):
        optimizer.load_state_dict(states)
        optimizer.step()  # reads the count
    monkeypatch.setattr(torch.Tensor, "cpu", lambda count: torch.ones(count.shape))
    place_state(resumed)
    assert resumed.state[weight]["step"].device.type == device
    if not kernels:
        resumed.step()
        assert resumed.state[weight]["step"] == 2


class Several(nn.Module):
    """Two networks, each with an optimizer of its own that has taken a step."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)

    def optimizers(self):
        wrappers = {}
        for name, layer in self.named_children():
            optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, foreach=False)
            layer(torch.randn(1, 2, 5, 5)).sum().backward()
            optimizer.step()
            wrappers[name] = OptimWrapper(optimizer)
        return OptimWrapperDict(**wrappers)


@needs.torch_2_4
def test_each_of_several_optimizers_keeps_its_kernels_and_follows_the_layout():
    model = Several()
    wrappers, hook = model.optimizers(), FastNetworksHook(channels_last=True)
    runner = SimpleNamespace(model=model, optim_wrapper=wrappers, _resume=True)
    groups = {name: [dict(fused=True, foreach=True)] for name in wrappers.keys()}
    states = {name: dict(param_groups=group) for name, group in groups.items()}
    hook.after_load_checkpoint(runner, dict(optimizer=states))
    assert groups == {name: [dict(fused=None, foreach=False)] for name in ("one", "two")}
    hook.after_load_checkpoint(runner, {})  # one without an optimizer
    runner._resume = False  # initial weights, beside the optimizer of another training
    hook.after_load_checkpoint(runner, dict(optimizer=dict(param_groups=[])))
    hook.before_train(runner)
    for wrapper in wrappers.values():
        for parameter, state in wrapper.optimizer.state.items():
            assert parameter.dim() < 4 or parameter.stride()[1] == 1
            assert state["momentum_buffer"].stride() == parameter.stride()


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_alone_has_the_layout_too(stage):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    for channels_last, hook in (
        (False, FastNetworksHook()),
        (True, FastNetworksHook(channels_last=True)),
    ):
        getattr(hook, f"before_{stage}")(SimpleNamespace(model=model))
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
