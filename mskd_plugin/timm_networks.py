"""Networks of timm by its own names, through mmpretrain's wrapper of timm."""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch

from mskd_plugin.errors import SettingError
from mskd_plugin.network import Network

#: What stands before timm's name of a network.
PREFIX = "timm:"
_SIDE = 224


@lru_cache(maxsize=16)
def timm_network(name: str) -> Network:
    """Describe a convolutional network of timm by what timm tells of it.

    Its stages are the last four maps that timm lists in ``feature_info``; its last map is what the
    network gives without pooling and classifier.

    Args:
        name: :data:`PREFIX` and timm's name, ``timm:resnet50d`` for one.

    Raises:
        SettingError: If timm is not installed, has no such network, or the network gives no maps or
            lists none.
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
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights
            model = timm.create_model(model_name, pretrained=False)
    except RuntimeError as error:
        raise SettingError("network", "a network of timm's", repr(name), str(error)) from error
    model.reset_classifier(0, "")
    with torch.no_grad():
        output = model.to("meta").eval()(torch.empty(1, 3, _SIDE, _SIDE, device="meta"))
    modules = dict(model.named_modules())
    stages = [
        (f"backbone.timm_model.{info['module']}", info["num_chs"])
        for info in list(getattr(model, "feature_info", []))[-4:]
        if info.get("module") in modules
    ]
    is_map = isinstance(output, torch.Tensor) and output.dim() == 4
    if not is_map or output.shape[1] != model.num_features or not stages:
        raise SettingError(
            "network",
            "a network of timm's that gives maps (N, C, H, W) and lists its stages",
            f"{name!r} with {len(stages)} stages, and an output of the shape "
            f"{tuple(getattr(output, 'shape', ()))}",
        )
    return Network(
        backbone={"type": "TIMMBackbone", "model_name": model_name},
        width=model.num_features,
        stages=tuple(stages),
        preact_stages=(),
        preact_norms=(),
        stem=stages[0],
        final=("backbone.timm_model", model.num_features),
        num_classes=1000,
    )
