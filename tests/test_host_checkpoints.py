"""The mends of ``mskd_plugin.host`` that let MMEngine resume from its checkpoints."""

import os
import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import METRICS, PARAM_SCHEDULERS
from mmengine.runner import Runner, find_latest_checkpoint, runner
from torch import serialization

from mskd_plugin import host

checks_weights = pytest.mark.skipif(
    not hasattr(serialization, "get_unsafe_globals_in_checkpoint"),
    reason="torch before 2.6 loads whole checkpoints by default",
)


class Line(BaseModel):
    """A line through the origin, with the mean square as its loss."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(self.fc.weight, 0.5)

    def forward(self, x, y, mode):
        error = self.fc(torch.stack(list(x)))[:, 0] - torch.stack(list(y))
        return {"loss": error.square().mean()} if mode == "loss" else error.detach().tolist()


class MeanError(BaseMetric):
    default_prefix = "test"

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {"error": np.mean(np.abs(results)), "single": np.float32(results[0])}


def build_runner(work_dir, epochs, max_keep_ckpts=-1, **settings):
    METRICS.register_module(module=MeanError, force=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 3, generator=generator)
    dataset = [{"x": row[:2], "y": row[2]} for row in rows]
    loader = {
        "batch_size": 4,
        "dataset": dataset,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
    }
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator={"type": "MeanError"},
        val_cfg={},
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "MultiStepLR", "milestones": [1]},
        default_hooks={
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": 1,
                "max_keep_ckpts": max_keep_ckpts,
                "save_best": "test/error",
                "rule": "less",
            },
            "logger": {"type": "LoggerHook", "interval": 1},
        },
        randomness={"seed": 0},
        experiment_name=uuid.uuid4().hex,  # a runner of the same name would share its histories
        **settings,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two epochs, with a checkpoint after each."""
    runner = build_runner(tmp_path_factory.mktemp("straight"), 2)
    runner.train()
    return runner


@pytest.fixture
def checkpoint(straight):
    return Path(straight.work_dir) / "epoch_1.pth"


@pytest.fixture
def without_safe_globals():
    kept = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    yield
    serialization.clear_safe_globals()
    serialization.add_safe_globals(kept)


@checks_weights
def test_a_checkpoint_is_refused_without_the_mend(checkpoint, tmp_path, without_safe_globals):
    unsafe = set(serialization.get_unsafe_globals_in_checkpoint(checkpoint))
    assert {"mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"} < unsafe
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        build_runner(tmp_path, 2, resume=True, load_from=str(checkpoint)).train()
    host.allow_checkpoint_classes()
    assert serialization.get_unsafe_globals_in_checkpoint(checkpoint) == []
    torch.load(checkpoint, weights_only=True)


@pytest.mark.parametrize("version", ["2.5.1", "2.6.0.dev20241015+cpu", "2.6.0"])
def test_classes_are_allowed_where_torch_checks_them(monkeypatch, version):
    allowed = []
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(serialization, "add_safe_globals", allowed.extend, raising=False)
    host.allow_checkpoint_classes()
    assert (HistoryBuffer in allowed) == (version != "2.5.1")


def test_attributes_of_other_objects_are_told():
    with pytest.raises(pickle.UnpicklingError, match=r"of OneCycleLR, but got 'mean' of \[1\]"):
        host._checkpoint_function([1], "mean")


def test_resuming_restores_weights_histories_and_scores(checkpoint, straight, tmp_path):
    resumed = build_runner(tmp_path / "a", 1, resume=True, load_from=str(checkpoint))
    resumed.train()  # nothing is left to train
    kept = torch.load(checkpoint)  # with the check where it is the default
    assert resumed.epoch == 1 and resumed.iter == 2
    assert torch.equal(resumed.model.fc.weight, kept["state_dict"]["fc.weight"])
    best = resumed.message_hub.get_info("best_score")
    assert best == kept["message_hub"]["runtime_info"]["best_score"] and isinstance(
        best, np.float64
    )
    history = resumed.message_hub.get_scalar("train/loss")
    assert len(history.data[0]) == 2 and history.mean() == np.mean(history.data[0])

    resumed = build_runner(tmp_path / "b", 2, resume=True, load_from=str(checkpoint))
    resumed.train()
    assert torch.equal(resumed.model.fc.weight, straight.model.fc.weight)
    histories = [r.message_hub.get_scalar("train/loss").data[0] for r in (resumed, straight)]
    assert histories[0].tolist() == histories[1].tolist() and len(histories[0]) == 4


