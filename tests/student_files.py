"""Configs and checkpoints of trained students, for the tests of exporting them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch import Tensor, nn

import mskd_plugin  # noqa: F401  (registers the networks)
from mskd_plugin.networks import classifier

CLASSES = tuple("abcdefghij")


def randomized(config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(config)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) * 0.4 + 0.1)
    model.eval()
    return model


def save(model: nn.Module, path: Path, prefix: str = "architecture.", **meta: Any) -> Path:
    """Write a checkpoint with what mmengine's runner adds."""
    state_dict = {prefix + key: value for key, value in model.state_dict().items()}
    if prefix:
        state_dict |= {
            "distiller.connectors.x.weight": torch.zeros(1),
            "teacher.head.fc.bias": torch.zeros(3),
        }
    log = {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}
    torch.save({"meta": meta, "state_dict": state_dict, "message_hub": {"log_scalars": log}}, path)
    return path


def write(path: Path, **settings: Any) -> Path:
    Config(settings).dump(path)
    return path


def distillation(path: Path, **settings: Any) -> Path:
    """Write the config of a distillation on images in memory, layered on a base."""
    preprocessor = {
        "type": "mmpretrain.ClsDataPreprocessor",
        "mean": [10.0, 60.0, 110.0],
        "std": [50.0, 60.0, 70.0],
        "to_rgb": False,
    }
    pipeline = [{"type": "RandomCrop", "crop_size": 32, "padding": 4}, {"type": "PackInputs"}]
    base = path.with_name("base_" + path.name)
    write(
        base,
        custom_imports={"imports": ["mskd_plugin"]},
        train_dataloader={"dataset": {"type": "Digits", "split": "train", "pipeline": pipeline}},
        val_dataloader={
            "batch_size": 7,
            "dataset": {
                "type": "Digits",
                "split": "test",
                "pipeline": [{"type": "mmpretrain.PackInputs"}],
            },
        },
        val_evaluator={"type": "Accuracy", "topk": (1,)},
    )
    model = {
        "_scope_": "mmrazor",
        "type": "FrozenTeacherDistill",
        "data_preprocessor": preprocessor,
        "architecture": classifier("resnet8", 10),
        "teacher": classifier("resnet14", 10),
        "teacher_ckpt": "somewhere/else.pth",
    }
    return write(path, _base_=[base.name], model=model | settings)


def logits_on_rgb(student: nn.Module, image: np.ndarray) -> Tensor:
    """Return the student's logits on an RGB image, normalised by hand as in training."""
    mean, std = torch.tensor([10.0, 60.0, 110.0]), torch.tensor([50.0, 60.0, 70.0])
    inputs = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return student((inputs - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
