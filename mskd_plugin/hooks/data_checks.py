"""Checks before the first step of what the networks are given: images, classes and batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmpretrain.engine import SwitchRecipeHook
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from mskd_plugin.checkpoints.normalization import (
    check_normalization,
    image_source,
    stated_normalization,
    stated_reversal,
    told,
)
from mskd_plugin.checkpoints.weights import read_checkpoint
from mskd_plugin.datasets import InMemoryImages
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.random_state import unchanged_random_state
from mskd_plugin.hooks.trial import first_images, read_items

#: Normalised pixels are a few deviations at most, others reach 255.
LARGEST_NORMALIZED = 20


def check_normalized(runner: Runner, model: BaseModel) -> None:
    """Check that the images reach the teacher as its own config or its checkpoint states them.

    Where neither they nor this config state a mean and std, there is a warning.

    Args:
        runner: With the training data.
        model: A distillation, or a network by itself.

    Raises:
        SettingError: If nothing normalises the images, or they are normalised by another mean or
            std, or have another order of channels.
    """
    preprocessor = model.data_preprocessor
    source, checkpoint = _teacher_checkpoint(runner, model)
    check_normalization(checkpoint, preprocessor, source, setting="teacher_ckpt")
    if getattr(preprocessor, "mean", None) is not None:
        _check_reversal(runner, preprocessor, checkpoint, source)
        return
    if not _gives_raw_pixels(runner, preprocessor):  # a transform normalises them
        return
    own = getattr(getattr(model, "teacher", None), "data_preprocessor", None)
    stated = stated_normalization(checkpoint)
    if getattr(own, "mean", None) is not None:
        stated = {name: getattr(own, name).flatten().tolist() for name in ("mean", "std")}
    if stated and (any(stated["mean"]) or set(stated["std"]) != {1.0}):
        raise SettingError(
            "data_preprocessor",
            f"one that normalises the images as the teacher's were, with {told(stated)}",
            "none with mean and std",
            "Both networks see the same images: state the teacher's mean and std there.",
        )
    runner.logger.warning(
        "The config's `data_preprocessor` states no mean and std: images reach the networks as "
        "they are, 0 to 255."
    )


def check_classes(runner: Runner) -> None:
    """Check that the data of validation and test number the classes as the training data do.

    Raises:
        SettingError: If both state their classes and these differ, as those of image folders do
            where one split lacks a class.
    """
    training = runner.train_dataloader.dataset
    for stage in ("val", "test"):
        # A test loop that is still a config is not built here.
        loader = getattr(getattr(runner, f"_{stage}_loop"), "dataloader", None)
        if loader is not None:
            compare_classes(
                classes_of(training), loader.dataset, f"{stage}_dataloader.dataset", "training data"
            )


def classes_of(dataset: Any) -> Sequence[str] | None:
    """Return the names of a data set's classes, or None where it does not state them."""
    return (getattr(dataset, "metainfo", None) or {}).get("classes")


