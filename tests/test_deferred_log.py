"""Logged values wait on the device, readers find what they always found, and no step waits for
it."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
import toy
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper
from waits import Waits, no_waits

from mskd_plugin.hooks.deferred_log import DeferringMessageHub
from mskd_plugin.launch import build_runner
from mskd_plugin.optim import BFloat16OptimWrapper
from mskd_plugin.recipes import METHODS

PAIR = toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py"
#: Methods that look at numbers of the device in each step, hence wait for it.
WAITING = {
    "crd": "its memory's bounds, normalisers and negatives",
}
#: Methods in which CPUs, not GPUs, check numbers: one_hot's labels, quantile's argument.
CHECKING_ON_CPU = {"mlkd", "ofa", "wsld"}


# --- the hub -------------------------------------------------------------------------------------


def hubs():
    """Return a plain hub and a deferring one."""
    plain, deferring = MessageHub("plain"), MessageHub("deferring")
    DeferringMessageHub.adopt(deferring)
    return plain, deferring


def scalars(hub):
    return {key: [part.tolist() for part in buffer.data] for key, buffer in hub.log_scalars.items()}


def values(step):
    """Return a step's values, of each kind that mmengine takes."""
    return {
        "train/loss": torch.tensor(1 / (step + 3), requires_grad=True) * 1,
        "train/half": torch.tensor([step / 3], dtype=torch.bfloat16),
        "train/double": torch.tensor(step / 7, dtype=torch.float64),
        "train/count": torch.tensor(step),
        "train/lr": 0.1**step,
        "train/array": np.array(step / 9),
    }


def test_histories_are_equal_to_the_last_digit_and_in_order():
    plain, deferring = hubs()
    for step in range(7):
        for key, value in values(step).items():
            for hub in (plain, deferring):
                hub.update_scalar(key, value, count=step + 1)
    assert list(deferring.log_scalars) == list(plain.log_scalars)
    assert scalars(deferring) == scalars(plain)
    for hub in (plain, deferring):
        hub.update_scalar("train/loss", torch.tensor(5.0))
    state, expected = deferring.state_dict(), plain.state_dict()
    assert state["log_scalars"]["train/loss"].current() == 5.0
    assert state["resumed_keys"] == expected["resumed_keys"]
    assert deferring.get_scalar("train/loss").mean(3) == plain.get_scalar("train/loss").mean(3)


def test_nothing_waits_until_it_is_read_and_then_once_a_dtype():
    plain, deferring = hubs()
    for hub in (plain, deferring):
        for key, value in values(0).items():
            hub.update_scalar(key, value)
    with Waits() as waits:
        for step in range(1, 50):
            for key, value in values(step).items():
                deferring.update_scalar(key, value)
        deferring.get_scalar("train/lr")  # others go on waiting
    assert waits.names == []
    with Waits() as waits:
        for key, value in values(1).items():
            plain.update_scalar(key, value)
    assert len(waits.names) == 4  # one for each tensor, in each step
    stacks = []
    with pytest.MonkeyPatch.context() as patch:
        stack = torch.stack
        patch.setattr(torch, "stack", lambda parts: stacks.append(len(parts)) or stack(parts))
        assert len(deferring.log_scalars["train/loss"].data[0]) == 50
    assert sorted(stacks) == [49, 49, 49, 49]  # float32, bfloat16, float64, int64


def test_what_is_overwritten_after_it_is_logged():
    _, hub = hubs()
    buffer = torch.zeros(())
    for step in range(3):
        buffer.fill_(step)
        hub.update_scalar("train/statistic", buffer)
    assert hub.get_scalar("train/statistic").data[0].tolist() == [0, 1, 2]


def test_a_history_is_filled_in_place_and_keeps_its_longest_length():
    _, hub = hubs()
    hub.update_scalar("train/loss", 0.0)
    history = hub.get_scalar("train/loss")
    history.max_length = 4
    for step in range(1, 7):
        hub.update_scalar("train/loss", torch.tensor(float(step)))
    assert hub.get_scalar("train/loss") is history
    assert history.data[0].tolist() == [3, 4, 5, 6] and len(history.data[1]) == 4
    history.update(7.0, 2)  # by somebody else
    for step in range(8, 5000):
        hub.update_scalar("train/loss", step, count=step)
        if step % 1000 < 3:
            assert hub.get_scalar("train/loss").data[0].tolist() == [*range(step - 3, step + 1)]
    copied = copy.deepcopy(hub.state_dict()["log_scalars"]["train/loss"])
    assert copied.data[0].tolist() == copied.data[1].tolist() == [4996, 4997, 4998, 4999]


