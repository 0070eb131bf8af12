"""The normalisation of the images that a checkpoint's weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mskd_plugin.checkpoints.stated_config import stated_config
from mskd_plugin.config_parts import type_name
from mskd_plugin.errors import SettingError

#: Differences up to this share of the standard deviation are roundings of one published number.
TOLERANCE = 0.01
_NAMES = ("mean", "std")
_FILES = "LoadImageFromFile"


def stated_normalization(checkpoint: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean and std that the config inside a checkpoint of OpenMMLab's states.

    The normalisation of a model goes before that of the run; before MMEngine it was
    ``img_norm_cfg``.

    Args:
        checkpoint: See :func:`mskd_plugin.checkpoints.stated_config.stated_config`.

    Returns:
        ``mean`` and ``std``, one number a channel or one for all; empty where the checkpoint
        states none.

    Example:
        >>> config = "data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])"
        >>> stated_normalization({"meta": {"cfg": config}})
        {'mean': [1.0, 2.0, 3.0], 'std': [4.0, 5.0, 6.0]}
        >>> stated_normalization({})
        {}
    """
    place = _normalization_place(stated_config(checkpoint))
    return {name: _numbers(place[name]) for name in _NAMES if place}


def stated_reversal(checkpoint: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Return whether the config inside a checkpoint reverses the channels, and of which images.

    Args:
        checkpoint: See :func:`stated_normalization`.

    Returns:
        ``to_rgb``, and where the images come from, see :func:`image_source`; None where the
        checkpoint does not state both.

    Example:
        >>> pipeline = "[dict(type='LoadImageFromFile')]"
        >>> lines = (
        ...     "data_preprocessor = dict(mean=[1.0], std=[4.0], to_rgb=True)",
        ...     f"train_dataloader = dict(dataset=dict(type='ImageNet', pipeline={pipeline}))",
        ... )
        >>> stated_reversal({"meta": {"cfg": "; ".join(lines)}})
        (True, 'LoadImageFromFile')
    """
    top = stated_config(checkpoint)
    place = _normalization_place(top)
    # MMEngine's own preprocessor has the other names; before MMEngine data sets were in `data`.
    stated = [place.get(key) for key in ("to_rgb", "bgr_to_rgb", "rgb_to_bgr")]
    dataset = _settings(top.get("train_dataloader")).get("dataset")
    source = image_source(dataset or _settings(top.get("data")).get("train"))
    if source is None or not any(isinstance(value, bool) for value in stated):
        return None
    return any(value is True for value in stated), source


def image_source(dataset: Any) -> str | None:
    """Tell images in one order of channels from those in another, by what loads them.

    Args:
        dataset: Config of a data set.

    Returns:
        ``"LoadImageFromFile"``, which gives blue, green, red; else the type of the data set, inside
        its wrappers; None where that is not known, or a transform orders channels by itself.
    """
    while isinstance(inner := _settings(dataset).get("dataset"), dict):
        dataset = inner
    pipeline = _settings(dataset).get("pipeline")
    if not isinstance(pipeline, list) or not all(isinstance(t, dict) for t in pipeline):
        return None
    kinds = [type_name(transform) for transform in pipeline]
    for kind, transform in zip(kinds, pipeline):
        # Before MMEngine it was `Normalize` that reversed them.
        if kind != "Normalize" and {"to_rgb", "to_bgr"} & transform.keys():
            return None
    return _FILES if _FILES in kinds else type_name(dataset)


def _normalization_place(top: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that state mean and std, or none."""
    of_model = _settings(top.get("model")).get("data_preprocessor")
    for place in (of_model, top.get("data_preprocessor"), top.get("img_norm_cfg")):
        if all(_numbers(_settings(place).get(name)) for name in _NAMES):
            return _settings(place)
    return {}


def _settings(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [float(v) for v in values] if all(isinstance(v, (int, float)) for v in values) else []


def check_normalization(
    checkpoint: Mapping[str, Any],
    data_preprocessor: nn.Module,
    source: str | Path,
    *,
    setting: str,
) -> None:
    """Check that images are normalised as the checkpoint's weights know them, where it says so.

    Args:
        checkpoint: See :func:`stated_normalization`.
        data_preprocessor: What normalises the images, with buffers ``mean`` and ``std``; without
            them nothing is checked, since a transform may normalise them:
            :func:`mskd_plugin.checks.networks.check_normalized` knows.
        source: Where the checkpoint comes from, for errors.
        setting: Name of the setting, for errors.

    Raises:
        SettingError: If a mean or std differs by more than :data:`TOLERANCE` of the std.
    """
    stated = stated_normalization(checkpoint)
    given = {
        name: buffer.flatten().tolist()
        for name in _NAMES
        if (buffer := getattr(data_preprocessor, name, None)) is not None
    }
    if not stated or len(given) < len(_NAMES):
        return
    if not all(_close(stated[name], given[name], given["std"]) for name in _NAMES):
        raise SettingError(
            setting,
            "weights trained on images that were normalised as this config's `data_preprocessor` "
            f"does it, with {told(given)}",
            f"{str(source)!r}, trained with {told(stated)}",
            "Both networks see the same images: state the teacher's mean and std there.",
        )


def _close(stated: list[float], given: list[float], std: list[float]) -> bool:
    """Compare the numbers of each channel; one number alone is that of all channels."""
    try:
        channels = torch.broadcast_tensors(*map(torch.tensor, (stated, given, std)))
    except RuntimeError:  # of other numbers of channels
        return False
    a, b, s = channels
    return bool(((a - b).abs() <= TOLERANCE * s.abs()).all())


def told(values: Mapping[str, list[float]]) -> str:
    """Tell a mean and std, for errors."""
    return ", ".join(f"{name} {[round(v, 4) for v in values[name]]}" for name in _NAMES)
