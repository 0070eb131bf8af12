"""The parts of an exported student's config: imports, testing, names of types."""

from __future__ import annotations

from types import ModuleType

import pytest
import toy
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmpretrain.registry import TRANSFORMS
from torch import nn

from mskd_plugin.datasets import Digits


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return toy.tool("export_student")


def test_what_an_exported_config_imports(tool: ModuleType, monkeypatch) -> None:
    class OwnStep:
        pass

    monkeypatch.setitem(TRANSFORMS._module_dict, "OwnStep", OwnStep)
    cfg = Config({"custom_imports": {"imports": ["own.steps"]}})
    for kind, imports in (
        ("OwnStep", ["own.steps"]),
        ("PackInputs", []),
        ("Digits", ["mskd_plugin"]),
        ("mmrazor.SingleTeacherDistill", ["mskd_plugin"]),
    ):
        assert tool.imports_of({"steps": [{"type": kind}, {"type": kind}]}, cfg) == imports


@pytest.mark.parametrize("step", ["CenterCrop", "Resize", "Normalize"])
def test_the_testing_is_the_configs_own(tool: ModuleType, step: str) -> None:
    loading, packing = {"type": "LoadImageFromFile"}, {"type": "PackInputs"}
    pipeline = [loading, {"type": step}, packing]
    loader = {"batch_size": 7, "dataset": {"type": "CustomDataset", "pipeline": pipeline}}
    evaluators = {"val_evaluator": {"type": "Precision"}, "test_evaluator": {"type": "F1"}}
    part = tool.testing_part(Config(evaluators), loader, {}, None, 48)
    assert part["test_evaluator"] == {"type": "F1"} and part["test_dataloader"]["batch_size"] == 7
    resize = [{"type": "Resize", "scale": (48, 48)}] if step == "Normalize" else []
    expected = [loading, *resize, {"type": step}, packing]
    assert part["test_dataloader"]["dataset"]["pipeline"] == expected
    del evaluators["test_evaluator"]
    part = tool.testing_part(Config(evaluators), {}, {}, None, 48)
    assert part["test_evaluator"] == {"type": "Precision"}
    resize = {"type": "Resize", "scale": (48, 48)}
    assert part["test_dataloader"]["dataset"]["pipeline"] == [loading, resize, packing]
    assert tool.class_names({}, {}) is None


def test_types_are_named_as_mmpretrains_scope_knows_them(tool: ModuleType) -> None:
    for kind in (Digits, "mskd_plugin.datasets.Digits", "mmpretrain.Digits", "Digits"):
        assert tool.type_name(kind) == "Digits"
    assert tool.type_name(default_collate) == "default_collate"
    assert tool.type_name(nn.Linear) == "torch.nn.modules.linear.Linear"
