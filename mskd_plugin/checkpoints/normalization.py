"""The normalisation of the images that a checkpoint's weights were trained with."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mskd_plugin.errors import SettingError

#: Differences up to this share of the standard deviation are roundings of one published number.
TOLERANCE = 0.01
_NAMES = ("mean", "std")


def stated_normalization(checkpoint: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean and std that the config inside a checkpoint of OpenMMLab's states.

    The config is read as text, not run. That of a model goes before that of the run.

    Args:
        checkpoint: What the file holds. MMEngine keeps the config under ``meta.cfg``; before
            MMEngine it was ``meta.config``, with the numbers in ``img_norm_cfg``.

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
    meta = checkpoint.get("meta")
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, Mapping) else []
    text = next(filter(None, texts), None)
    if not isinstance(text, str):
        return {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    top = {
        target.id: node.value
        for node in statements
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    of_model = dict(_entries(top.get("model"))).get("data_preprocessor")
    for place in (of_model, top.get("data_preprocessor"), top.get("img_norm_cfg")):
        entries = dict(_entries(place))
        stated = {name: _numbers(entries.get(name)) for name in _NAMES}
        if all(stated.values()):
            return stated
    return {}


def _entries(node: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Yield the keys and values of ``dict(...)`` or ``{...}``."""
    if isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value


def _numbers(node: ast.expr | None) -> list[float]:
    try:
        value = ast.literal_eval(node) if node is not None else ()
    except ValueError:
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
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
            them nothing is checked.
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
            f"does it, with {_told(given)}",
            f"{str(source)!r}, trained with {_told(stated)}",
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


def _told(values: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{name} {[round(v, 4) for v in values[name]]}" for name in _NAMES)
