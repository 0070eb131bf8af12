"""Batches that a training could not use, alone or in several processes, are named before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from torch.utils.data import DataLoader, DistributedSampler

from mskd_plugin.checks.batches import check_batch_size, check_batches, tell_accumulation
from mskd_plugin.checks.processes import check_even_batches, images_per_process
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import PreflightHook
from mskd_plugin.launch import build_runner


def test_an_epoch_without_a_batch(tmp_path):
    cfg = toy.runner_config(tmp_path, **{"train_dataloader.dataset.indices": 7})
    assert len(build_runner(cfg).train_dataloader) == 1
    cfg.train_dataloader.drop_last = True
    with pytest.raises(SettingError, match="`train_dataloader` .* of 8, but got 7 images, and dr"):
        build_runner(cfg)


def test_a_stream_of_images_has_no_number_of_batches():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    check_batches(DataLoader(Stream(), batch_size=8))


ONE = "The last of an epoch's batches of 8 has one image"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dataset.indices": 25}, ONE),
        ({"dataset.indices": 1}, ONE),
        ({"dataset.indices": 24}, None),
        ({"dataset.indices": 26}, None),
        ({"dataset.indices": 25, "drop_last": True}, None),
        ({"dataset.indices": 25, "sampler.type": "InfiniteSampler"}, None),
        ({"dataset.indices": 3, "batch_size": 1, "drop_last": True}, "A batch has one image"),
    ],
)
def test_batches_of_one_image_are_a_warning(tmp_path, capsys, settings, told):
    cfg = toy.runner_config(
        tmp_path, **{f"train_dataloader.{key}": value for key, value in settings.items()}
    )
    runner = build_runner(cfg)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    training, random = runner.model.training, torch.get_rng_state()
    PreflightHook().before_train(runner)
    text = "".join(capsys.readouterr())
    assert text.count("has one image") == (told is not None)
    assert told is None or f"{told}, from which BatchNorm" in text
    assert runner.model.training is training and torch.equal(random, torch.get_rng_state())
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model", [None, toy.classifier("student")], ids=["pair", "student"])
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dataset.indices": 25}, "`train_dataloader.drop_last` to be True.* 25 images in .* of 8"),
        ({"batch_size": 1}, "`train_dataloader.batch_size` to be at least 2, .*, but got 1"),
    ],
)
def test_a_student_that_cannot_train_on_one_image_is_refused(tmp_path, model, settings, match):
    cfg = toy.runner_config(
        tmp_path, model, **{f"train_dataloader.{key}": value for key, value in settings.items()}
    )
    student = cfg.model.get("architecture", cfg.model)
    student.neck = [student.neck, dict(type="LinearNeck", in_channels=8, out_channels=8)]
    student.neck[1]["norm_cfg"] = dict(type="BN1d")
    toy.fails(cfg, match)
    cfg.train_dataloader.update(drop_last=True, batch_size=8)
    cfg.experiment_name += "_b"
    assert toy.train(cfg)[1].count == 6


def test_a_student_that_cannot_run_at_all_is_named_as_such(tmp_path):
    settings = {"train_dataloader.dataset.indices": 25, "model.architecture.head.in_channels": 7}
    toy.fails(toy.runner_config(tmp_path, **settings), "`model.architecture` .* RuntimeError")


@pytest.mark.parametrize(
    ("count", "round_up", "counts"), [(24, False, {12}), (25, False, {12, 13}), (25, True, {13})]
)
def test_the_images_of_each_process_are_counted(monkeypatch, count, round_up, counts):
    found = set()
    for rank in range(2):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, 2))
        sampler = DefaultSampler(range(count), seed=0, round_up=round_up)
        found.add(len(sampler))
        loader = DataLoader(range(count), batch_size=8, sampler=sampler)
        assert images_per_process(loader, 2) == counts
    assert found == counts


def test_one_process_takes_a_sampler_of_unknown_length():
    loader = DataLoader(range(25), batch_size=4, sampler=iter(range(25)))
    check_even_batches(SimpleNamespace(world_size=1, train_dataloader=loader), toy.build())


@pytest.mark.parametrize("drop_last", [False, True])
def test_torchs_own_sampler_gives_all_processes_as_many_images(drop_last):
    found = set()
    for rank in range(2):
        sampler = DistributedSampler(range(25), 2, rank, drop_last=drop_last)
        found.add(len([*sampler]))
        assert images_per_process(DataLoader(range(25), sampler=sampler), 2) == found
    assert found == {12 if drop_last else 13}


@pytest.mark.parametrize(
    ("count", "negatives", "world_size", "settings", "fails"),
    [
        (25, "all", 2, {}, True),
        (24, "all", 2, {}, False),
        (25, "process", 2, {}, False),  # two batches each
        (33, "process", 2, {}, True),
        (33, "process", 1, {}, False),
        (33, "process", 2, {"drop_last": True}, False),
        (31, "process", 2, {"drop_last": True}, True),
        (25, "all", 1, {}, False),
        (25, "all", 2, {"drop_last": True}, False),
        (31, "all", 2, {"drop_last": True}, True),
        (25, "all", 2, {"sampler.round_up": True}, False),
    ],
)
def test_processes_have_as_many_batches_and_gathered_ones_of_one_size(
    tmp_path, count, negatives, world_size, settings, fails
):
    model = toy.algorithm(distiller=toy.distiller(), teacher_ckpt=str(toy.teacher_file(tmp_path)))
    model["distiller"]["distill_losses"]["loss_mskd_stage3"]["negatives"] = negatives
    settings = {"dataset.indices": count, "sampler.round_up": False, **settings}
    cfg = toy.runner_config(
        tmp_path, model, **{f"train_dataloader.{key}": value for key, value in settings.items()}
    )
    runner = build_runner(cfg)
    runner._world_size = world_size
    if not fails:
        return PreflightHook().before_train(runner)
    told = f"`train_dataloader.sampler.round_up` to be True .* False with {count} images for 2 proc"
    with pytest.raises(SettingError, match=told):
        PreflightHook().before_train(runner)


def test_no_scaling_is_advised_where_it_is_refused():
    messages = []
    runner = SimpleNamespace(
        cfg=Config(dict(auto_scale_lr=dict(base_batch_size=16), param_scheduler=[])),
        train_dataloader=DataLoader(range(64), batch_size=8),
        world_size=1,
        logger=SimpleNamespace(warning=messages.append),
    )
    for schedulers in ([], [dict(type="OneCycleLR", eta_max=0.1)]):
        runner.cfg.param_scheduler = schedulers
        check_batch_size(runner, None)
    follows, states_its_own = messages
    assert follows.endswith("auto_scale_lr.base_batch_size=16: --auto-scale-lr scales it.")
    assert states_its_own.endswith("auto_scale_lr.base_batch_size=16.")


@pytest.mark.parametrize(
    ("world_size", "size", "accumulated", "told"),
    [(1, 8, 2, False), (2, 8, 1, False), (2, 8, 2, True), (1, 8, 1, True), (4, 2, 2, False)],
)
def test_a_step_takes_the_images_of_all_processes_and_batches(world_size, size, accumulated, told):
    messages = []
    runner = SimpleNamespace(
        cfg=dict(
            auto_scale_lr=dict(base_batch_size=16),
            optim_wrapper=dict(accumulative_counts=accumulated),
        ),
        train_dataloader=DataLoader(range(64), batch_size=size),
        world_size=world_size,
        logger=SimpleNamespace(warning=messages.append),
    )
    check_batch_size(runner, None)
    assert len(messages) == told
    messages.clear()
    tell_accumulation(runner, None)
    assert len(messages) == (accumulated > 1)
