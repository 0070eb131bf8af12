"""MSKD's loss of a distillation by naive loops, from what its networks give in the same step."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.model import BaseModel
from mmrazor.registry import MODELS
from oracles import contrastive_terms, decouple, stage_loss
from torch import Tensor, nn


def step(cfg: dict, data: dict[str, Any]) -> tuple[BaseModel, dict[str, Tensor], dict[str, Tensor]]:
    """Build a distillation and take a step.

    Returns:
        The model, its losses, and what the recorded modules gave, by role and recorder.
    """
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    seen: dict[str, Tensor] = {}
    for role in ("student", "teacher"):
        for name, recorder in cfg["distiller"][f"{role}_recorders"].items():
            if recorder["type"] != "ModuleOutputs":
                continue
            module = getattr(model, role).get_submodule(recorder["source"])
            key = f"{role}.{name}"
            module.register_forward_hook(lambda *io, key=key: seen.__setitem__(key, io[-1]))
    return model, model(**data, mode="loss"), seen


def regions(feature: Tensor, scales: tuple[int, ...], class_tokens: int = 0) -> list:
    """Return the regions of maps, or of tokens of a square behind ``class_tokens`` others."""
    if feature.dim() == 3:
        side = math.isqrt(feature.shape[1] - class_tokens)
        feature = feature[:, class_tokens:].mT.unflatten(2, (side, side))
    return decouple(feature.double().tolist(), scales)


def projected(of_scales: list, projector: nn.Module) -> list:
    """Return regions behind a projector."""
    return [projector(torch.tensor(scale)).double().tolist() for scale in of_scales]


def assert_loss_is_that_of_the_loops(
    cfg: dict,
    data: dict[str, Any],
    student_tokens: int = 0,
    teacher_tokens: int = 0,
    scales: tuple[int, ...] = (1, 2, 4),
    **settings: Any,
) -> tuple[BaseModel, Tensor]:
    """Take a step, and compare the loss of the one stage; return the model and that loss."""
    model, losses, seen = step(cfg, data)
    (name,) = (key for key in losses if key.startswith("distill.loss_mskd_"))
    stage = name.removeprefix("distill.loss_mskd_")
    teacher_stage = next(key for key in seen if key.startswith("teacher."))
    with torch.no_grad():
        projector = model.distiller.connectors[f"{stage}_student"].projector
        student = projected(regions(seen[f"student.{stage}"], scales, student_tokens), projector)
        teacher = regions(seen[teacher_stage], scales, teacher_tokens)
    weight = cfg["distiller"]["distill_losses"][f"loss_mskd_{stage}"]["loss_weight"]
    if settings.pop("categorized", False):
        labels = [int(sample.gt_label) for sample in data["data_samples"]]
        classifier = model.teacher.head.fc
        parts = labels, classifier.weight.tolist(), classifier.bias.tolist()
        expected = stage_loss(student, teacher, *parts, loss_weight=weight, **settings)
    else:
        expected = weight * math.fsum(contrastive_terms(student, teacher, **settings))
    torch.testing.assert_close(losses[name].item(), expected, rtol=1e-4, atol=1e-6)
    return model, losses[name]