@checks_weights
@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_numbers_of_both_numpys_are_read(tmp_path, package):
    content = {
        "array": np.arange(3.0),
        "count": np.arange(3),
        "score": [np.float32(0.5), np.float64(0.25), np.int64(3), np.int32(2), np.bool_(True)],
        "history": HistoryBuffer([1.0, 3.0], [1, 1]),
    }
    file = tmp_path / "content.pth"
    torch.save(content, file, _use_new_zipfile_serialization=False)
    pickled = file.read_bytes()
    for name in (b"numpy._core.", b"numpy.core."):
        pickled = pickled.replace(b"c" + name, b"c" + package.encode() + b".")
    file.write_bytes(pickled)
    read = torch.load(file, weights_only=True)
    assert read["array"].tolist() == [0, 1, 2] and read["count"].dtype == np.int64
    assert read["score"] == content["score"]
    assert [type(v) for v in read["score"]] == [type(v) for v in content["score"]]
    assert read["history"].mean() == 2


class Attack:
    """Pickles as a call, or as an attribute of an object."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@checks_weights
@pytest.mark.parametrize(
    "content",
    [
        Attack(getattr, HistoryBuffer, "__init__"),
        Attack(getattr, HistoryBuffer, "register_statistics"),
        Attack(getattr, torch.nn.Parameter, "mean"),
        Attack(os.getenv, "HOME"),
        np.array([Attack(os.getenv, "HOME")], dtype=object),
        np.datetime64("2025-01-01"),
    ],
    ids=["init", "register", "other-class", "function", "object-array", "date"],
)
def test_anything_else_is_still_refused(tmp_path, content):
    torch.save(content, tmp_path / "attack.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "attack.pth", weights_only=True)


SCHEDULERS = {
    "ConstantLR": {"factor": 0.5},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineRestartLR": {"periods": [3, 3], "restart_weights": [1, 0.5], "eta_min": 0},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"end": 6},
    "MultiStepLR": {"milestones": [2, 4]},
    "OneCycleLR": {"eta_max": 0.3, "total_steps": 8},
    "PolyLR": {"end": 6},
    "StepLR": {"step_size": 2},
}


@checks_weights
@pytest.mark.parametrize(
    "kind, anneal", [*((k, None) for k in SCHEDULERS), ("OneCycleLR", "linear")]
)
def test_every_schedule_resumes_with_the_check_on(tmp_path, kind, anneal):
    settings = SCHEDULERS[kind] | ({"anneal_strategy": anneal} if anneal else {})

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, PARAM_SCHEDULERS.build({"type": kind, "optimizer": optimizer, **settings})

    def rates(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]["lr"]

    optimizer, scheduler = build()
    list(rates(optimizer, scheduler, 3))
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pth")
    expected = list(rates(optimizer, scheduler, 3))

    optimizer, scheduler = build()
    states = torch.load(tmp_path / "state.pth", weights_only=True)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert list(rates(optimizer, scheduler, 3)) == expected


class Killed(BaseException):
    pass


# Of each epoch the checkpoint, the best one, and the checkpoint again, with the best in it.
@pytest.mark.parametrize(("room", "writing", "left"), [(1, 4, 1), (2, 4, 1), (1, 6, 2), (-1, 6, 2)])
def test_who_is_killed_while_writing_has_a_checkpoint(tmp_path, monkeypatch, room, writing, left):
    put, written = LocalBackend.put, []

    def put_half(self, content, path):
        written.append(path)
        put(self, content[: len(content) // 2] if len(written) == writing else content, path)
        if len(written) == writing:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(LocalBackend, "put", put_half)
        with pytest.raises(Killed):
            build_runner(tmp_path, 3, room).train()
    newest = find_latest_checkpoint(str(tmp_path))
    assert torch.load(newest)["meta"]["epoch"] == left
    build_runner(tmp_path, 4, room, resume=True).train()
    kept = {path.name for path in tmp_path.glob("epoch_*.pth")}
    assert kept == {f"epoch_{n}.pth" for n in (range(1, 5) if room < 0 else range(5 - room, 5))}
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_at_an_address_is_left_to_its_backend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match="petrel_client"):
        runner.save_checkpoint({}, "s3://bucket/epoch_1.pth")
    assert not list(tmp_path.iterdir())
