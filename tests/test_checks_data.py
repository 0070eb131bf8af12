"""What the networks are given is checked before the first step: folders, images and classes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, default_collate
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
from tool_runs import TEACHER, call
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.checks.data import (
    check_classes,
    check_data_roots,
    check_images,
    check_memories,
    first_images,
    read_items,
    tell_batch_augments,
    trained_classes,
)
from mskd_plugin.checks.processes import check_even_batches
from mskd_plugin.datasets import Digits
from mskd_plugin.errors import SettingError

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


@pytest.mark.parametrize("loader", [f"{s}_dataloader" for s in ("train", "val", "test")])
def test_data_roots_inside_wrappers_and_elsewhere(tmp_path, loader):
    inner = dict(type="CIFAR10", data_root=str(tmp_path / "nowhere"))
    wrapped = dict(type="RepeatDataset", times=2, dataset=dict(type="KFoldDataset", dataset=inner))
    with pytest.raises(SettingError, match=f"{loader}.dataset.data_root.*nowhere"):
        check_data_roots(Config({loader: dict(dataset=wrapped)}))
    inner["data_root"] = "s3://bucket/images"  # not on this machine
    check_data_roots(Config({loader: dict(dataset=wrapped)}))


def test_the_outer_of_two_data_roots_counts_and_a_name_is_no_data_set(tmp_path):
    inner = dict(type="CIFAR10", data_root=str(tmp_path))
    outer = dict(type="Own", data_root=str(tmp_path / "nowhere"), dataset=inner)
    with pytest.raises(SettingError, match=r"data_root.*nowhere"):
        check_data_roots(Config(dict(val_dataloader=dict(dataset=outer))))
    outer.update(data_root=str(tmp_path), dataset="birds")
    check_data_roots(Config(dict(val_dataloader=dict(dataset=outer))))
    del outer["data_root"]
    check_data_roots(Config(dict(val_dataloader=dict(dataset=outer))))


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
    check_classes(runner, None)
    loop.dataloader.dataset.metainfo["classes"] = ["a", "b", "c"]
    with pytest.raises(SettingError, match="2 classes .* number 2 of them None.* got 3 .* 2 'c'"):
        check_classes(runner, None)


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


def test_data_sets_of_none_and_of_one_image():
    for loader in ("train_dataloader", "val_dataloader"):
        with pytest.raises(SettingError, match=f"{loader}.dataset.*at least one.*empty"):
            read_items([], loader)
    assert first_images(DataLoader([7])).tolist() == [7, 7]
    assert first_images(DataLoader([7, 8, 9])).tolist() == [7, 8]


def test_images_are_read_as_torch_would():
    class Batches(list):
        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            return [10 * index for index in indices]

    assert first_images(DataLoader(Batches([7, 8, 9]))).tolist() == [0, 10]


def test_what_a_data_set_refuses_is_told_in_its_own_words():
    class Refusing(list):
        def __getitem__(self, index):
            raise SettingError("crop_size", "no larger than the images", 64)

    with pytest.raises(SettingError, match="^Expected `crop_size` to be no larger .* got 64.$"):
        read_items(Refusing([1]))


def test_images_are_looked_at_without_drawing_for_the_training():
    pipeline = [dict(type="RandomFlip", prob=0.5), dict(type="PackInputs")]
    loader = DataLoader(Digits(pipeline=pipeline), batch_size=2, collate_fn=default_collate)
    for one_hot in (False, True):
        preprocessor = dict(toy.PREPROCESSOR, num_classes=toy.CLASSES, to_onehot=one_hot)
        model = toy.build(data_preprocessor=preprocessor)
        np.random.seed(0)
        check_images(SimpleNamespace(train_dataloader=loader), model)
        assert np.random.rand() == np.random.RandomState(0).rand()


def test_preprocessors_of_other_kinds_take_other_images():
    model = toy.build(data_preprocessor=dict(type="mmengine.ImgDataPreprocessor"))
    check_images(SimpleNamespace(train_dataloader=DataLoader([dict(img=1)])), model)


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
    runner = SimpleNamespace(world_size=2, train_dataloader=loader)
    check_even_batches(runner, toy.build())
    remembering = dict(loss_crd=SimpleNamespace(num_images=24))
    check_memories(runner, SimpleNamespace(distiller=SimpleNamespace(distill_losses=remembering)))


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

    class Wordy(list):
        def __getitem__(self, index):
            raise ValueError("\n  truncated file\n  in the decoder\n")

    with pytest.raises(SettingError, match=r"got image 0: ValueError: truncated file\.$"):
        read_items(Wordy([1]))
    Failing.__getitems__ = Failing.__getitem__
    with pytest.raises(SettingError, match="got the first images: OSError"):
        read_items(Failing([1]))


@pytest.mark.parametrize("shared, told", [({}, True), ({"batch_augments": True}, False)])
def test_batch_augments_that_the_student_alone_states_are_told(shared, told):
    mixing = dict(augments=[dict(type="mmpretrain.Mixup", alpha=0.8)])
    preprocessor = dict(toy.PREPROCESSOR, num_classes=toy.CLASSES)
    if shared:
        preprocessor["batch_augments"] = mixing
    messages = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=messages.append))
    student = dict(toy.classifier("student"), train_cfg=mixing)
    tell_batch_augments(runner, toy.build(architecture=student, data_preprocessor=preprocessor))
    tell_batch_augments(runner, toy.build())  # nobody states any
    assert [message.split(" are ")[0] for message in messages] == (
        ["The student's own batch augments (Mixup)"] * told
    )
