"""The mends of ``mskd_plugin.host`` for several processes: on CPUs, in logs, and with sync_bn."""

import json
import logging
import os
import subprocess
import sys
import types
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
import torch
from fresh_process import LOAD_HOST_ALONE
from mmengine.hooks import LoggerHook
from mmrazor.models.task_modules import ModuleOutputsRecorder

TRAIN = f"""
import gc, json, os, sys
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
{LOAD_HOST_ALONE}mend, wrapper, work_dir = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if mend == "mended":
    host.run_distributed_on_cpu()
elif mend == "group-only":
    torch.distributed.init_process_group("gloo")

class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1, bias=False)
    def init_weights(self):
        torch.nn.init.constant_(self.fc.weight, 0.5)
    def forward(self, x, y, mode):
        error = self.fc(torch.stack(list(x)))[:, 0] - torch.stack(list(y))
        return {{"loss": error.square().mean()}}

rows = torch.arange(24.0).reshape(8, 3).sin()
runner = Runner(
    model=Line(),
    work_dir=work_dir,
    launcher="pytorch",
    train_dataloader=dict(
        batch_size=4,
        dataset=[dict(x=row[:2], y=row[2]) for row in rows],
        sampler=dict(type="DefaultSampler", shuffle=False),
    ),
    train_cfg=dict(by_epoch=True, max_epochs=3),
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    cfg=dict(model_wrapper_cfg=wrapper) if wrapper else None,
)
runner.train()
group = torch.distributed
with open(f"{{work_dir}}/{{group.get_rank()}}.json", "w") as file:
    json.dump([group.get_backend(), group.get_world_size(), type(runner.model).__name__,
               runner.model.module.fc.weight[0].tolist()], file)
# As mskd_plugin.cli.run_tool does: gloo's threads must not outlive Python.
del runner
gc.collect()
group.destroy_process_group()
"""


def launch(mend, work_dir, wrapper="null"):
    script = work_dir / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(script), mend, wrapper, str(work_dir)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "mend, failure",
    [("none", "set_device"), ("group-only", "device_ids")],
    ids=["group", "wrapper"],
)
def test_two_processes_fail_without_the_mends(tmp_path, mend, failure):
    done = launch(mend, tmp_path)
    assert done.returncode != 0 and failure in done.stderr


@pytest.mark.parametrize(
    "wrapper", ["null", '{"type": "MMDistributedDataParallel", "broadcast_buffers": true}']
)
def test_two_processes_train_as_one(tmp_path, wrapper):
    done = launch("mended", tmp_path, wrapper)
    assert done.returncode == 0, done.stderr
    # Gradient descent on all eight rows, written out.
    rows = np.sin(np.arange(24.0)).reshape(8, 3)
    weight = np.array([0.5, 0.5])
    for _ in range(3):
        error = rows[:, :2] @ weight - rows[:, 2]
        weight = weight - 0.1 * 2 * error @ rows[:, :2] / len(rows)
    for rank in range(2):
        backend, size, kind, trained = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (backend, size, kind) == ("gloo", 2, "MMDistributedDataParallel")
        assert trained == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("accelerator", ["cuda", "npu"])
def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch, accelerator):
    from mmengine import device
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    calls = []
    monkeypatch.setattr(device, "get_device", lambda: accelerator)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(index))
    monkeypatch.setattr(utils.torch_dist, "init_process_group", lambda **kw: calls.append(kw))
    utils._init_dist_pytorch("nccl", timeout=5)
    assert calls == [3, {"backend": "nccl", "timeout": 5}]

    seen = types.SimpleNamespace()
    ddp = torch.nn.parallel.DistributedDataParallel
    monkeypatch.setattr(ddp, "__init__", lambda self, **kwargs: vars(seen).update(kwargs))
    with suppress(AttributeError):  # the replaced __init__ makes no module
        MMDistributedDataParallel(module=torch.nn.Linear(1, 1), device_ids=[3])
    assert seen.device_ids == [3]


def test_a_machine_without_an_accelerator_gets_gloo_and_no_devices(monkeypatch):
    from mmengine import device
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    calls, deepspeed = [], types.SimpleNamespace()
    deepspeed.init_distributed = lambda **kwargs: calls.append(kwargs)
    monkeypatch.setattr(device, "get_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(index))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: calls.append((a, k))
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    utils._init_dist_pytorch("nccl", timeout=5)
    utils._init_dist_pytorch("mpi")
    assert calls == [(("gloo",), {"timeout": 5}), (("mpi",), {})]
    calls.clear()
    utils._init_dist_pytorch("gloo", init_backend="deepspeed", timeout=5)  # left to mmengine
    assert calls == [3, {"dist_backend": "gloo", "timeout": 5}]

    seen = {}
    ddp = torch.nn.parallel.DistributedDataParallel
    monkeypatch.setattr(ddp, "__init__", lambda self, **kwargs: seen.update(kwargs))
    with suppress(AttributeError):  # the replaced __init__ makes no module
        MMDistributedDataParallel(torch.nn.Linear(1, 1), device_ids=[0], output_device=0)
    assert type(seen.pop("module")) is torch.nn.Linear
    assert seen == {"device_ids": None, "output_device": None}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_writes_the_scores_of_a_test(tmp_path, monkeypatch, rank):
    # Two that write at once may leave a piece of the longer text behind the shorter one.
    monkeypatch.setattr("mmengine.dist.utils.get_rank", lambda group=None: rank)
    processor = types.SimpleNamespace(
        get_log_after_epoch=lambda *args, **kwargs: ({"accuracy": 16.0}, "")
    )
    runner = types.SimpleNamespace(
        log_processor=processor, log_dir=tmp_path, test_dataloader=[], logger=logging.getLogger()
    )
    hook = LoggerHook()
    hook.json_log_path = "scores.json"
    hook.after_test_epoch(runner)
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert written == ({} if rank else {"scores.json": {"accuracy": 16.0}})


def test_recorders_on_a_batch_norm_record_with_sync_bn():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    recorder = ModuleOutputsRecorder("1")
    recorder.initialize(network)
    seen = []
    network[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    converted = import_module("mmengine.runner.runner").convert_sync_batchnorm(network).eval()
    assert isinstance(converted[1], torch.nn.SyncBatchNorm)
    with recorder:
        output = converted(torch.randn(2, 3, 5, 5))
    assert torch.equal(recorder.get_record_data(), output) and len(seen) == 1
    assert not converted[0]._forward_pre_hooks


def test_every_place_of_a_batch_norm_keeps_its_hooks():
    convert = import_module("mmengine.runner.runner").convert_sync_batchnorm
    seen, images = [], torch.randn(2, 4, 1, 1)

    def norm():
        module = torch.nn.BatchNorm2d(4).eval()
        module.register_forward_hook(lambda module, *_: seen.append(type(module)))
        return module

    twice, alone = norm(), norm()
    nested = torch.nn.Sequential(torch.nn.Sequential(twice), torch.nn.Sequential(twice))
    for network, places in ((nested, 2), (alone, 1)):
        seen.clear()
        convert(network).eval()(images)
        assert seen == [torch.nn.SyncBatchNorm] * places
    with pytest.raises(ValueError, match="sync_bn should be .* but got other"):
        convert(norm(), "other")
