"""Images in memory: the same crops and flips as mmpretrain's image by image, equally likely, drawn
from seed, epoch and rank; what a batch holds; and what is refused."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmpretrain.datasets import BaseDataset, CustomDataset
from mmpretrain.registry import TRANSFORMS
from mmpretrain.structures import DataSample

from mskd_plugin.connectors import SampleIndex
from mskd_plugin.datasets import Digits, InMemoryImages, collate_batch
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import epoch_seed

PACK = [dict(type="PackInputs")]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


class Held(BaseDataset):
    """Given images as CIFAR's data set holds its own."""

    METAINFO = dict(classes=("even", "odd"))

    def __init__(self, images, pipeline=PACK, **kwargs):
        self.given = images
        super().__init__(ann_file="", pipeline=pipeline, **kwargs)

    def load_data_list(self):
        return [dict(img=image, gt_label=i % 2) for i, image in enumerate(self.given)]


def coordinates(count=1):
    """Return images (H, W, C) whose pixels tell row, column and image."""
    row, column = np.mgrid[1:33, 1:33]
    images = [np.stack([row, column, np.full((32, 32), i + 1)], -1) for i in range(count)]
    return [image.astype(np.uint8) for image in images]


def draws(crops):
    """Read top, left and flip of each crop of :func:`coordinates` off two of its pixels."""
    here, right = crops[:, :, 16, 16].int(), crops[:, :, 16, 17].int()
    flip = (right[:, 1] < here[:, 1]).int()
    # The pixel (16, 16) of a window shows (top + 12, left + 12) of the image, mirrored or not.
    column = here[:, 1] - 1
    return here[:, 0] - 13, torch.where(flip == 1, 31 - column, column) - 12, flip


def chi_square(counts, expected):
    """Return Pearson's statistic in deviations from its mean, by its normal approximation."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


# --- crops and flips -----------------------------------------------------------------------------


def outcomes_of_the_host(image, monkeypatch):
    """Return all 9 x 9 x 2 images that mmpretrain's transforms can make of one, by their draws."""
    crop = TRANSFORMS.build(dict(type="RandomCrop", crop_size=32, padding=4))
    found = {}
    for prob in (0.0, 1.0):
        flip = TRANSFORMS.build(dict(type="RandomFlip", prob=prob, direction="horizontal"))
        for top in range(9):
            for left in range(9):
                offsets = iter((top, left))
                with monkeypatch.context() as patch:
                    patch.setattr(np.random, "randint", lambda low, high: next(offsets))  # noqa: B023
                    cropped = crop(dict(img=image))
                result = flip(cropped)["img"]
                found[top, left, int(prob)] = result.transpose(2, 0, 1).tobytes()
    return found


def test_the_outcomes_are_those_of_the_host(monkeypatch):
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)
    expected = outcomes_of_the_host(image, monkeypatch)
    assert len(set(expected.values())) == 162
    held = InMemoryImages(Held([image]), crop_size=32, padding=4, flip_prob=0.5, device="cpu")
    for (top, left, flip), outcome in expected.items():
        # The host mirrors its window; here a window of the mirrored image is taken.
        left = 8 - left if flip else left
        one = [torch.tensor([value]) for value in (0, top, left, flip)]
        window = held.windows(*one[:3], one[3].bool())
        assert window[0].numpy().tobytes() == outcome
    drawn = held.__getitems__([0] * 5000)["inputs"]
    assert {crop.numpy().tobytes() for crop in drawn} == set(expected.values())


def test_windows_of_other_sizes_by_loops():
    images = torch.randint(0, 256, (3, 2, 5, 7), dtype=torch.uint8)
    source = Held([image.permute(1, 2, 0).numpy() for image in images])
    held = InMemoryImages(source, crop_size=(4, 6), padding=1, flip_prob=0.5, device="cpu")
    rows = torch.tensor([2, 0, 1, 2])
    top, left = torch.tensor([0, 3, 1, 2]), torch.tensor([3, 0, 2, 1])
    flip = torch.tensor([True, False, True, False])
    result = held.windows(rows, top, left, flip)
    assert result.shape == (4, 2, 4, 6)
    for n in range(4):
        for c in range(2):
            for y in range(4):
                for x in range(6):
                    row, column = top[n] + y - 1, left[n] + x - 1
                    column = 6 - column if flip[n] else column
                    inside = 0 <= row < 5 and 0 <= column < 7
                    expected = images[rows[n], c, row, column] if inside else 0
                    assert result[n, c, y, x] == expected