def test_a_history_grows_without_being_copied_at_each_step():
    _, hub = hubs()
    arrays = set()
    for step in range(3000):
        hub.update_scalar("train/time", float(step))
        history = hub.get_scalar("train/time").data[0]
        arrays.add(id(history.base))
        assert history[-1] == step and len(history) == step + 1
    assert len(arrays) <= 4
    assert history.tolist() == list(range(3000))


def test_what_mmengine_refuses_is_refused_at_once():
    _, hub = hubs()
    for _ in range(2):
        with pytest.raises(AssertionError):
            hub.update_scalar("train/loss", torch.zeros(2))
        hub.update_scalar("train/loss", 1.0)
    with pytest.raises(AssertionError):
        hub.update_scalar("train/loss", torch.zeros(2))
    with pytest.raises(AssertionError):
        hub.update_scalar("train/loss", np.zeros(2))
    with pytest.raises(AssertionError):
        hub.update_scalar("train/loss", 1.0, resumed=False)
    with pytest.raises((AssertionError, TypeError)):  # its message fails for some kinds
        hub.update_scalar("train/loss", 1.0, count=1.5)
    with pytest.raises(KeyError):
        hub.get_scalar("train/nothing")


def test_a_history_of_whole_numbers_takes_fractions():
    plain, deferring = hubs()
    for hub in (plain, deferring):
        history = HistoryBuffer(np.array([1, 2]), np.array([1, 1]))
        hub._log_scalars["train/mixed"] = history
        for value in (3, 0.5, torch.tensor(4), 0.25):
            hub.update_scalar("train/mixed", value)
            hub.get_scalar("train/mixed")
    assert scalars(deferring) == scalars(plain)
    assert scalars(deferring)["train/mixed"][0] == [1, 2, 3, 0.5, 4, 0.25]


def test_what_waits_for_a_key_that_is_gone_is_dropped():
    _, hub = hubs()
    held = hub.log_scalars
    for key, value in (("train/loss", 2.0), ("train/time", 1.0)):
        hub.update_scalar(key, 0.0)
        hub.update_scalar(key, torch.tensor(value))
    held.pop("train/loss")
    assert list(hub.log_scalars) == ["train/time"]
    assert hub.get_scalar("train/time").data[0].tolist() == [0, 1]


def test_a_key_that_is_taken_out_takes_what_waits_with_it():
    _, hub = hubs()
    hub.update_scalar("train/loss", 0.0)
    hub.update_scalar("train/loss", torch.tensor(1.0))
    hub.log_scalars.pop("train/loss")  # as PhaseHook does
    hub.update_scalar("train/loss", torch.tensor(2.0))
    assert hub.get_scalar("train/loss").data[0].tolist() == [2]


def test_a_released_hub_is_a_plain_one():
    _, hub = hubs()
    hub.update_scalar("train/loss", 0.0)
    hub.update_scalar("train/loss", torch.tensor(1.0))
    DeferringMessageHub.adopt(hub)  # a second time: nothing
    hub.release()
    assert type(hub) is MessageHub
    assert hub.get_scalar("train/loss").data[0].tolist() == [0, 1]


# --- in a training -------------------------------------------------------------------------------


class Seen(Hook):
    """Notes the kind of hub in a step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.kind = type(runner.message_hub)


def logged(folder, kind):
    """Train, and return the log, what the checkpoint holds of it, and the hub's kinds."""
    cfg = toy.runner_config(
        folder,
        **{
            "default_hooks.runtime_info": dict(type=kind),
            "default_hooks.logger.interval": 2,
            "default_hooks.checkpoint.by_epoch": False,
            "default_hooks.checkpoint.interval": 5,  # not where a log is due
            "default_hooks.checkpoint.max_keep_ckpts": -1,
            "optim_wrapper.type": "BFloat16OptimWrapper",
            "optim_wrapper.clip_grad": dict(max_norm=1.0),
            "train_cfg.max_epochs": 3,
            "log_processor": dict(
                by_epoch=True,
                window_size=3,
                custom_cfg=[
                    dict(
                        data_src="loss",
                        log_name="loss_max",
                        method_name="max",
                        window_size="epoch",
                    )
                ],
            ),
        },
    )
    runner, seen = build_runner(cfg), Seen()
    runner.register_hook(seen)
    runner.train()
    (file,) = folder.rglob("scalars.json")
    timing = ("time", "data_time", "memory")
    log = [
        [item for item in json.loads(line).items() if item[0] not in timing]
        for line in file.read_text().splitlines()
    ]
    hub = torch.load(folder / "iter_5.pth")["message_hub"]
    saved = {k: v.data[0].tolist() for k, v in hub["log_scalars"].items() if "time" not in k}
    infos = [{*hub["runtime_info"]}, {*runner.message_hub.runtime_info}]
    text = next(folder.rglob("*.log")).read_text()
    lines = [re.sub(r"eta: \S+|\w*time: \S+", "", x) for x in re.findall(r"Epoch\(train.*", text)]
    return log, saved, lines, infos, seen.kind, type(runner.message_hub)


