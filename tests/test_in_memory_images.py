"""Images in memory: the same crops and flips as mmpretrain's image by image, equally likely, drawn
from seed, epoch and rank; the same losses and gradients; and what is refused."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import tool_runs
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, init_default_scope
from mmpretrain.datasets import BaseDataset, CustomDataset
from mmpretrain.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample

from mskd_plugin.connectors import SampleIndex
from mskd_plugin.datasets import BatchSample, Digits, InMemoryImages, collate_batch
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import epoch_seed
from mskd_plugin.hooks.preflight import check_data_roots
from mskd_plugin.launch import build_runner, load_config
from mskd_plugin.networks import classifier
from mskd_plugin.switches import use_in_memory

PACK = [dict(type="PackInputs")]
NORMALISATION = dict(mean=[80.0, 90.5, 100.0], std=[80.0, 70.0, 61.3])
KINDS = ("ClsDataPreprocessor", "BatchDataPreprocessor")
CIFAR = toy.ROOT / "configs" / "cifar100" / "mskd_resnet32x4_resnet8x4.py"


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
    unnumbered = [dict(type="PackInputs", meta_keys=())]
    held = InMemoryImages(Digits(pipeline=unnumbered, indices=2), device="cpu")
    with pytest.raises(SettingError, match="sample_idx"):
        SampleIndex()(held.__getitems__([0])["data_samples"])


def test_collating_items_of_other_data_sets():
    source = Digits(pipeline=PACK, indices=6)
    items = [source[i] for i in (5, 2)]
    batch = collate_batch(items)
    assert batch["inputs"].equal(torch.stack([item["inputs"] for item in items]))
    (sample,) = batch["data_samples"]
    assert sample.gt_label.tolist() == [source[i]["data_samples"].gt_label.item() for i in (5, 2)]
    assert SampleIndex()([sample]).tolist() == [5, 2]
    labels = sample.gt_label
    assert BatchSample.of(labels).gt_label is labels and "sample_idx" not in BatchSample.of(labels)
    with pytest.raises(SettingError, match=r"one class each.*\['gt_label', 'gt_score'\]"):
        collate_batch([dict(items[0], data_samples=items[0]["data_samples"].set_gt_score([0, 1]))])
    with pytest.raises(SettingError, match=r"one class each.*\[0, 1\]"):
        collate_batch([dict(inputs=labels, data_samples=DataSample().set_gt_label([0, 1]))])


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


# --- training ------------------------------------------------------------------------------------


def toy_config(folder, **settings):
    """Return two epochs of three steps of a toy distillation, crops and flips by the batch."""
    cfg = toy.runner_config(folder, **settings)
    flip = dict(type="RandomFlip", prob=0.5, direction="horizontal")
    cfg.train_dataloader.dataset.pipeline.insert(1, flip)
    return cfg


def test_training_resumes_exactly_and_evaluates_as_image_by_image(tmp_path):
    def config(name, **settings):
        cfg = toy_config(tmp_path / name, **settings)
        use_in_memory(cfg)
        return cfg

    class PowerCut(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 4:  # inside the second epoch
                raise KeyboardInterrupt

    crops = []
    windows = InMemoryImages.windows

    def noted(self, *args):
        result = windows(self, *args)
        if self.batch_labels and len(result) == 8:  # not the two images of the preflight
            crops.append(result.sum().item())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InMemoryImages, "windows", noted)
        whole = build_runner(config("whole"))
        whole.train()
        seen = crops.copy()
        crops.clear()
        interrupted = build_runner(config("parts"))
        interrupted.register_hook(PowerCut())
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
        del crops[3:]  # the second epoch begins anew
        resumed = build_runner(config("parts", resume=True))
        resumed.train()
    assert len(set(seen)) == 6 and crops == seen
    expected = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[key]), key

    stock = toy_config(tmp_path / "stock", load_from=str(tmp_path / "whole" / "epoch_2.pth"))
    metrics = build_runner(stock).val()
    file = torch.load(tmp_path / "whole" / "epoch_2.pth", weights_only=False)
    logged = file["message_hub"]["log_scalars"]["val/accuracy/top1"].current()
    assert metrics["accuracy/top1"] == logged and 0 < logged < 100


def test_the_memory_of_crd_gets_the_rows_of_the_images(tmp_path):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        teacher = MODELS.build(classifier("resnet20", 10))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    pair = toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py"
    work_dir, student = tmp_path / "run", tmp_path / "student.pth"
    tool_runs.call(
        *["train", pair, "--method", "crd", "--in-memory", "--work-dir", work_dir],
        *["--teacher", tmp_path / "teacher.pth"],
        options=[f"train_dataloader.dataset.indices={[*range(100, 132)]}".replace(" ", "")],
        epochs=1,
    )
    weights = torch.load(work_dir / "epoch_1.pth", weights_only=False)["state_dict"]
    (row_labels,) = (value for key, value in weights.items() if key.endswith("row_labels"))
    expected = torch.full((1198,), -1)
    for i in range(100, 132):
        expected[i - 100] = Digits()[i]["gt_label"]  # the data set numbers what it keeps
    assert row_labels.equal(expected)

    # The dumped config, with its wrappers, exports as mmpretrain's own.
    (dumped,) = work_dir.glob("*.py")
    toy.tool("export_student").main([str(dumped), str(work_dir / "epoch_1.pth"), str(student)])
    exported = Config.fromfile(student.with_suffix(".py"))
    assert exported.data_preprocessor.type == "ClsDataPreprocessor"
    assert exported.test_dataloader.dataset.type == "CustomDataset"
    kinds = [transform.type for transform in exported.test_dataloader.dataset.pipeline]
    assert kinds == ["LoadImageFromFile", "Resize", "PackInputs"]
    assert tuple(exported.test_dataloader.dataset.pipeline[1].scale) == (32, 32)
    assert "collate_fn" not in exported.test_dataloader


# --- the switch ----------------------------------------------------------------------------------


def read(config, **settings):
    given = dict(config=str(config), cfg_options={}, work_dir=None, launcher="none", **settings)
    return load_config(SimpleNamespace(**given))


def test_the_switch_moves_crop_and_flip(tmp_path):
    plain, cfg = read(CIFAR), read(CIFAR, in_memory=True)
    assert cfg.train_dataloader.dataset == dict(
        type="InMemoryImages",
        dataset=dict(plain.train_dataloader.dataset, pipeline=PACK),
        crop_size=32,
        padding=4,
        flip_prob=0.5,
    )
    for stage in ("val", "test"):
        dataset = plain[f"{stage}_dataloader"].dataset
        expected = dict(type="InMemoryImages", dataset=dataset, batch_labels=False)
        assert cfg[f"{stage}_dataloader"].dataset == expected
        assert cfg[f"{stage}_dataloader"].num_workers == 0
    assert cfg.train_dataloader.sampler == plain.train_dataloader.sampler
    assert cfg.train_dataloader.batch_size == 64
    assert cfg.data_preprocessor == dict(plain.data_preprocessor, type="BatchDataPreprocessor")
    assert cfg.model.data_preprocessor.type == "mmpretrain.BatchDataPreprocessor"
    same = {key for key in cfg if not key.endswith("dataloader")} - {"data_preprocessor", "model"}
    assert all(cfg[key] == plain[key] for key in same)

    base = tmp_path / "leaf.py"
    base.write_text(f'_base_ = ["{CIFAR}", "{toy.ROOT}/configs/_base_/in_memory.py"]\n')
    leaf = read(base)
    assert leaf.train_dataloader == cfg.train_dataloader and "in_memory" not in leaf
    again = copy.deepcopy(cfg)
    use_in_memory(again)
    assert again.to_dict() == cfg.to_dict()
    again.pop("custom_hooks")  # of another project, whose processes would draw the same crops
    use_in_memory(again)
    assert again.custom_hooks == [dict(type="EpochSeedHook")]
    cfg.train_dataloader.dataset.dataset.update(data_root="no/such", download=False)
    with pytest.raises(SettingError, match=r"train_dataloader\.dataset\.data_root.*no/such"):
        check_data_roots(cfg)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pipeline, expected",
    [
        ([dict(type="RandomFlip", prob=0.5, direction="vertical")], "no direction but horizontal"),
        ([dict(type="RandomFlip", direction="horizontal")], "a prob"),
        ([dict(type="RandomCrop", crop_size=32, padding=4, pad_val=9)], "padding alone"),
        ([dict(type="RandomCrop", crop_size=32, padding_mode="reflect")], "padding alone"),
    ],
)
def test_the_switch_refuses_other_crops_and_flips(pipeline, expected):
    cfg = read(CIFAR)
    cfg.train_dataloader.dataset.pipeline = [*pipeline, *PACK]
    with pytest.raises(SettingError, match=expected):
        use_in_memory(cfg)


@pytest.mark.parametrize(
    "setting",
    [dict(batch_augments=dict(augments=[dict(type="Mixup", alpha=1.0)])), dict(to_onehot=True)],
)
def test_scores_need_a_sample_an_image(setting, tmp_path):
    cfg = read(CIFAR)
    cfg.model.data_preprocessor.update(setting)
    with pytest.raises(SettingError, match="off with images in memory"):
        use_in_memory(cfg)
    # And where a config brings them together by itself.
    cfg = toy.runner_config(tmp_path)
    cfg.train_dataloader.collate_fn = dict(type="collate_batch")
    cfg.model.data_preprocessor = dict(cfg.model.data_preprocessor, num_classes=10, **setting)
    with pytest.raises(SettingError, match="keeps a data sample for each image"):
        build_runner(cfg).train()


def test_a_loader_that_cannot_join_a_batch(tmp_path):
    cfg = toy.runner_config(tmp_path)
    use_in_memory(cfg)
    cfg.train_dataloader.collate_fn = dict(type="default_collate")
    with pytest.raises(SettingError, match=r"train_dataloader\.collate_fn.*'collate_batch'"):
        build_runner(cfg).train()


class Flicker:
    """A transform that is random without saying so."""

    def __call__(self, results):
        return dict(results, img=results["img"] + np.random.randint(2, dtype=np.uint8))


@pytest.mark.parametrize(
    "pipeline, found",
    [
        ([dict(type="RandomCrop", crop_size=32, padding=4), *PACK], "RandomCrop"),
        ([dict(type="ColorJitter", brightness=0.4), *PACK], "ColorJitter"),
        ([Flicker(), *PACK], "two readings of image"),
        ([], "end with PackInputs"),
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
    with pytest.raises(SettingError, match="got RandomCrop"):
        InMemoryImages(dict(type="RepeatDataset", dataset=inner, times=2), device="cpu")


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
        ("flip_prob", 1.1),
        ("crop_size", 33),
        ("crop_size", 0),
        ("crop_size", (8, 8, 8)),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(SettingError, match=setting):
        InMemoryImages(Held(coordinates()), device="cpu", **{setting: value})


def test_a_mean_without_a_deviation():
    with pytest.raises(SettingError, match="mean, std"):
        MODELS.build(dict(type="BatchDataPreprocessor", mean=[1.0, 2.0, 3.0]))
