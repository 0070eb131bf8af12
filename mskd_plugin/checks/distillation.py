"""Recorders, connectors and losses, tried on two training images."""

from __future__ import annotations

from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from mskd_plugin.checks.data import first_images
from mskd_plugin.errors import SettingError
from mskd_plugin.losses import MultiScaleContrastiveLoss

#: Largest difference, relative to the largest logit, that rounding in bfloat16 explains.
CLASSIFIER_TOLERANCE = 0.05


def check_recomputed(runner: Runner, model: BaseModel) -> None:
    """Check that no student's recorder is inside a module of ``activation_checkpointing``, which
    runs without gradients: the distillation would train nothing before it.
    """
    names = runner.cfg.get("activation_checkpointing") or []
    distiller = getattr(model, "distiller", None)
    if not isinstance(distiller, ConfigurableDistiller):
        return
    for recorder in distiller.student_recorders.recorders.values():
        for name in [names] if isinstance(names, str) else names:
            if f"architecture.{recorder.source}".startswith(f"{name}."):
                raise SettingError(
                    "activation_checkpointing",
                    "modules without a recorder inside, whose records would have no gradient",
                    f"{name!r}, with a recorder of {recorder.source!r}",
                )


def check_losses(runner: Runner, model: BaseModel) -> None:
    """Send two training images through recorders, connectors and losses."""
    data = model.data_preprocessor(first_images(runner.train_dataloader), True)
    handles = _watch_categorization(model)
    try:
        losses = model(**data, mode="loss")
    except SettingError:
        raise
    except (
        AssertionError,
        AttributeError,  # of images without labels, or of a loss that is given no tensor
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,  # of a loss that unpacks another shape
    ) as error:
        got = f"{type(error).__name__} on two training images: {str(error) or 'no message'}"
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_locals.get("self") is model.architecture:
                expected = "a student whose own loss takes these images and labels"
                raise SettingError("model.architecture", expected, got) from error
        expected = "recorders, connectors and losses that fit together"
        raise SettingError("model.distiller", expected, got) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, value in losses.items():
        if not torch.isfinite(torch.as_tensor(value)).all():
            raise SettingError(name, "a finite loss on two training images", f"{value}")


def _watch_categorization(model: BaseModel) -> list[RemovableHandle]:
    """Compare, in the coming forward, the classifier's answer on the global region with the
    teacher's logits.
    """
    outputs: list[object] = []

    def check(loss: nn.Module, _: tuple, kwargs: dict) -> None:
        logits = outputs[-1] if outputs else None
        feature = next((r for r in kwargs["teacher_regions"] if r.shape[1] == 1), None)
        weight, bias = kwargs.get("classifier_weight"), kwargs.get("classifier_bias")
        if not isinstance(logits, torch.Tensor) or feature is None or weight is None:
            return
        if weight.shape[1] != feature.shape[-1]:
            return  # the loss itself says so
        answer = nn.functional.linear(feature[:, 0].to(weight.dtype), weight, bias)
        gap = (answer - logits).abs().max().item()
        if gap > CLASSIFIER_TOLERANCE * logits.abs().max().item():
            raise SettingError(
                "teacher_regions",
                "regions of the stage that feeds the teacher's classifier, to be categorized",
                f"a stage on whose global feature the classifier is {gap:.3g} off the teacher's "
                f"logits",
            )

    handles = [
        loss.register_forward_pre_hook(check, with_kwargs=True)
        for loss in model.distiller.distill_losses.values()
        if isinstance(loss, MultiScaleContrastiveLoss) and loss.categorizes
    ]
    if handles:
        handles.append(model.teacher.register_forward_hook(lambda *io: outputs.append(io[-1])))
    return handles


def check_recorded(runner: Runner, model: BaseModel) -> None:
    """Check that no student's recorder is where a block with mmpretrain's ``with_cp`` runs without
    gradients: the distillation would train nothing before it.

    Raises:
        SettingError: If one is.
    """
    student = model.architecture
    if not any(getattr(module, "with_cp", False) for module in student.modules()):
        return
    modules, handles = dict(student.named_modules()), []
    calls: dict[str, list[tuple[bool, list[Tensor]]]] = {}
    for recorder in model.distiller.student_recorders.recorders.values():
        if recorder.source in modules:
            hook = partial(_note, calls.setdefault(recorder.source, []))
            handles.append(modules[recorder.source].register_forward_hook(hook))
    data = model.data_preprocessor(first_images(runner.train_dataloader), True)
    try:
        with torch.enable_grad():
            student(**data, mode="loss")
    finally:
        for handle in handles:
            handle.remove()
    for source, noted in calls.items():
        # One that is changed in place may be what the whole block returns, which has a gradient.
        trains = [on or any(t.requires_grad for t in tensors) for on, tensors in noted]
        if trains and not any(trains):
            raise SettingError(
                "with_cp",
                "False in the student's blocks with a recorder inside, whose records would have "
                "no gradient",
                f"True around the recorder of {source!r}",
            )


def _note(
    calls: list[tuple[bool, list[Tensor]]], module: nn.Module, inputs: Any, output: Any
) -> None:
    """Note whether a call ran with gradients, and its tensors."""
    tensors = [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]
    calls.append((torch.is_grad_enabled(), tensors))