def test_the_log_and_the_checkpoint_of_a_run_are_the_same(tmp_path):
    *expected, kind, _ = logged(tmp_path / "plain", "RuntimeInfoHook")
    assert kind is MessageHub
    *found, kind, afterwards = logged(tmp_path / "deferred", "DeferredRuntimeInfoHook")
    assert kind is DeferringMessageHub and afterwards is MessageHub
    log, saved, lines, infos = expected
    assert found == expected
    assert infos[0] > {"loop_stage", "max_epochs"} and "loop_stage" not in infos[1]
    assert len(lines) == 3 and "grad_norm" in lines[0] and "loss_max" in lines[0]
    assert len(saved["train/loss"]) == 5 and len(saved["train/grad_norm"]) == 5
    assert any(key == "accuracy/top1" for line in log for key, _ in line)


def test_clipping_is_mmengines_and_does_not_wait():
    results = []
    for kind in (OptimWrapper, BFloat16OptimWrapper):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        wrapper = kind(torch.optim.SGD(network.parameters(), 0.1), clip_grad=dict(max_norm=0.5))
        wrapper.message_hub = hub = MessageHub(kind.__name__)
        network(torch.arange(6.0).view(2, 3)).sum().backward()
        network.bias.requires_grad_(False)  # frozen since, with a gradient left
        wrapper.step()
        results.append((network.weight.tolist(), hub.get_scalar("train/grad_norm").current()))
        DeferringMessageHub.adopt(hub)
        with Waits() as waits:
            wrapper.step()
        assert bool(waits.names) == (kind is OptimWrapper)
        optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), 0.1)
        wrapper = kind(optimizer, clip_grad=dict(max_norm=0.5))
        wrapper.message_hub = MessageHub(f"{kind.__name__} of no gradient")
        wrapper.step()
        assert "train/grad_norm" not in wrapper.message_hub.log_scalars
    assert results[0] == results[1]
    by_value = BFloat16OptimWrapper(
        torch.optim.SGD(network.parameters(), 0.1), clip_grad=dict(type="value", clip_value=0.01)
    )
    by_value.step()
    assert network.weight.grad.abs().max() <= 0.01


# --- steps ---------------------------------------------------------------------------------------


def ready(method, device):
    """Return a model of the digits' pair, its optimizer's wrapper, a batch and a log."""
    model = toy.digits_pair(method).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = BFloat16OptimWrapper(
        torch.optim.SGD(parameters, 0.01, momentum=0.9), clip_grad=dict(max_norm=5.0)
    )
    wrapper.message_hub = hub = MessageHub(method)
    DeferringMessageHub.adopt(hub)
    samples = toy.batch()["data_samples"]
    for sample in samples:
        sample.set_gt_label(sample.gt_label.to(device))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=device)

    def step():
        for name, value in model.train_step(
            dict(inputs=images, data_samples=samples), wrapper
        ).items():
            hub.update_scalar(f"train/{name}", value)

    return step


@pytest.mark.parametrize("method", ["student", *METHODS])
def test_a_step_waits_for_nothing(method):
    step = ready(method, "cuda" if torch.cuda.is_available() else "cpu")
    step()  # makes momentum and what is kept for later steps
    if method in WAITING or (method in CHECKING_ON_CPU and not torch.cuda.is_available()):
        with Waits() as waits:
            step()
        # Else it belongs to the others; whether a CPU checks is torch's choice.
        assert waits.names or method in CHECKING_ON_CPU
        return
    with no_waits():
        step()
