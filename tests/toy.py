"""Small models and data for tests: seconds, not minutes."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from mmrazor.registry import MODELS

from mskd_plugin import networks
from mskd_plugin.errors import SettingError
from mskd_plugin.launch import build_runner, use_method
from mskd_plugin.recipes import METHODS

ROOT = Path(__file__).resolve().parent.parent
_counter = itertools.count()
WIDTHS = {"student": (4, 4, 6, 8), "teacher": (4, 4, 8, 12)}
CLASSES = 10
#: Every method with its phases; those with one phase count as in their second.
PHASES = [*((method, 2) for method in METHODS), ("ab", 1), ("fsp", 1), ("ft", 1)]
PREPROCESSOR = dict(type="mmpretrain.ClsDataPreprocessor", mean=[80.0] * 3, std=[80.0] * 3)


def classifier(role: str, num_classes: int = CLASSES, **backbone: Any) -> dict[str, Any]:
    """Return the config of a tiny ResNet8 for ``role``."""
    return dict(
        _scope_="mmpretrain",
        type="ImageClassifier",
        backbone=dict(type="CIFARResNet", depth=8, widths=WIDTHS[role], **backbone),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(
            type="LinearClsHead",
            num_classes=num_classes,
            in_channels=WIDTHS[role][-1],
            loss=dict(type="CrossEntropyLoss"),
        ),
    )


def network(name: str = "resnet8", num_classes: int = CLASSES, seed: int = 0) -> BaseModel:
    """Build a network by its name, with statistics as if it had been trained, in eval mode."""
    torch.manual_seed(seed)
    model = MODELS.build(networks.classifier(name, num_classes))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model.eval()


def distiller(**loss: Any) -> dict[str, Any]:
    """Return MMRazor's ``ConfigurableDistiller`` with MSKD at the last stage."""
    classes = {}
    if loss:
        classes = dict(
            labels=dict(recorder="labels", from_student=True, data_idx=1),
            classifier_weight=dict(recorder="classifier_weight", from_student=False),
            classifier_bias=dict(recorder="classifier_bias", from_student=False),
        )
    return dict(
        type="ConfigurableDistiller",
        student_recorders=dict(
            stage3=dict(type="ModuleOutputs", source="backbone.layer3"),
            labels=dict(type="ModuleInputs", source="head.loss_module"),
        ),
        teacher_recorders=dict(
            stage3=dict(type="ModuleOutputs", source="backbone.layer3"),
            classifier_weight=dict(type="Parameter", source="head.fc.weight"),
            classifier_bias=dict(type="Parameter", source="head.fc.bias"),
        ),
        connectors=dict(
            stage3_student=dict(
                type="MultiScaleDecouplingConnector",
                projector="linear",
                in_channels=WIDTHS["student"][-1],
                out_channels=WIDTHS["teacher"][-1],
            ),
            stage3_teacher=dict(type="MultiScaleDecouplingConnector"),
        ),
        distill_losses=dict(
            loss_mskd_stage3=dict(type="MultiScaleContrastiveLoss", **loss),
        ),
        loss_forward_mappings=dict(
            loss_mskd_stage3=dict(
                student_regions=dict(
                    recorder="stage3", from_student=True, connector="stage3_student"
                ),
                teacher_regions=dict(
                    recorder="stage3", from_student=False, connector="stage3_teacher"
                ),
                **classes,
            )
        ),
    )


def algorithm(kind: str = "FrozenTeacherDistill", **settings: Any) -> dict[str, Any]:
    """Return the config of a tiny distillation."""
    return copy.deepcopy(
        dict(
            dict(
                _scope_="mmrazor",
                type=kind,
                data_preprocessor=PREPROCESSOR,
                architecture=classifier("student"),
                teacher=classifier("teacher"),
                distiller=distiller(),
            ),
            **settings,
        )
    )