def test_every_outcome_is_as_likely_as_with_the_host():
    torch.manual_seed(0)
    held = InMemoryImages(Held(coordinates()), crop_size=32, padding=4, flip_prob=0.5, device="cpu")
    number = 162 * 200
    counts = Counter(zip(*(d.tolist() for d in draws(held.__getitems__([0] * number)["inputs"]))))
    assert len(counts) == 162
    assert abs(chi_square(list(counts.values()), [200] * 162)) < 3

    np.random.seed(0)
    pipeline = [dict(type="RandomCrop", crop_size=32, padding=4)]
    pipeline += [dict(type="RandomFlip", prob=0.5, direction="horizontal"), *PACK]
    host = Held(coordinates(), pipeline)
    crops = torch.stack([host[0]["inputs"] for _ in range(162 * 20)])
    of_host = Counter(zip(*(d.tolist() for d in draws(crops))))
    assert of_host.keys() == counts.keys()
    assert abs(chi_square(list(of_host.values()), [20] * 162)) < 3


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_the_share_of_flips(prob):
    torch.manual_seed(1)
    held = InMemoryImages(Held(coordinates()), flip_prob=prob, device="cpu")
    top, left, flip = draws(held.__getitems__([0] * 10_000)["inputs"])
    assert not (top - 4).any() and not (left - 4).any()  # no padding, no crop
    deviation = (prob * (1 - prob) / 10_000) ** 0.5
    assert abs(flip.float().mean().item() - prob) <= 3 * deviation


def test_images_of_a_batch_are_independent():
    torch.manual_seed(0)
    held = InMemoryImages(
        Held(coordinates(2)), crop_size=32, padding=4, flip_prob=0.5, device="cpu"
    )
    crops = held.__getitems__([0, 1] * 8100)["inputs"]
    assert crops[:, 2, 16, 16].tolist() == [1, 2] * 8100
    for draw, number in zip(draws(crops), (9, 9, 2)):
        first, second = draw[::2], draw[1::2]
        table = torch.bincount(first * number + second, minlength=number**2)
        assert abs(chi_square(table, [8100 / number**2] * number**2)) < 3


def test_draws_depend_on_seed_epoch_and_rank_alone(monkeypatch):
    held = InMemoryImages(Digits(pipeline=PACK, indices=8), padding=4, flip_prob=0.5, device="cpu")
    hook = epoch_seed.EpochSeedHook()

    def batch(seed, epoch, rank):
        monkeypatch.setattr(epoch_seed, "get_rank", lambda: rank)
        hook.before_train_epoch(SimpleNamespace(seed=seed, epoch=epoch))
        return held.__getitems__(list(range(8)))["inputs"]

    first = batch(3, 5, 0)
    torch.rand(7)
    assert batch(3, 5, 0).equal(first)
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert not batch(*other).equal(first)
    assert not held.__getitems__(list(range(8)))["inputs"].equal(batch(3, 5, 1))  # nor a step


# --- what a batch holds --------------------------------------------------------------------------


def test_without_crops_items_are_those_of_the_data_set():
    source = Digits(split="test", pipeline=PACK, indices=range(5, 25))
    held = InMemoryImages(source, batch_labels=False, device="cpu")
    assert len(held) == 20 and held.metainfo == source.metainfo
    rows = [3, 19, 3]
    expected = default_collate([source[i] for i in rows])
    for _ in range(2):  # a second reading sees nothing of what was done to the first
        batch = collate_batch(held.__getitems__(rows))
        assert batch["inputs"].equal(expected["inputs"])
        for mine, its in zip(batch["data_samples"], expected["data_samples"], strict=True):
            assert type(mine) is DataSample
            assert dict(mine.metainfo_items()) == dict(its.metainfo_items())
            assert mine.keys() == its.keys() == ["gt_label"]
            assert mine.gt_label.equal(its.gt_label)
            mine.set_pred_label(1)
    assert held[7]["inputs"].equal(source[7]["inputs"])


