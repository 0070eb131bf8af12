"""CUDA graphs: what they overwrite, imitated on a CPU, and what does not go with them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import needs
import pytest
import torch
import toy
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.multiprocessing.reductions import StorageWeakRef

from mskd_plugin import speed
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import FastNetworksHook, PreflightHook

pytestmark = needs.torch_2_9


class GraphMemory:
    """A backend whose graphs' outputs are overwritten when the next step begins, as those of CUDA
    graphs are.

    A step begins where ``torch.compiler.cudagraph_mark_step_begin`` was called; if it never was,
    torch takes every forward graph that runs while no backward pass is to come for a new step.
    """

    def __init__(self):
        self.marks = self.seen = self.pending = self.overwritten = 0
        self.given = []
        self.backend = aot_autograd(
            fw_compiler=self.compiler(forward=True, pending=1),
            bw_compiler=self.compiler(forward=False, pending=-1),
            inference_compiler=self.compiler(forward=True, pending=0),
        )

    def mark(self):
        self.marks += 1

    def begin(self):
        if self.seen != self.marks or not (self.marks or self.pending):
            for reference in self.given:
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                if storage is not None and storage.nbytes():
                    storage.fill_(255)  # as floating point numbers they are none
                    self.overwritten += 1
            self.given, self.seen = [], self.marks

    def compiler(self, forward, pending):
        def compile(graph, _):
            def run(inputs):
                if forward:
                    self.begin()
                self.pending += pending
                own = {x.untyped_storage()._cdata for x in inputs if isinstance(x, torch.Tensor)}
                outputs = graph(*inputs)
                inputs.clear()
                for output in outputs:
                    if isinstance(output, torch.Tensor):
                        storage = output.untyped_storage()
                        if storage._cdata not in own:
                            self.given.append(StorageWeakRef(storage))
                return outputs

            run._boxed_call = True
            return run

        return compile


@pytest.fixture
def memory(monkeypatch):
    torch._dynamo.reset()
    memory = GraphMemory()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", memory.mark)
    yield memory
    torch._dynamo.reset()


def train(method, options=False, marked=True, preflight=False):
    """Take four steps; return the weights and the losses as they were logged."""
    model = toy.digits_pair(method)
    hook = FastNetworksHook(compile=options, compile_losses=options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, 0.01, momentum=0.9))
    checks = PreflightHook()
    checks.ran_losses = preflight
    runner = SimpleNamespace(
        model=model, optim_wrapper=wrapper, logger=logging.getLogger(), hooks=[checks]
    )
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    logged = []
    for seed in range(4):
        if marked:
            hook.before_train_iter(runner, seed)
        torch.manual_seed(seed)
        loss, logs = model.parse_losses(model(**toy.batch(seed=seed), mode="loss"))
        logged.append(logs)  # as a log that nobody waits for keeps them
        wrapper.update_params(loss)
    hook.after_train(runner)
    return parameters, [value for logs in logged for value in logs.values()]


#: MSKD, and the methods that keep results of a graph until the next step.
@pytest.mark.parametrize("method", ["mskd", "crd", "mlkd", "rkd"])
@pytest.mark.parametrize("preflight", [False, True], ids=["bare", "after_preflight"])
def test_no_step_reads_what_the_last_one_computed(method, memory, preflight):
    expected = train(method)
    found = train(method, dict(backend=memory.backend), preflight=preflight)
    for parts, others in zip(found, expected, strict=True):
        for part, other in zip(parts, others, strict=True):
            torch.testing.assert_close(part, other)
    assert memory.marks == 4 and memory.overwritten  # something was there to be read


def test_unannounced_steps_overwrite_the_teachers_maps(memory):
    weights, _ = train("mskd", dict(backend=memory.backend), marked=False)
    assert any(weight.isnan().any() for weight in weights)


@pytest.mark.parametrize("method, lasting", [("mskd", 2), ("kd", 0), ("sdd_kd", 4)])
def test_only_weights_are_looked_for_at_one_place(method, lasting, memory):
    # A graph is recorded anew where such an input has another place; all others are copied.
    runs, model = [], toy.digits_pair(method)

    def compile(graph, _):
        indices = torch._guards.TracingContext.get().fw_metadata.static_input_indices

        def run(*inputs):
            runs.append({inputs[i].data_ptr() for i in indices})
            return graph(*inputs)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=compile, bw_compiler=lambda graph, _: make_boxed_func(graph))
    speed.compile_losses(model, dict(backend=backend)).enabled = True
    for seed in range(3):
        toy.step(model, toy.batch(seed=seed))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert [len(places & weights) for places in runs] == [lasting] * 2  # the first runs without
    assert all(places <= weights for places in runs)


# --- what does not go with them ------------------------------------------------------------------

GRAPHS = dict(mode="reduce-overhead")


@pytest.mark.parametrize(
    "options, graphs",
    [
        (None, False),
        (dict(dynamic=False), False),
        (dict(mode="max-autotune-no-cudagraphs"), False),
        (dict(options={"max_autotune": True}), False),
        (GRAPHS, True),
        (dict(mode="max-autotune"), True),
        (dict(backend="cudagraphs"), True),
        (dict(options={"triton.cudagraphs": True}), True),
    ],
    ids=str,
)
def test_what_asks_for_them(monkeypatch, options, graphs):
    assert speed.asks_for_cuda_graphs(options) == graphs
    hook = FastNetworksHook(compile_losses=options or False)
    assert not hook.cuda_graphs  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hook.cuda_graphs == graphs


@pytest.mark.parametrize("setting", ["compile", "compile_losses"])
def test_accumulated_gradients_are_refused(monkeypatch, setting):
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runner = SimpleNamespace(
        model=model,
        optim_wrapper=OptimWrapper(optimizer, accumulative_counts=2),
        logger=logging.getLogger(),
        hooks=[],
    )
    hook = FastNetworksHook(**{setting: GRAPHS})
    hook.before_train(runner)  # a CPU has no such graphs
    hook.after_train(runner)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    several = OptimWrapperDict(one=OptimWrapper(optimizer), two=runner.optim_wrapper)
    for wrapper in (runner.optim_wrapper, several):
        runner.optim_wrapper = wrapper
        with pytest.raises(SettingError, match="`optim_wrapper.accumulative_counts` .* got 2"):
            hook.before_train(runner)
    runner.optim_wrapper = OptimWrapper(optimizer)
    hook.before_train(runner)


def test_inference_mode_is_refused_where_torch_cannot_capture_it(monkeypatch):
    model = toy.build(teacher_inference_mode=True)
    monkeypatch.setattr(speed, "CAPTURES_INFERENCE_MODE", True)
    speed.check_cuda_graphs(model, 1)
    monkeypatch.setattr(speed, "CAPTURES_INFERENCE_MODE", False)
    with pytest.raises(SettingError, match="`model.teacher_inference_mode` to be False .* 2.11"):
        speed.check_cuda_graphs(model, 1)
    speed.check_cuda_graphs(toy.build(), 1)
    speed.check_cuda_graphs(torch.nn.Linear(1, 1), 1)
