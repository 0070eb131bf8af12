"""What the networks are given is checked before the first step: images, classes and batches."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
import toy
from mmengine.dataset import ConcatDataset, DefaultSampler
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
from tool_runs import TEACHER, call
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.datasets import Digits
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.data_checks import (
    check_classes,
    check_even_batches,
    images_per_process,
    trained_classes,
)
from mskd_plugin.hooks.preflight import PreflightHook
from mskd_plugin.hooks.trial import first_images, read_items
from mskd_plugin.launch import build_runner

LOADING = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]


def image_folder(root, classes=toy.CLASSES, count=3):
    """Write images of 32 x 32 pixels, ``count`` to a class, and return the data set's config."""
    generator = np.random.default_rng(0)
    for name in [f"c{i}" for i in range(classes)] if isinstance(classes, int) else classes:
        for i in range(count):
            pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
            mmcv.imwrite(pixels, str(root / name / f"{i}.png"))
    return dict(type="CustomDataset", data_root=str(root), pipeline=LOADING)


def files_config(tmp_path, **classes):
    """Return the toy's config with image folders in the place of the digits."""
    cfg = toy.runner_config(tmp_path)
    for stage in ("train", "val", "test"):
        folder = image_folder(tmp_path / stage, classes.get(stage, toy.CLASSES))
        cfg[f"{stage}_dataloader"].dataset = folder
    return cfg


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_split_that_lacks_a_class_is_refused(tmp_path, stage):
    cfg = files_config(tmp_path, **{stage: ["c0", "c1", *(f"c{i}" for i in range(3, 10))]})
    told = (
        f"`{stage}_dataloader.dataset` to be data with the 10 classes of the training data, number "
        r"2 of them 'c2', but got 9 classes, number 2 'c3'.*classes=\[...\]"
    )
    toy.fails(cfg, told)
    cfg = files_config(tmp_path / "b")
    cfg[f"{stage}_dataloader"].dataset.classes = [f"c{i}" for i in range(10)]
    assert toy.train(cfg)[1].count > 0


@pytest.mark.parametrize("given", [None, ["a", "b"], ("a", "b")])
def test_classes_that_are_not_stated_or_the_same_pass(given):
    loop = SimpleNamespace(dataloader=DataLoader(SimpleNamespace(metainfo=dict(classes=given))))
    runner = SimpleNamespace(
        train_dataloader=DataLoader(SimpleNamespace(metainfo=dict(classes=["a", "b"]))),
        _val_loop=loop,
        _test_loop=dict(),
    )
    check_classes(runner)
    loop.dataloader.dataset.metainfo["classes"] = ["a", "b", "c"]
    with pytest.raises(SettingError, match="2 classes .* number 2 of them None.* got 3 .* 2 'c'"):
        check_classes(runner)


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"meta": None}, {"meta": {"dataset_meta": None}}, {"meta": {"dataset_meta": {}}}],
)
def test_a_checkpoint_that_states_no_classes(checkpoint):
    assert trained_classes(checkpoint) is None


def test_other_classes_than_the_checkpoints_are_not_tested(tmp_path):
    call("train", TEACHER, "--work-dir", tmp_path, epochs=1)
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    call("test", TEACHER, tmp_path / "epoch_1.pth", "--work-dir", tmp_path)
    classes = checkpoint["meta"]["dataset_meta"]["classes"]
    checkpoint["meta"]["dataset_meta"]["classes"] = [*classes[:4], "more", *classes[4:]]
    torch.save(checkpoint, tmp_path / "other.pth")
    told = (
        f"`test_dataloader.dataset` to be data with the 11 classes of the training of '.*other.pth'"
        f", number 4 of them 'more', but got 10 classes, number 4 {classes[4]!r}"
    )
    with pytest.raises(SettingError, match=told):
        call("test", TEACHER, tmp_path / "other.pth", "--work-dir", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image"], ids=["empty", "text"])
@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_first_image_that_cannot_be_read_is_named(tmp_path, stage, content):
    cfg = files_config(tmp_path)
    # Empty files are no images to the data set unless they are listed.
    file = tmp_path / stage / "c0" / "0.png"
    file.write_bytes(content)
    toy.fails(cfg, rf"`{stage}_dataloader\.dataset` to be images .* got '{file}': \w+")


@DATASETS.register_module()
class Stream(IterableDataset):
    """The digits one by one; MMEngine's log wants to know how many."""

    metainfo = Digits.METAINFO

    def __init__(self, count):
        self.digits = Digits(pipeline=[dict(type="PackInputs")], indices=count)

    def __len__(self):
        return len(self.digits)

    def __iter__(self):
        return (self.digits[i] for i in range(len(self)))


def test_images_may_come_as_a_stream(tmp_path):
    cfg = toy.runner_config(tmp_path)
    cfg.train_dataloader.dataset = dict(type="Stream", count=24)
    cfg.train_dataloader.sampler = None
    cfg.train_cfg, cfg.param_scheduler = dict(by_epoch=False, max_iters=4, val_interval=4), None
    assert toy.train(cfg)[1].count == 4
    assert [item["data_samples"].sample_idx for item in read_items(Stream(3))] == [0, 1]

    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.count()

    assert read_items(Endless()) == [0, 1]
    loader = DataLoader(Endless(), batch_size=2)
    check_even_batches(SimpleNamespace(world_size=2, train_dataloader=loader), toy.build())


def test_an_image_that_cannot_be_read_is_named_inside_wrappers_and_without_a_file(tmp_path):
    folder = image_folder(tmp_path, 1)
    (tmp_path / "c0" / "1.png").write_bytes(b"no image")
    folder.pop("type")
    for dataset in (CustomDataset(**folder), ConcatDataset([CustomDataset(**folder)])):
        with pytest.raises(SettingError, match=r"1\.png': \w+Error: \S"):
            first_images(DataLoader(dataset), "val_dataloader")

    class Failing(list):
        def __getitem__(self, index):
            raise OSError()

    with pytest.raises(SettingError, match="got image 0: OSError: no message"):
        read_items(Failing([1]))
    Failing.__getitems__ = Failing.__getitem__
    with pytest.raises(SettingError, match="got the first images: OSError"):
        read_items(Failing([1]))


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