def test_image_files_are_read_once(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat/1", "cat/2", "dog/1"):
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        mmcv.imwrite(image, str(tmp_path / f"{name}.png"))
    pipeline = [dict(type="LoadImageFromFile"), *PACK]
    source = CustomDataset(data_root=str(tmp_path), pipeline=pipeline)
    items = [source[i] for i in range(3)]
    held = InMemoryImages(source, device="cpu")
    for file in tmp_path.glob("*/*.png"):
        file.unlink()
    batch = held.__getitems__([2, 0, 1])
    assert batch["inputs"].equal(torch.stack([items[i]["inputs"] for i in (2, 0, 1)]))
    assert batch["data_samples"][0].gt_label.tolist() == [1, 0, 0]
    assert held.metainfo["classes"] == ("cat", "dog")


def test_labels_and_numbers_of_a_batch():
    source = Digits(pipeline=PACK, indices=range(40, 60))
    held = InMemoryImages(source, padding=4, device="cpu")
    rows = [4, 0, 17]
    (sample,) = held.__getitems__(rows)["data_samples"]
    assert sample.gt_label.tolist() == [source[i]["data_samples"].gt_label.item() for i in rows]
    numbers = [source[i]["data_samples"].sample_idx for i in rows]
    assert SampleIndex()([sample]).tolist() == numbers
    # What a wrapper repeats keeps its number.
    twice = dict(
        type="RepeatDataset", times=2, dataset=dict(type="Digits", pipeline=PACK, indices=20)
    )
    (sample,) = InMemoryImages(twice, device="cpu").__getitems__([4, 21, 39])["data_samples"]
    assert sample.sample_idx.tolist() == [4, 1, 19]
    unnumbered = [dict(type="PackInputs", meta_keys=())]
    held = InMemoryImages(Digits(pipeline=unnumbered, indices=2), device="cpu")
    with pytest.raises(SettingError, match="sample_idx"):
        SampleIndex()(held.__getitems__([0])["data_samples"])


# --- what is refused -----------------------------------------------------------------------------


class Flicker:
    """A transform that is random without saying so."""

    def __call__(self, results):
        return dict(results, img=results["img"] + np.random.randint(2, dtype=np.uint8))


def last_flickers(results):
    return Flicker()(results) if results["img"][0, 0, 2] == 20 else results


@pytest.mark.parametrize(
    "pipeline, found",
    [
        ([last_flickers, *PACK], "two readings of image 19"),
        ([lambda results: dict(results, gt_score=np.array([0.5, 0.5])), *PACK], "one class each"),
        ([dict(type="RandomCrop", crop_size=32, padding=4), *PACK], "RandomCrop"),
        ([dict(type="ColorJitter", brightness=0.4), *PACK], "ColorJitter"),
        ([Flicker(), *PACK], "two readings of image"),
        ([], "end with PackInputs"),
        ([lambda results: (results["img"],)], "end with PackInputs.*got tuple"),
        ([lambda results: dict(results, img=results["img"] / 255), *PACK], "uint8 images"),
    ],
)
def test_pipelines_that_cannot_run_once(pipeline, found):
    torch.manual_seed(0)
    np.random.seed(0)
    with pytest.raises(SettingError, match=found):
        InMemoryImages(Held(coordinates(20), pipeline), device="cpu")


def test_a_random_part_inside_a_wrapper_is_found():
    inner = dict(type="Digits", pipeline=[dict(type="RandomCrop", crop_size=32), *PACK])
    plain = dict(type="Digits", pipeline=PACK)
    for wrapped in (
        dict(type="RepeatDataset", dataset=inner, times=2),
        dict(type="ConcatDataset", datasets=[plain, inner]),
    ):
        with pytest.raises(SettingError, match="got RandomCrop"):
            InMemoryImages(wrapped, device="cpu")


def test_images_of_two_sizes():
    images = [*coordinates(2), np.zeros((32, 31, 3), np.uint8)]
    with pytest.raises(
        SettingError, match=r"of one size, \(3, 32, 32\).*\(3, 32, 31\) at 2.*Resize"
    ):
        InMemoryImages(Held(images), device="cpu")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("padding", -1),
        ("padding", 1.5),
        ("padding", True),
        ("flip_prob", 1.1),
        ("flip_prob", -0.1),
        ("crop_size", 33),
        ("crop_size", 0),
        ("crop_size", (8, 8, 8)),
        ("batch_labels", "no"),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(SettingError, match=setting):
        InMemoryImages(Held(coordinates()), device="cpu", **{setting: value})
