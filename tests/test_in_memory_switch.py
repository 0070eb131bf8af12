"""``--in-memory``: what it changes in a config, what it refuses, and trainings with it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tool_runs
import torch
import toy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, init_default_scope
from mmpretrain.datasets import RandomCrop, RandomFlip
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import DATASETS, MODELS

from mskd_plugin.checks.data import check_data_roots
from mskd_plugin.datasets import Digits, InMemoryImages
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import EpochSeedHook
from mskd_plugin.launch import build_runner, load_config
from mskd_plugin.networks import classifier
from mskd_plugin.switches import use_in_memory

PACK = [dict(type="PackInputs")]
CIFAR = toy.ROOT / "configs" / "cifar100" / "mskd_resnet32x4_resnet8x4.py"


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


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
        options=[
            f"train_dataloader.dataset.indices={[*range(100, 132)]}".replace(" ", ""),
            "num_train_images=32",
        ],
        epochs=1,
    )
    weights = torch.load(work_dir / "epoch_1.pth", weights_only=False)["state_dict"]
    (row_labels,) = (value for key, value in weights.items() if key.endswith("row_labels"))
    expected = torch.full((32,), -1)
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
    kind = "mmpretrain.BatchDataPreprocessor"
    assert cfg.model == dict(
        plain.model, data_preprocessor=dict(plain.model.data_preprocessor, type=kind)
    )
    same = {key for key in cfg if not key.endswith("dataloader")} - {"model"}
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


@pytest.mark.parametrize(
    "pipeline, expected",
    [
        ([dict(type="RandomFlip", prob=0.5, direction="vertical")], "no direction but horizontal"),
        ([dict(type="RandomFlip", direction="horizontal")], "a prob"),
        ([dict(type="RandomCrop", crop_size=32, padding=4, pad_val=9)], "padding alone"),
        ([dict(type="RandomCrop", crop_size=32, padding_mode="reflect")], "padding alone"),
        ([dict(type="RandomCrop", padding=4)], "has crop_size and padding"),
    ],
)
def test_the_switch_refuses_other_crops_and_flips(pipeline, expected):
    cfg = read(CIFAR)
    cfg.train_dataloader.dataset.pipeline = [*pipeline, *PACK]
    with pytest.raises(SettingError, match=expected):
        use_in_memory(cfg)


def test_several_data_sets_are_held_as_they_are():
    digits = dict(type="Digits", indices=4, pipeline=PACK)
    flipping = dict(digits, pipeline=[dict(type="RandomFlip", prob=0.5), *PACK])
    for datasets, count in (([digits, digits], 8), ([digits, flipping], None)):
        cfg = read(CIFAR)
        cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=datasets)
        use_in_memory(cfg)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            if count:
                assert len(DATASETS.build(cfg.train_dataloader.dataset)) == count
                continue
            with pytest.raises(SettingError, match="not random.*RandomFlip"):
                DATASETS.build(cfg.train_dataloader.dataset)


def test_loaders_of_images_in_memory_have_no_workers():
    cfg = read(CIFAR)
    for stage in ("train", "val", "test"):
        cfg[f"{stage}_dataloader"].update(
            num_workers=4, prefetch_factor=2, persistent_workers=True, pin_memory=True
        )
    use_in_memory(cfg)
    for stage in ("train", "val", "test"):
        loader = cfg[f"{stage}_dataloader"]
        assert loader.num_workers == 0 and not loader.persistent_workers and not loader.pin_memory
        assert "prefetch_factor" not in loader and loader.collate_fn == dict(type="collate_batch")


def test_what_the_switch_takes_out_of_a_pipeline():
    flip, crop = dict(type="RandomFlip", prob=0.3), dict(type="mmcls.RandomCrop", crop_size=32)
    for pipeline, left, settings in (
        ([flip], [], dict(flip_prob=0.3)),  # horizontal is mmpretrain's default, too
        ([crop, flip], [], dict(crop_size=32, padding=0, flip_prob=0.3)),
        ([dict(crop, padding=None)], [], dict(crop_size=32, padding=0)),  # mmpretrain's default
        ([crop, crop], [crop], dict(crop_size=32, padding=0)),  # which the data set refuses
        ([flip, dict(type="Resize", scale=32)], [flip, dict(type="Resize", scale=32)], {}),
    ):
        cfg = read(CIFAR)
        wrapped = dict(cfg.train_dataloader.dataset, pipeline=[*pipeline, *PACK])
        cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=wrapped)
        cfg.custom_hooks = [dict(type="EMAHook")]
        use_in_memory(cfg)
        assert cfg.train_dataloader.dataset.dataset.dataset.pipeline == [*left, *PACK]
        found = cfg.train_dataloader.dataset.to_dict()
        assert found.pop("dataset")["times"] == 2
        assert found == dict(type="InMemoryImages", **settings)
        assert cfg.custom_hooks == [dict(type="EMAHook"), dict(type="EpochSeedHook")]


def test_a_pipeline_without_transforms_stays_as_it_is():
    cfg = read(CIFAR)
    cfg.train_dataloader.dataset.pipeline = []
    use_in_memory(cfg)
    dataset = cfg.train_dataloader.dataset
    assert dataset.keys() == {"type", "dataset"} and dataset.dataset.pipeline == []


def test_a_hook_that_is_none_is_told_by_the_runner(tmp_path):
    cfg = toy.runner_config(tmp_path, custom_hooks=["EMAHook"])
    use_in_memory(cfg)
    with pytest.raises(SettingError, match="`the config` .* but got TypeError: .*EMAHook"):
        build_runner(cfg)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_config_without_a_stage_has_none_in_memory(stage):
    cfg = read(CIFAR)
    cfg[f"{stage}_dataloader"] = None
    use_in_memory(cfg)
    assert cfg[f"{stage}_dataloader"] is None
    assert cfg.train_dataloader.dataset.type == "InMemoryImages"


def test_types_may_be_classes():
    named, cfg = read(CIFAR), read(CIFAR)
    pipeline = cfg.train_dataloader.dataset.pipeline
    for transform, kind in zip(pipeline, (RandomCrop, RandomFlip)):
        assert transform.type == kind.__name__
        transform.type = kind
    cfg.model.data_preprocessor.type = ClsDataPreprocessor
    cfg.custom_hooks = [dict(type=EpochSeedHook)]
    for one in (named, cfg):
        use_in_memory(one)
    assert cfg.train_dataloader == named.train_dataloader
    assert cfg.model == named.model
    assert cfg.model.data_preprocessor.type == "mmpretrain.BatchDataPreprocessor"
    assert cfg.custom_hooks == [dict(type=EpochSeedHook)]


@pytest.mark.parametrize(
    "setting",
    [dict(batch_augments=dict(augments=[dict(type="Mixup", alpha=1.0)])), dict(to_onehot=True)],
)
def test_scores_need_a_sample_an_image(setting, tmp_path):
    cfg = read(CIFAR)
    cfg.model.data_preprocessor.update(setting)
    with pytest.raises(SettingError, match="off with images in memory"):
        use_in_memory(cfg)
    cfg = Config.fromfile(CIFAR)
    cfg.data_preprocessor.update(setting)  # of a model without one of its own
    del cfg.model.data_preprocessor
    cfg.dump(tmp_path / "own.py")
    with pytest.raises(SettingError, match="off with images in memory"):
        read(tmp_path / "own.py", in_memory=True)
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
