"""The networks: their classes, the teacher's weights, and images normalised as it knows them."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import IterableDataset

from mskd_plugin.checkpoints.normalization import (
    check_normalization,
    image_source,
    stated_normalization,
    stated_reversal,
    told,
)
from mskd_plugin.checkpoints.weights import read_checkpoint
from mskd_plugin.checks.data import classes_of, first_images
from mskd_plugin.errors import SettingError
from mskd_plugin.unchanged import unchanged_random_state

#: Normalised pixels are a few deviations at most, others reach 255.
LARGEST_NORMALIZED = 20


def check_heads(runner: Runner, model: BaseModel) -> None:
    """Check that every head has the classes of the data."""
    dataset = runner.train_dataloader.dataset
    classes = classes_of(dataset)
    for name in ("student", "teacher"):
        network = getattr(model, name, model)
        count = getattr(getattr(network, "head", None), "num_classes", None)
        if classes and count is not None and count != len(classes):
            raise SettingError(
                f"{name}.head.num_classes",
                f"{len(classes)}, the number of classes of {type(dataset).__name__}",
                count,
            )


def check_teacher_weights(runner: Runner, model: BaseModel) -> None:
    """Check that the teacher, if there is one, has weights of its own."""
    trainable = getattr(model, "teacher_trainable", False)
    if getattr(model, "teacher_source", "unknown") is None and not trainable:
        raise SettingError(
            "teacher_ckpt",
            "the teacher's weights (--teacher FILE, a URL or torchvision://NAME)",
            None,
        )


def check_teacher(runner: Runner, model: BaseModel) -> None:
    """Check that the teacher, if there is one, has weights of its own and gets the images as it
    knows them.
    """
    teacher = getattr(model, "teacher", None)
    if teacher is None:
        return
    check_teacher_weights(runner, model)
    own = getattr(teacher, "data_preprocessor", None)
    shared = model.data_preprocessor
    for name in ("mean", "std"):
        mine, given = getattr(own, name, None), getattr(shared, name, None)
        if mine is not None and given is not None and not torch.equal(mine.cpu(), given.cpu()):
            raise SettingError(
                "data_preprocessor",
                f"the teacher's own {name} {mine.flatten().tolist()}, since both networks see the "
                f"same images",
                given.flatten().tolist(),
            )


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
