"""Networks of timm by its own names, through mmpretrain's wrapper of timm."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mskd_plugin.errors import SettingError
from mskd_plugin.networks.description import Network, Tap

#: What stands before timm's name of a network.
PREFIX = "timm:"
_SIDE = 224
_BODY = "backbone.timm_model"


@lru_cache(maxsize=16)
def timm_network(name: str) -> Network:
    """Describe a network of timm by what timm tells of it, and by what it computes.

    Which pooling stands before the classifier is found out with one random image of 224 x 224: with
    it and the network's own classifier, the logits are the network's own. Stages of a convolutional
    network are the last four maps that timm lists in ``feature_info``, its stem is the one before
    them, where timm lists one; those of a token network are the ones behind each quarter of its
    blocks. The last map, or the last tokens, are what the network gives without pooling and
    classifier.

    timm's networks want the mean and std of their ``pretrained_cfg``; a config states them in its
    ``data_preprocessor``.

    Args:
        name: :data:`PREFIX` and timm's name, ``timm:resnet50d`` for one.

    Raises:
        SettingError: If timm is not installed or has no such network, the network does not take
            images of 224 x 224, gives neither maps (N, C, H, W) nor tokens (N, L, C), lists no
            stages, or its classifier reads anything but the average of its maps or tokens or its
            class token: an average that is normalised once more, for one.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise SettingError(
            "network",
            "one that is installed",
            f"{name!r} without timm",
            "pip install timm gives it.",
        ) from error
    model_name = name.removeprefix(PREFIX)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # building draws weights
        try:
            model = timm.create_model(model_name, pretrained=False).eval()
        except RuntimeError as error:
            raise SettingError("network", "a network of timm's", repr(name), str(error)) from error
        classifier = model.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise SettingError(
                "network",
                "a network of timm's with one linear classifier",
                f"{name!r} with a {type(classifier).__name__}",
            )
        # Some start from 0, where every pooling gives the same logits.
        classifier.weight.normal_()
        images = torch.randn(1, 3, _SIDE, _SIDE)
        try:
            logits = model(images)
            model.reset_classifier(0, "")
            output, listed = _outputs(model, images)
        except (AssertionError, RuntimeError) as error:
            raise SettingError(
                "network", f"one for images of {_SIDE} x {_SIDE}", repr(name), str(error)
            ) from error
    kind = _kind(name, output)
    class_tokens = int(getattr(model, "num_prefix_tokens", 0)) if kind == "tokens" else 0
    neck = _neck(name, kind, output, class_tokens, classifier, logits)
    stem, stages = _stages(name, listed, output.dim())
    width = classifier.in_features
    return Network(
        backbone={"type": "TIMMBackbone", "model_name": model_name},
        width=width,
        stages=stages,
        stem=stem,
        final=(_BODY, width),
        num_classes=1000,
        neck=neck,
        tokens=kind == "tokens",
        class_tokens=class_tokens,
        final_is_pooled=neck.get("average", True),
    )


def _kind(name: str, output: Any) -> str:
    """Tell maps from tokens."""
    dimensions = output.dim() if isinstance(output, Tensor) else 0
    if dimensions not in (3, 4):
        raise SettingError(
            "network",
            "a network of timm's that gives maps (N, C, H, W) or tokens (N, L, C)",
            f"{name!r} with an output of the shape {tuple(getattr(output, 'shape', ()))}",
        )
    return "maps" if dimensions == 4 else "tokens"


@torch.no_grad()
def _neck(
    name: str, kind: str, output: Tensor, class_tokens: int, classifier: nn.Linear, logits: Tensor
) -> dict[str, Any]:
    """Return the config of the pooling that stands before the classifier."""
    pooled: list[tuple[dict[str, Any], Tensor]]
    if kind == "maps":
        pooled = [({"type": "GlobalAveragePooling"}, output.mean((2, 3)))]
    else:
        common: dict[str, Any] = {"type": "TokenPooling", "class_tokens": class_tokens}
        pooled = [({**common, "average": True}, output[:, class_tokens:].mean(1))]
        if class_tokens:
            pooled.append(({**common, "average": False}, output[:, 0]))
    for neck, vector in pooled:
        if vector.shape[1] == classifier.in_features:
            gap = (classifier(vector) - logits).abs().max()
            if gap <= 1e-4 * logits.abs().max():
                return neck
    raise SettingError(
        "network",
        "a network of timm's whose classifier reads the average of its last maps (N, C, H, W) or "
        "tokens (N, L, C), or its class token",
        f"{name!r}, which pools an output of the shape {tuple(output.shape)} otherwise",
    )


def _outputs(model: nn.Module, images: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return what the network gives, and what the modules give that timm lists."""
    modules = dict(model.named_modules())
    names = [info.get("module") for info in getattr(model, "feature_info", [])]
    seen: dict[str, Any] = {name: None for name in names if name in modules}
    handles = [
        modules[name].register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in seen
    ]
    output = model(images)
    for handle in handles:
        handle.remove()
    return output, seen


def _stages(
    name: str, listed: dict[str, Any], dimensions: int
) -> tuple[Tap | None, tuple[Tap, ...]]:
    """Return stem and stages among the modules that timm lists, of the output's kind."""
    axis = 1 if dimensions == 4 else 2
    widths = {
        module: output.shape[axis]
        for module, output in listed.items()
        if isinstance(output, Tensor) and output.dim() == dimensions
    }
    stages = [(f"{_BODY}.{module}", width) for module, width in widths.items()]
    if not stages:
        raise SettingError(
            "network",
            "a network of timm's that lists its stages, which give what the network gives",
            f"{name!r} with {', '.join(listed) or 'none'}",
        )
    if dimensions == 3 and len(stages) >= 4:
        return None, tuple(stages[len(stages) * k // 4 - 1] for k in range(1, 5))
    return (stages[-5] if len(stages) > 4 else None), tuple(stages[-4:])
