"""The number of images in a batch and in a step."""

from __future__ import annotations

from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.checks.data import read_items
from mskd_plugin.checks.processes import images_per_process
from mskd_plugin.errors import SettingError
from mskd_plugin.schedule import schedule_with_own_rate


def check_batches(loader: DataLoader) -> None:
    """Check that a training's data loader has a batch to give, before schedules count them.

    Raises:
        SettingError: If it has none: without images, or with fewer than those of a batch and
            ``drop_last``.
    """
    if not isinstance(loader.dataset, IterableDataset) and not len(loader):
        size = loader.batch_size
        raise SettingError(
            "train_dataloader",
            f"a loader of at least one batch, here of {size}",
            f"{len(loader.dataset)} images, and drop_last={loader.drop_last}",  # type: ignore[arg-type]
        )


def check_batch_size(runner: Runner, model: BaseModel) -> None:
    """Warn where the config's learning rate is meant for another batch size."""
    auto_scale_lr = runner.cfg.get("auto_scale_lr") or {}
    base = auto_scale_lr.get("base_batch_size")
    size = runner.train_dataloader.batch_size  # None with a batch sampler
    if base is None or size is None or auto_scale_lr.get("enable", False):
        return
    accumulated = (runner.cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    total = runner.world_size * size * accumulated
    if total != base:
        scales = "" if schedule_with_own_rate(runner.cfg) else ": --auto-scale-lr scales it"
        runner.logger.warning(
            f"A step takes {total} images ({size} x {runner.world_size} processes x {accumulated} "
            f"accumulated), but the learning rate is meant for auto_scale_lr.base_batch_size="
            f"{base}{scales}."
        )


def tell_accumulation(runner: Runner, model: BaseModel) -> None:
    """Warn that losses between images do not reach over the batches of an accumulated step."""
    size = runner.train_dataloader.batch_size
    accumulated = (runner.cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if accumulated > 1:
        runner.logger.warning(
            f"optim_wrapper.accumulative_counts={accumulated}: losses between the images of a "
            f"batch, contrastive ones among them, see {size} images at a time, not {accumulated} x "
            f"{size}."
        )


def check_single_images(runner: Runner, model: BaseModel) -> None:
    """Warn of batches of one image, which leave losses between images nothing to compare.

    They are met after a whole epoch where it is the last batch. The student is tried on one image
    in training mode; its statistics are put back, its mode and random states are the caller's.

    Raises:
        SettingError: If the student's BatchNorm has one value a channel of such a batch.
    """
    loader = runner.train_dataloader
    size = loader.batch_size  # None with a batch sampler
    if size is None or isinstance(loader.dataset, IterableDataset):
        return
    ends = not loader.drop_last and not isinstance(loader.sampler, InfiniteSampler)
    counts = images_per_process(loader, runner.world_size) if ends else set()
    ending_so = [count for count in counts if count % size == 1]
    if size > 1 and not ending_so:
        return
    setting, needed = "train_dataloader.drop_last", "True"
    told = f"The last of an epoch's batches of {size} has one image"
    if size == 1:
        setting, needed, told = "train_dataloader.batch_size", "at least 2", "A batch has one image"
    student = getattr(model, "student", model)
    try:
        _train_on_one_image(student, model, loader)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SettingError(
            setting,
            f"{needed}, since the student's BatchNorm cannot train on one image",
            1 if size == 1 else f"False with {ending_so[0]} images in batches of {size}",
        ) from error
    runner.logger.warning(
        f"{told}, from which BatchNorm takes its statistics, and which leaves losses between "
        f"images, contrastive ones among them, nothing to compare; {setting} "
        f"{'of at least 2' if size == 1 else '= True'} avoids that."
    )


def _train_on_one_image(student: nn.Module, model: BaseModel, loader: DataLoader) -> None:
    data = model.data_preprocessor(loader.collate_fn(read_items(loader.dataset, count=1)), True)
    saved = [(buffer, buffer.clone()) for buffer in student.buffers()]
    student.train()
    try:
        student(**data, mode="loss")
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
