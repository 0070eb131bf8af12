"""CRD's memories in a run."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.datasets import KFoldDataset
from torch.utils.data import Dataset, IterableDataset, Subset

from mskd_plugin.datasets import Digits, InMemoryImages
from mskd_plugin.datasets.in_memory import numbered
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks import PreflightHook
from mskd_plugin.launch import build_runner
from mskd_plugin.recipes import crd


def model(folder, images=24):
    pair = dict(student="resnet8", teacher="resnet8", num_classes=toy.CLASSES)
    parts = crd(dict(pair=pair, num_train_images=images), embedding_channels=6, num_negatives=10)
    for role in ("student", "teacher"):
        parts["connectors"][f"crd_{role}"]["module_args"]["in_features"] = toy.WIDTHS[role][-1]
    return toy.algorithm(
        teacher_ckpt=str(toy.teacher_file(folder)),
        distiller=dict(type="ConfigurableDistiller", **parts),
    )


class PowerCut(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4:  # inside the second epoch
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_the_memories(tmp_path):
    def runner(name, **settings):
        cfg = toy.runner_config(tmp_path / name, model(tmp_path), **settings)
        cfg.default_hooks.checkpoint.interval = 1
        return Runner.from_cfg(cfg)

    def memories(runner):
        runner.train()
        return runner.model.distiller.distill_losses.loss_crd.state_dict()

    whole = memories(runner("whole"))
    interrupted = runner("parts")
    interrupted.register_hook(PowerCut())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = memories(runner("parts", resume=True))
    assert (whole["row_labels"] >= 0).all()  # every image was seen under its own index
    assert math.isfinite(whole["log_normalizers"].sum())
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_batches_of_different_sizes_in_the_processes_are_refused(tmp_path):
    settings = {"train_dataloader.dataset.indices": 23, "train_dataloader.sampler.round_up": False}
    runner = build_runner(toy.runner_config(tmp_path, model(tmp_path, 23), **settings))
    PreflightHook().before_train(runner)
    runner._world_size = 2
    with pytest.raises(SettingError, match="round_up` to be True for losses that join .*loss_crd"):
        PreflightHook().before_train(runner)


@pytest.mark.parametrize("images", [23, 25])
def test_memories_of_another_number_of_images_are_refused(tmp_path, images):
    cfg = toy.runner_config(
        tmp_path, model(tmp_path), **{"train_dataloader.dataset.indices": images}
    )
    told = rf"loss_crd\.num_images` to be {images}, .* but got 24\. .*num_train_images"
    toy.fails(cfg, told)


def test_memories_of_data_sets_that_are_wrapped(tmp_path):
    def config(kind, **settings):
        cfg = toy.runner_config(tmp_path / kind, model(tmp_path))
        cfg.train_dataloader.dataset = dict(type=kind, **settings)
        return cfg

    single = toy.runner_config(tmp_path).train_dataloader.dataset
    assert toy.train(config("RepeatDataset", dataset=single, times=2))[1].count > 0
    told = "`train_dataloader.dataset` to be one data set, .*loss_crd.* a ConcatDataset of 2, each"
    toy.fails(config("ConcatDataset", datasets=[single, single]), told)


def test_memories_of_data_sets_that_are_wrapped_in_memory(tmp_path):
    """Images in memory have the numbers of the data set that they are read from."""

    def config(name, dataset):
        cfg = toy.runner_config(tmp_path / name, model(tmp_path))
        cfg.train_dataloader.dataset = dict(type="InMemoryImages", dataset=dataset)
        cfg.train_dataloader.collate_fn = dict(type="collate_batch")
        cfg.model.data_preprocessor.type = "mmpretrain.BatchDataPreprocessor"
        return cfg

    single = toy.runner_config(tmp_path).train_dataloader.dataset
    single.pipeline = [dict(type="PackInputs")]
    repeated = dict(type="RepeatDataset", dataset=single, times=2)
    build_runner(config("repeated", repeated)).train()
    joined = dict(type="ConcatDataset", datasets=[single, single])
    toy.fails(config("joined", joined), "to be one data set, .*a ConcatDataset of 2, each")


class OfAName(Dataset):
    """A data set of one's own, whose attribute is no data set."""

    dataset = "flowers"

    def __len__(self):
        return 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_the_images_that_data_sets_number():
    digits = Digits(indices=5)
    assert numbered(digits) == numbered(RepeatDataset(digits, 3)) == [5]
    assert numbered(Subset(digits, [4, 1])) == [5]  # which keep their numbers
    packed = [dict(type="mmpretrain.PackInputs")]
    folds = KFoldDataset(dict(type=Digits, indices=10, pipeline=packed), num_splits=5)
    assert numbered(folds) == numbered(InMemoryImages(folds, device="cpu")) == [8]  # numbered anew
    assert numbered(torch.utils.data.ConcatDataset([RepeatDataset(digits, 2)])) == [5]
    assert numbered(Subset(ConcatDataset([digits, Digits(indices=7)]), [3])) == [5, 7]
    assert numbered(OfAName()) == [3]
    assert numbered(Stream()) == []