def build(seed: int = 0, **settings: Any) -> BaseModel:
    """Build a tiny distillation, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    model = MODELS.build(algorithm(**settings))
    model.init_weights()
    return model


def batch(size: int = 4, side: int = 32, seed: int = 0) -> dict[str, Any]:
    """Return normalised images, labels and the images' numbers in a data set."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    samples = [
        DataSample(metainfo=dict(sample_idx=i)).set_gt_label(i % CLASSES) for i in range(size)
    ]
    return dict(inputs=images, data_samples=samples)


def digits_pair(method: str, phase: int = 2) -> BaseModel:
    """Return the digits' pair, ResNet20 and ResNet8, with a method: its later phase, if it has
    two."""
    cfg = Config.fromfile(ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py")
    init_default_scope(cfg.default_scope)
    cfg.pair.teacher_ckpt = None
    cfg.pair.settings = dict(crd=dict(num_images=100))
    use_method(cfg, method)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    if hasattr(model, "enter_phase"):
        model.enter_phase(phase)
    return model


def runner_config(work_dir: Any, model: dict | None = None, **settings: Any) -> Config:
    """Return the demo's config with a tiny model, 24 training and 20 test images, and two epochs of
    three steps."""
    cfg = Config.fromfile(ROOT / "configs" / "demo" / "mskd_resnet20_resnet8_digits.py")
    cfg.model = model or algorithm(teacher_ckpt=str(teacher_file(work_dir)))
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f"toy_{next(_counter)}"
    cfg.launcher = "none"
    cfg.param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[1], gamma=0.1)
    cfg.merge_from_dict(
        {
            "train_dataloader.batch_size": 8,
            "train_dataloader.dataset.indices": 24,
            "val_dataloader.dataset.indices": 20,
            "train_cfg.max_epochs": 2,
            "train_cfg.val_interval": 1,
            "default_hooks.checkpoint.interval": 1,
            "visualizer.vis_backends": [dict(type="LocalVisBackend")],
            **settings,
        }
    )
    return cfg


def step(model: BaseModel, images: dict | None = None) -> tuple[dict, dict]:
    """Return a training step's losses and gradients."""
    model.zero_grad()
    losses = model(**(images or batch()), mode="loss")
    model.parse_losses(losses)[0].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, gradients


def assert_same(found: tuple, expected: tuple, **tolerance: float) -> None:
    """Assert that two steps' losses and gradients agree, by default to the last bit."""
    for part, other in zip(found, expected, strict=True):
        assert part.keys() == other.keys() and part
        for name, value in part.items():
            torch.testing.assert_close(
                value, other[name], **(tolerance or dict(rtol=0, atol=0)), msg=name
            )


class Steps(Hook):
    """Count steps, and note what is drawn in each epoch."""

    def __init__(self) -> None:
        self.count = 0
        self.inputs: list[tuple[int, float]] = []

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        self.count += 1
        self.inputs.append((runner.epoch, data_batch["inputs"].float().sum().item()))


def train(cfg: Config) -> tuple[Runner, Steps]:
    """Train, and return the runner and what its steps saw."""
    runner = build_runner(cfg)
    steps = Steps()
    runner.register_hook(steps)
    runner.train()
    return runner, steps


def fails(cfg: Config, match: str) -> None:
    """Check that training stops with ``match`` before its first step."""
    steps = Steps()
    with pytest.raises(SettingError, match=match):
        runner = build_runner(cfg)
        runner.register_hook(steps)
        runner.train()
    assert steps.count == 0


def trained(folder: Any, **settings: Any) -> tuple[dict, Runner]:
    """Train, and return the weights and the runner."""
    runner = build_runner(runner_config(folder, **settings))
    runner.train()
    return runner.model.state_dict(), runner


@functools.cache
def tool(name: str) -> ModuleType:
    """Import ``tools/<name>.py``, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def teacher_file(folder: Any, seed: int = 7, **settings: Any) -> Path:
    """Write the weights of a teacher drawn from ``seed`` and return the file."""
    torch.manual_seed(seed)
    path = Path(folder) / f"teacher_{seed}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher = MODELS.build(classifier("teacher", **settings))
    torch.save({"state_dict": teacher.state_dict()}, path)
    return path
