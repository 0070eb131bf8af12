"""Batches whose labels are one tensor: how items are joined, and the preprocessor that reads them
equals mmpretrain's image by image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import toy
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mskd_plugin.connectors import SampleIndex
from mskd_plugin.datasets import BatchSample, Digits, InMemoryImages, collate_batch
from mskd_plugin.errors import SettingError

PACK = [dict(type="PackInputs")]
NORMALISATION = dict(mean=[80.0, 90.5, 100.0], std=[80.0, 70.0, 61.3])
KINDS = ("ClsDataPreprocessor", "BatchDataPreprocessor")


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


def test_collating_items_of_other_data_sets():
    source = Digits(pipeline=PACK, indices=6)
    items = [source[i] for i in (5, 2)]
    batch = collate_batch(items)
    assert batch["inputs"].equal(torch.stack([item["inputs"] for item in items]))
    (sample,) = batch["data_samples"]
    assert sample.gt_label.tolist() == [source[i]["data_samples"].gt_label.item() for i in (5, 2)]
    assert SampleIndex()([sample]).tolist() == [5, 2]
    assert list(sample.metainfo_keys()) == ["sample_idx"]  # which stays on the CPU
    alone = SampleIndex()([items[0]["data_samples"]])  # a batch of one image
    assert alone.shape == (1,) and alone.tolist() == [5]
    mixed = [items[0], dict(items[1], data_samples=DataSample().set_gt_label(1))]
    assert "sample_idx" not in collate_batch(mixed)["data_samples"][0]  # not those of a part
    labels = sample.gt_label
    assert BatchSample.of(labels).gt_label is labels and "sample_idx" not in BatchSample.of(labels)
    with pytest.raises(SettingError, match=r"one class each.*\['gt_label', 'gt_score'\]"):
        collate_batch([dict(items[0], data_samples=items[0]["data_samples"].set_gt_score([0, 1]))])
    with pytest.raises(SettingError, match=r"one class each.*\[0, 1\]"):
        collate_batch([dict(inputs=labels, data_samples=DataSample().set_gt_label([0, 1]))])


def test_a_data_loader_pins_the_labels(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda labels: labels + 100)  # needs a GPU
    sample = BatchSample.of(torch.tensor([0, 1]), torch.tensor([5, 2]))
    pinned = sample.pin_memory()
    assert pinned is sample and pinned.gt_label.tolist() == [100, 101]
    assert pinned.sample_idx.tolist() == [5, 2]


@pytest.mark.parametrize("name", ["set_gt_score", "set_pred_label", "set_pred_score", "set_mask"])
def test_a_batch_is_no_image(name):
    with pytest.raises(SettingError, match="data sample for each image"):
        getattr(BatchSample.of(torch.tensor([0, 1])), name)(torch.ones(1))


def test_losses_and_gradients_are_those_of_the_same_pixels_image_by_image():
    held = InMemoryImages(Digits(pipeline=PACK, indices=30), padding=4, flip_prob=0.5, device="cpu")
    batch = held.__getitems__([7, 21, 0, 13])
    labels = batch["data_samples"][0].gt_label
    items = [
        dict(inputs=image, data_samples=DataSample().set_gt_label(label))
        for image, label in zip(batch["inputs"].contiguous(), labels)
    ]
    forms = (default_collate(items), collate_batch(items), batch)
    distiller = toy.distiller(keep="consistent")  # reads the labels, too
    results = []
    for kind in KINDS:
        preprocessor = dict(type=f"mmpretrain.{kind}", **NORMALISATION)
        for data in forms:
            model = toy.build(data_preprocessor=preprocessor, distiller=distiller)
            model.train()
            losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode="loss")
            sum(losses.values()).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([*losses.values(), *gradients])
    assert len(results[0]) > 10 and all(value.isfinite().all() for value in results[0])
    for first, *others in (results[:3], results[3:]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # Pixels that are normalised in one rounding less.
    torch.testing.assert_close(results[3], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        NORMALISATION,
        dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb=True),
        dict(to_rgb=True, pad_size_divisor=5, pad_value=2),
        dict(num_classes=4, to_onehot=True),
        dict(num_classes=4, batch_augments=dict(augments=dict(type="Mixup", alpha=0.8))),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["tensor", "list", "float"])
def test_the_preprocessor_equals_the_hosts(settings, training, form):
    images = torch.randint(0, 256, (4, 3, 6, 7), dtype=torch.uint8)
    given = {"tensor": images, "list": list(images), "float": images.float()}[form]
    results = []
    for kind in KINDS:
        samples = [DataSample().set_gt_label(i) for i in range(4)]
        preprocessor = MODELS.build(dict(type=kind, **settings))
        torch.manual_seed(0)
        np.random.seed(0)
        results.append(preprocessor(dict(inputs=given, data_samples=samples), training))
    host, mine = results
    # To the rounding of values of up to 255 / 4.
    torch.testing.assert_close(mine["inputs"], host["inputs"], rtol=3e-7, atol=5e-6)
    for a, b in zip(mine["data_samples"], host["data_samples"], strict=True):
        assert a.keys() == b.keys() and all(a.get(key).equal(b.get(key)) for key in a.keys())
    if form == "float":
        assert given.equal(images.float())  # nothing is written into what was given
    if "mean" in settings:
        host, mine = (MODELS.build(dict(type=k, **settings)) for k in KINDS)
        for size in ((6, 7), (5, 4)):  # one after the other
            part = dict(inputs=images[..., : size[0], : size[1]])
            torch.testing.assert_close(mine(part)["inputs"], host(part)["inputs"])
        assert preprocessor.mean.flatten().tolist() == pytest.approx(settings["mean"])
        assert not preprocessor.state_dict()  # as the host's, none of it in checkpoints


@pytest.mark.parametrize("channels, means", [(1, 3), (3, 1), (1, 1), (1, None), (4, 1)])
@pytest.mark.parametrize("form", [torch.stack, list])
def test_grey_images_and_one_mean_for_all_channels_as_the_host_takes_them(channels, means, form):
    images = list(torch.randint(0, 256, (4, channels, 6, 7), dtype=torch.uint8))
    settings = dict(mean=[80.0, 90.5, 100.0][:means], std=[80.0, 70.0, 61.3][:means], to_rgb=True)
    if means is None:
        settings = dict(to_rgb=True)
    host, mine = (
        MODELS.build(dict(type=kind, **settings))(dict(inputs=form(images)))["inputs"]
        for kind in KINDS
    )
    assert mine.shape == (4, max(channels, means or 0), 6, 7)
    torch.testing.assert_close(mine, host, rtol=3e-7, atol=5e-6)


def test_labels_of_a_batch_leave_the_images_to_be_padded_and_refuse_to_be_one_hot():
    images = torch.randint(0, 256, (2, 6, 3, 7), dtype=torch.uint8).transpose(1, 2)
    batch = dict(inputs=images, data_samples=[BatchSample.of(torch.tensor([1, 2]))])
    settings = dict(type="BatchDataPreprocessor", **NORMALISATION)
    assert MODELS.build(settings)(batch)["inputs"].is_contiguous()  # which these are not
    padded = MODELS.build(dict(settings, pad_size_divisor=5))(batch)
    assert padded["inputs"].shape == (2, 3, 10, 10)
    with pytest.raises(SettingError, match="one-hot labels"):
        MODELS.build(dict(settings, num_classes=4, to_onehot=True))(batch)


def test_a_mean_without_a_deviation():
    with pytest.raises(SettingError, match="mean, std"):
        MODELS.build(dict(type="BatchDataPreprocessor", mean=[1.0, 2.0, 3.0]))


def test_a_word_in_the_place_of_a_flag():
    with pytest.raises(SettingError, match="`to_rgb` to be True or False, but got 'no'"):
        MODELS.build(dict(type="BatchDataPreprocessor", to_rgb="no"))