def trained_classes(checkpoint: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the classes that MMEngine noted in a checkpoint, or None where it states none."""
    found: Any = checkpoint
    for key in ("meta", "dataset_meta", "classes"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def compare_classes(
    expected: Sequence[str] | None, dataset: Any, setting: str, source: str
) -> None:
    """Check that a data set has the classes of the training, in the same order.

    Args:
        expected: The classes of the training; None where they are not known.
        dataset: A data set.
        setting: Place of ``dataset`` in the config.
        source: Where ``expected`` comes from, for errors.

    Raises:
        SettingError: If both are known and differ.
    """
    given = classes_of(dataset)
    if not expected or not given or list(expected) == list(given):
        return
    pairs = enumerate(itertools.zip_longest(expected, given))
    index, (known, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise SettingError(
        setting,
        f"data with the {len(expected)} classes of the {source}, number {index} of them {known!r}",
        f"{len(given)} classes, number {index} {found!r}",
        "Labels are numbers of classes: give classes=[...], the same list, to the data sets "
        "(CustomDataset else takes the names of the folders that are there), and to each split a "
        "folder for each, empty where it has no image.",
    )


def check_memories(runner: Runner, model: BaseModel) -> None:
    """Check that a loss with something of each training image, CRD, has as much as there are
    images: rows of images that never come would be noise, and would be drawn as negatives.

    A loss that does says so by an attribute ``num_images``.

    Raises:
        SettingError: If there are more or fewer images, or two data sets number theirs alike.
    """
    losses = getattr(getattr(model, "distiller", None), "distill_losses", None) or {}
    counts = {name: loss.num_images for name, loss in losses.items() if hasattr(loss, "num_images")}
    dataset: Any = runner.train_dataloader.dataset
    while hasattr(dataset, "dataset"):  # a wrapper, which repeats images
        dataset = dataset.dataset
    if isinstance(dataset, IterableDataset):
        return
    for name, count in counts.items():
        if isinstance(dataset, ConcatDataset) and len(dataset.datasets) > 1:
            raise SettingError(
                "train_dataloader.dataset",
                f"one data set, whose images have numbers of their own, for {name}",
                f"a {type(dataset).__name__} of {len(dataset.datasets)}, each numbered from 0",
            )
        if count != len(dataset):
            raise SettingError(
                f"model.distiller.distill_losses.{name}.num_images",
                f"{len(dataset)}, the number of training images",
                count,
                "A pair's config states it as num_train_images, beside the data set.",
            )


def images_per_process(loader: DataLoader, world_size: int) -> set[int]:
    """Return how many images processes read in an epoch, one number where all read as many."""
    if getattr(loader.sampler, "round_up", True):
        return {len(loader.sampler)}  # type: ignore[arg-type]
    count = len(loader.dataset)  # type: ignore[arg-type]
    return {count // world_size, -(-count // world_size)}


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


def check_even_batches(runner: Runner, model: BaseModel) -> None:
    """Check that all processes have as many batches, and of one size where a loss joins them.

    A loss that does says so by an attribute ``joins_processes``.

    Raises:
        SettingError: If the sampler gives some processes one image more, and with it a batch more,
            in which they would wait for the others, or such a loss would meet it.
    """
    losses = getattr(getattr(model, "distiller", None), "distill_losses", None) or {}
    joining = [name for name, loss in losses.items() if getattr(loss, "joins_processes", False)]
    loader = runner.train_dataloader
    if runner.world_size == 1 or isinstance(loader.dataset, IterableDataset):
        return
    counts = images_per_process(loader, runner.world_size)
    size = loader.batch_size  # None with a batch sampler
    if joining and not loader.drop_last:
        uneven = counts
    elif size:
        uneven = {count // size if loader.drop_last else -(-count // size) for count in counts}
    else:
        return
    if len(uneven) > 1:
        needed, told = "processes that take as many steps each", f" with batches of {size}"
        if joining:
            needed, told = "losses that join the batches of all processes", ""
            needed += f" ({', '.join(joining)}), which have to be of one size"
        raise SettingError(
            "train_dataloader.sampler.round_up",
            f"True for {needed}",
            f"False with {len(loader.dataset)} images for {runner.world_size} processes{told}",
        )


def tell_batch_augments(runner: Runner, model: BaseModel) -> None:
    """Warn that a distillation does not mix images as the student's own config says, in
    ``train_cfg`` mostly: the distillation's data preprocessor is the one that mixes.
    """
    own = getattr(getattr(model, "architecture", None), "data_preprocessor", None)
    mixing = getattr(own, "batch_augments", None)
    if mixing is not None and getattr(model.data_preprocessor, "batch_augments", None) is None:
        kinds = ", ".join(type(augment).__name__ for augment in mixing.augments)
        runner.logger.warning(
            f"The student's own batch augments ({kinds}) are not applied; those of the "
            "distillation are `data_preprocessor.batch_augments`, which is None."
        )


def check_recipes(runner: Runner, model: BaseModel) -> None:
    """Check that what mmpretrain's ``SwitchRecipeHook`` changes in a later epoch is there, where it
    would end the training.
    """
    head = getattr(model, "head", None)
    dataset = runner.train_dataloader.dataset
    for hook in runner.hooks:
        for recipe in hook.schedule.values() if isinstance(hook, SwitchRecipeHook) else ():
            if "loss" in recipe and not any(hasattr(p, "loss_module") for p in (model, head)):
                raise SettingError(
                    "SwitchRecipeHook.schedule",
                    "one without a `loss`, since the hook does not find the student's inside a "
                    "distillation",
                    type(recipe["loss"]).__name__,
                )
            if "train_pipeline" in recipe and isinstance(dataset, InMemoryImages):
                raise SettingError(
                    "SwitchRecipeHook.schedule",
                    "one without a `train_pipeline` for InMemoryImages, whose pipeline has run "
                    "before training",
                    [type(transform).__name__ for transform in recipe["train_pipeline"]],
                )


def _teacher_checkpoint(runner: Runner, model: BaseModel) -> tuple[str, Any]:
    """Return the name and the content of the teacher's checkpoint, nothing where it is unknown."""
    if not isinstance(getattr(model, "teacher", None), nn.Module):
        return "", {}
    settings = runner.cfg.get("model")
    source = getattr(model, "teacher_source", None)
    if source is None and isinstance(settings, dict):  # MMRazor's own algorithm
        source = settings.get("teacher_ckpt")
    try:
        return str(source), read_checkpoint(source, setting="teacher_ckpt") if source else {}
    except SettingError:  # the host has loaded it in a way of its own
        return str(source), {}


def _check_reversal(runner: Runner, preprocessor: nn.Module, checkpoint: Any, source: str) -> None:
    """Compare the order of the channels, where both have their images from the same source."""
    stated = stated_reversal(checkpoint)
    given = image_source((runner.cfg.get("train_dataloader") or {}).get("dataset"))
    for name in ("_reverses_channels", "_channel_conversion", "to_rgb"):  # ours, MMEngine's, other
        reverses = getattr(preprocessor, name, None)
        if isinstance(reverses, bool):
            break
    else:
        return
    if stated is not None and stated[1] == given and stated[0] != reverses:
        raise SettingError(
            "data_preprocessor.to_rgb",
            f"{stated[0]}, as in the training of {source!r}",
            reverses,
            "Both networks see the same images, with the channels in the teacher's order.",
        )


def _gives_raw_pixels(runner: Runner, preprocessor: nn.Module) -> bool:
    """Whether the networks get training images with values of 0 to 255."""
    if isinstance(runner.train_dataloader.dataset, IterableDataset):
        return False  # not known without a pass
    with unchanged_random_state():
        data = preprocessor(first_images(runner.train_dataloader), False)
    inputs = data.get("inputs") if isinstance(data, dict) else None
    images = list(inputs) if isinstance(inputs, (list, tuple, torch.Tensor)) else []
    if not all(isinstance(image, torch.Tensor) for image in images):
        return False
    values = [value.item() for image in images for value in image.aminmax()]
    return bool(values) and min(values) >= 0 and max(values) > LARGEST_NORMALIZED
