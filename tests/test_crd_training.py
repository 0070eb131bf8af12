"""CRD's memories in a run."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from mmengine.hooks import Hook
from mmengine.runner import Runner

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
