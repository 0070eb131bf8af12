"""The digits data set: counts, values against torch's interpolation, and its way through
mmpretrain's pipeline."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS
from sklearn.datasets import load_digits
from torch.nn import functional

import mskd_plugin  # noqa: F401  (registers the data set)
from mskd_plugin.datasets import Digits
from mskd_plugin.datasets.digits import resize_bilinear
from mskd_plugin.errors import SettingError


def images_of(dataset: Digits) -> np.ndarray:
    return np.stack([dataset[i]["img"] for i in range(len(dataset))])


def test_the_splits_are_the_file_in_its_order() -> None:
    original = load_digits()
    train, test = Digits(split="train"), Digits(split="test")
    assert (len(train), len(test)) == (1198, 599)
    labels = np.concatenate([train.get_gt_labels(), test.get_gt_labels()])
    np.testing.assert_array_equal(labels, original.target)

    # Bilinear interpolation by torch, in float64.
    grey = torch.from_numpy(original.images)[:, None]
    expected = (
        functional.interpolate(grey, size=32, mode="bilinear", align_corners=False)[:, 0] * 255 / 16
    )
    images = np.concatenate([images_of(train), images_of(test)])
    assert images.shape == (1797, 32, 32, 3)
    assert images.dtype == np.uint8
    assert abs(images - expected.numpy()[..., None]).max() <= 0.5 + 1e-9
    assert (images.min(), images.max()) == (0, 255)


def test_no_image_is_in_both_splits() -> None:
    train = {image.tobytes() for image in images_of(Digits(split="train"))}
    test = {image.tobytes() for image in images_of(Digits(split="test"))}
    assert not train & test


def test_classes() -> None:
    train, test = Digits(split="train"), Digits(split="test")
    assert train.metainfo["classes"] == tuple("0123456789") == test.metainfo["classes"]
    assert train.class_to_idx == {str(i): i for i in range(10)}
    for dataset in (train, test):
        counts = np.bincount(dataset.get_gt_labels(), minlength=10)
        assert counts.sum() == len(dataset)
        assert counts.min() > 0.09 * len(dataset)
        assert counts.max() < 0.11 * len(dataset)
    named = Digits(split="test", metainfo={"classes": tuple("abcdefghij")})
    assert named.class_to_idx["c"] == 2
    assert dict(train[0], img=None) == {
        "img": None,
        "gt_label": 0,
        "img_shape": (32, 32),
        "ori_shape": (32, 32),
        "sample_idx": 0,
    }


def test_two_readings_are_equal() -> None:
    np.testing.assert_array_equal(images_of(Digits(split="test")), images_of(Digits(split="test")))


def test_resize_keeps_constants_and_small_cases() -> None:
    np.testing.assert_allclose(resize_bilinear(np.full((2, 3, 3), 7.0), 8), 7.0, rtol=1e-15)
    # Two pixels 0 and 4 in a row: centres of the new four lie at -0.25 (clipped), 0.25, 0.75, 1.25
    # (clipped).
    image = np.array([[[0.0, 4.0], [0.0, 4.0]]])
    np.testing.assert_allclose(resize_bilinear(image, 4)[0], [[0, 1, 3, 4]] * 4, rtol=1e-15)


def test_the_pipeline_of_mmpretrain() -> None:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        dataset = DATASETS.build(
            {
                "type": "Digits",
                "split": "train",
                "indices": 4,
                "pipeline": [
                    {"type": "RandomCrop", "crop_size": 32, "padding": 4},
                    {"type": "PackInputs"},
                ],
            }
        )
    assert len(dataset) == 4
    batch = default_collate([dataset[i] for i in range(4)])
    assert batch["inputs"].shape == (4, 3, 32, 32)
    assert batch["inputs"].dtype == torch.uint8
    assert [int(s.gt_label) for s in batch["data_samples"]] == [0, 1, 2, 3]
    assert batch["data_samples"][0].ori_shape == (32, 32)
    assert batch["data_samples"][3].sample_idx == 3


def test_random_crops_are_windows_of_the_padded_image() -> None:
    transforms = [{"type": "mmpretrain.RandomCrop", "crop_size": 32, "padding": 4}]
    cropped, plain = Digits(pipeline=transforms, indices=1), Digits(indices=1)
    padded = np.pad(plain[0]["img"], ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    crops = {cropped[0]["img"].tobytes() for _ in range(20)}
    assert crops <= windows
    assert len(crops) > 1


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingError, match="Expected `split` to be 'train' or 'test', but got 'val'"
    ):
        Digits(split="val")

    real_import = builtins.__import__

    def without_sklearn(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(SettingError, match="pip install scikit-learn"):
        Digits(split="train")
