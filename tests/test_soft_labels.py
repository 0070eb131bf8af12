"""Losses that read one class an image, reached by a config that mixes images."""

from __future__ import annotations

import inspect

import pytest
import torch
import toy
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin import losses
from mskd_plugin.errors import SettingError

SIZE, CLASSES, WIDTH = 4, 3, 6
SETTINGS = {
    "MemoryCRDLoss": {"num_images": 9, "embedding_channels": WIDTH, "num_negatives": 2},
    "MultiScaleContrastiveLoss": {"exclude_same_class": True},
}
READ_LABELS = [
    name
    for name in losses.__all__
    if "labels" in inspect.signature(getattr(losses, name).forward).parameters
]


def inputs(name: str, labels: Tensor) -> dict:
    """Return what a loss takes; one side is like the other, up to its numbers."""
    torch.manual_seed(0)
    shapes = {
        "logits": lambda: torch.randn(SIZE, CLASSES),
        "embedding": lambda: torch.randn(SIZE, WIDTH),
        "feature": lambda: torch.randn(SIZE, WIDTH, 4, 4),
        "weight": lambda: torch.randn(CLASSES, WIDTH),
        "regions": lambda: (torch.randn(SIZE, 1, WIDTH), torch.randn(SIZE, 4, WIDTH)),
        "idx": lambda: torch.arange(SIZE),
    }
    taken = {
        argument: shapes[argument.split("_")[-1]]()
        for argument in inspect.signature(getattr(losses, name).forward).parameters
        if argument.split("_")[-1] in shapes
    }
    return {**taken, "labels": labels}


def test_the_losses_that_read_labels():
    assert READ_LABELS == [
        "DecoupledKDLoss",
        "MemoryCRDLoss",
        "MultiScaleContrastiveLoss",
        "NormalizedKDLoss",
        "OFALoss",
        "ScaleDecoupledKDLoss",
    ]


@pytest.mark.parametrize(
    "labels",
    [
        torch.rand(SIZE, CLASSES),
        torch.rand(SIZE),
        torch.zeros(SIZE, CLASSES, dtype=torch.int64),
        torch.zeros(SIZE, 1, dtype=torch.int64),
        torch.zeros(SIZE - 1, dtype=torch.int64),
        torch.zeros(SIZE, dtype=torch.bool),
    ],
    ids=lambda labels: f"{str(labels.dtype).removeprefix('torch.')}{tuple(labels.shape)}",
)
@pytest.mark.parametrize("name", READ_LABELS)
def test_labels_that_are_no_classes_are_one_clear_error(name, labels):
    loss = getattr(losses, name)(**SETTINGS.get(name, {}))
    assert loss(**inputs(name, torch.tensor([0, 2, 1, 2]))).isfinite()
    if name == "OFALoss" and labels.shape == (SIZE, CLASSES) and labels.is_floating_point():
        return  # it reads scores
    message = (
        rf"`labels` to be class indices of shape \({SIZE},\), one per image, in torch.int64, but "
        rf"got {labels.dtype} of shape \({', '.join(map(str, labels.shape))},?\)\. Images mixed by"
    )
    with pytest.raises(SettingError, match=message):
        loss(**inputs(name, labels))


def test_a_hand_written_config_that_mixes_images_is_told_so():
    distiller = toy.distiller()
    for recorders in (distiller["student_recorders"], distiller["teacher_recorders"]):
        recorders["logits"] = dict(type="ModuleOutputs", source="head.fc")
    distiller["distill_losses"] = dict(loss_dkd=dict(type="DecoupledKDLoss"))
    distiller["connectors"] = {}
    distiller["loss_forward_mappings"] = dict(
        loss_dkd=dict(
            student_logits=dict(recorder="logits", from_student=True),
            teacher_logits=dict(recorder="logits", from_student=False),
            labels=dict(recorder="labels", from_student=True, data_idx=1),
        )
    )
    mixed = dict(
        toy.PREPROCESSOR,
        num_classes=10,
        batch_augments=dict(augments=dict(type="Mixup", alpha=1.0)),
    )
    for preprocessor, refused in ((toy.PREPROCESSOR, False), (mixed, True)):
        model = MODELS.build(toy.algorithm(distiller=distiller, data_preprocessor=preprocessor))
        data = model.data_preprocessor(toy.batch(), training=True)
        if refused:
            with pytest.raises(SettingError, match=r"`labels`.*float32 of shape \(4, 10\).*mixup"):
                model(**data, mode="loss")
        else:
            assert model(**data, mode="loss")["distill.loss_dkd"].isfinite()
