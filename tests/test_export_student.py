"""Exporting students: mmpretrain alone loads them, and every logit is the distilled student's, bit
for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mmcv
import numpy as np
import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmpretrain import ImageClassificationInferencer, get_model
from mmpretrain.registry import MODELS
from student_files import CLASSES, distillation, logits_on_rgb, randomized, save, write

import mskd_plugin  # noqa: F401  (registers the networks)
from mskd_plugin.datasets import Digits
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier

TOOL = toy.ROOT / "tools" / "export_student.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return toy.tool("export_student")


def test_a_distilled_student(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = randomized(classifier("resnet8", 10))
    checkpoint = save(student, tmp_path / "epoch_1.pth", dataset_meta={"classes": CLASSES})
    out = tmp_path / "out" / "student.pth"
    tool.main([str(distillation(tmp_path / "mskd.py")), str(checkpoint), str(out)])
    assert str(out) in capsys.readouterr().out

    saved = torch.load(out, weights_only=True)
    assert saved["state_dict"].keys() == student.state_dict().keys()
    assert saved["meta"]["dataset_meta"] == {"classes": list(CLASSES)}
    exported = Config.fromfile(out.with_suffix(".py"))
    assert exported.test_dataloader.dataset.metainfo == {"classes": list(CLASSES)}

    model = get_model(str(out.with_suffix(".py")), pretrained=str(out))
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), student(images))

    inferencer = ImageClassificationInferencer(str(out.with_suffix(".py")), pretrained=str(out))
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = logits_on_rgb(student, rgb).softmax(-1)[0].numpy()
    bgr = rgb[..., ::-1].copy()
    mmcv.imwrite(bgr, str(tmp_path / "image.png"))
    for given in (bgr, str(tmp_path / "image.png")):
        (result,) = inferencer(given)
        np.testing.assert_array_equal(result["pred_scores"], expected)
        assert result["pred_class"] == CLASSES[expected.argmax()]
    # Three times as large: the resizing finds each pixel again.
    (result,) = inferencer(np.repeat(np.repeat(bgr, 3, 0), 3, 1))
    np.testing.assert_array_equal(result["pred_scores"], expected)


def test_digits_give_the_same_scores_as_in_the_training_code(
    tool: ModuleType, tmp_path: Path
) -> None:
    student = randomized(classifier("resnet8", 10))
    checkpoint = save(student, tmp_path / "epoch_1.pth")
    out = tmp_path / "student.pth"
    tool.main([str(distillation(tmp_path / "mskd.py")), str(checkpoint), str(out)])
    inferencer = ImageClassificationInferencer(str(out.with_suffix(".py")), pretrained=str(out))
    assert inferencer.classes == list("0123456789")

    preprocess = MODELS.build(Config.fromfile(tmp_path / "mskd.py").model.data_preprocessor)
    digits = Digits(split="test", pipeline=[{"type": "mmpretrain.PackInputs"}], indices=3)
    raw = Digits(split="test", indices=3)
    for i in range(3):
        batch = preprocess(default_collate([digits[i]]))
        with torch.no_grad():
            expected = student(batch["inputs"]).softmax(-1)[0].numpy()
        (result,) = inferencer(raw[i]["img"])
        np.testing.assert_array_equal(result["pred_scores"], expected)


@pytest.mark.parametrize("package", ["mmcv", "mmcv.transforms"])  # as pure Python configs dump it
def test_a_network_trained_alone_on_files(tool: ModuleType, tmp_path: Path, package: str) -> None:
    config = classifier("resnet18", 10) | {
        "train_cfg": {"augments": {"type": "Mixup", "alpha": 0.2}},
        "init_cfg": {"type": "Pretrained", "checkpoint": "private/pretrained.pth"},
        "pretrained": "private/older.pth",
    }
    config["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": "private/backbone.pth"}
    preprocessor = {
        "mean": [123.675, 116.28, 103.53],
        "std": [58.4, 57.1, 57.4],
        "to_rgb": True,
        "num_classes": 10,
        "batch_augments": {"augments": {"type": "Mixup", "alpha": 0.2}},
    }
    pipeline = [
        {"type": f"{package}.LoadImageFromFile"},
        {"type": "ResizeEdge", "scale": 40},
        {"type": "CenterCrop", "crop_size": 32},
        {"type": "PackInputs"},
    ]
    dataset = {"type": "CustomDataset", "data_root": "data/own", "pipeline": pipeline}
    write(
        tmp_path / "alone.py",
        model=config,
        data_preprocessor=preprocessor,
        test_dataloader={
            "batch_size": 2,
            "dataset": {"type": "RepeatDataset", "times": 2, "dataset": dataset},
        },
        test_evaluator={"type": "Accuracy"},
    )
    model = randomized(config | {"data_preprocessor": dict(preprocessor)})
    checkpoint = save(model, tmp_path / "alone.pth", prefix="", dataset_meta={"classes": CLASSES})
    out = tmp_path / "network.pth"
    tool.main([str(tmp_path / "alone.py"), str(checkpoint), str(out)])

    exported = Config.fromfile(out.with_suffix(".py"))
    assert "custom_imports" not in exported
    assert "private" not in out.with_suffix(".py").read_text()
    assert "Mixup" not in out.with_suffix(".py").read_text()
    inferencer = ImageClassificationInferencer(str(out.with_suffix(".py")), pretrained=str(out))
    bgr = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    packed = {"inputs": torch.from_numpy(bgr[4:36, 4:36].copy()).permute(2, 0, 1)[None]}
    with torch.no_grad():
        expected = model(model.data_preprocessor(packed)["inputs"]).softmax(-1)[0].numpy()
    (result,) = inferencer(bgr)
    np.testing.assert_array_equal(result["pred_scores"], expected)


def test_what_joins_batches_in_training_is_left_out(tool: ModuleType, tmp_path: Path) -> None:
    digits = {"type": "Digits", "split": "test", "pipeline": [{"type": "PackInputs"}]}
    config = write(
        tmp_path / "alone.py",
        model=classifier("ResNet18", 10),
        data_preprocessor={"type": "BatchDataPreprocessor", "mean": [1.0] * 3, "std": [2.0] * 3},
        val_dataloader={
            "dataset": {"type": "InMemoryImages", "dataset": digits},
            "collate_fn": {"type": "collate_batch"},
        },
    )
    model = randomized(classifier("ResNet18", 10))
    checkpoint = save(model, tmp_path / "alone.pth", prefix="")
    out = tmp_path / "network.pth"
    tool.main([str(config), str(checkpoint), str(out), "--image-size", "32"])
    exported = Config.fromfile(out.with_suffix(".py"))
    assert exported.data_preprocessor.type == "ClsDataPreprocessor"
    assert exported.data_preprocessor.to_rgb and "collate_fn" not in exported.test_dataloader
    assert "custom_imports" not in exported


def test_mmpretrain_loads_it_in_a_fresh_process(tool: ModuleType, tmp_path: Path) -> None:
    student = randomized(classifier("resnet8", 10))
    checkpoint = save(student, tmp_path / "epoch_1.pth")
    tool.main(
        [str(distillation(tmp_path / "mskd.py")), str(checkpoint), str(tmp_path / "student.pth")]
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.save({"images": images, "logits": student(images)}, tmp_path / "expected.pth")
    code = (
        "import torch, mmpretrain\n"
        "model = mmpretrain.get_model('student.py', pretrained='student.pth')\n"
        "expected = torch.load('expected.pth', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(expected['images']), expected['logits'])\n"
    )
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_image_size(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    student = randomized(classifier("resnet8", 10))
    checkpoint = save(student, tmp_path / "epoch_1.pth")
    config, out = distillation(tmp_path / "mskd.py"), tmp_path / "student.pth"

    def exported_pipeline(*options: str) -> list[str]:
        tool.main([str(config), str(checkpoint), str(out), "--force", *options])
        return Config.fromfile(out.with_suffix(".py")).test_dataloader.dataset.pipeline

    assert exported_pipeline()[1] == {"type": "Resize", "scale": (32, 32)}
    assert exported_pipeline("--image-size", "48")[1] == {"type": "Resize", "scale": (48, 48)}
    cfg = Config.fromfile(config)
    cfg.pop("train_dataloader")
    cfg.dump(config)
    assert capsys.readouterr().err == ""
    assert [t["type"] for t in exported_pipeline()] == ["LoadImageFromFile", "PackInputs"]
    assert "warning: images are not resized" in capsys.readouterr().err


def test_a_student_from_a_config_path(tool: ModuleType, tmp_path: Path) -> None:
    path = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"
    config = distillation(
        tmp_path / "mskd.py", architecture={"cfg_path": path, "pretrained": False}
    )
    cfg = Config.fromfile(config)
    cfg.model.architecture = {"cfg_path": path, "pretrained": False}
    backbone = {"type": "ResNet_CIFAR", "depth": 18}
    head = {"type": "LinearClsHead", "num_classes": 10, "in_channels": 512}
    student = randomized(
        {
            "type": "ImageClassifier",
            "backbone": backbone,
            "neck": {"type": "GlobalAveragePooling"},
            "head": head,
        }
    )
    checkpoint = save(student, tmp_path / "epoch_1.pth")
    tool.main([str(config), str(checkpoint), str(tmp_path / "out.pth")])
    model = get_model(str(tmp_path / "out.py"), pretrained=str(tmp_path / "out.pth"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), student(images))
    assert "mskd_plugin" not in (tmp_path / "out.py").read_text()


def test_refusals(tool: ModuleType, tmp_path: Path) -> None:
    student = randomized(classifier("resnet8", 10))
    config, out = distillation(tmp_path / "mskd.py"), tmp_path / "student.pth"
    good = save(student, tmp_path / "good.pth")

    plain = save(student, tmp_path / "plain.pth", prefix="")
    expected = (
        r"`CHECKPOINT` to be a checkpoint of the distillation in CONFIG, with keys "
        r"architecture.\*, but got .* with the keys backbone.conv1.weight"
    )
    with pytest.raises(SettingError, match=expected):
        tool.main([str(config), str(plain), str(out)])
    checkpoint = torch.load(good)
    del checkpoint["state_dict"]["architecture.head.fc.bias"]
    torch.save(checkpoint, tmp_path / "cut.pth")
    with pytest.raises(SettingError, match="1 missing keys: head.fc.bias"):
        tool.main([str(config), str(tmp_path / "cut.pth"), str(out)])
    with pytest.raises(SettingError, match="`CONFIG` to be a config file"):
        tool.main([str(tmp_path / "none.py"), str(good), str(out)])
    with pytest.raises(SettingError, match="`CONFIG` to be a config with a model"):
        tool.main([str(tmp_path / "base_mskd.py"), str(good), str(out)])
    with pytest.raises(SettingError, match=r"`OUT.pth` to be a file name that ends with .pth"):
        tool.main([str(config), str(good), str(tmp_path / "student.pt")])
    with pytest.raises(SettingError, match=r"`OUT.pth` to be another name than CONFIG's"):
        tool.main([str(config), str(good), str(tmp_path / "mskd.pth"), "--force"])
    assert not out.exists() and not out.with_suffix(".py").exists()

    out.with_suffix(".py").write_text("precious")
    with pytest.raises(
        SettingError, match=r"`OUT.pth` to be a new file, or --force to overwrite it, .*student.py'"
    ):
        tool.main([str(config), str(good), str(out)])
    assert out.with_suffix(".py").read_text() == "precious"


def test_from_any_directory_with_help_and_exit_status(tmp_path: Path) -> None:
    shown = run([sys.executable, str(TOOL), "--help"], tmp_path)
    assert shown.returncode == 0
    assert "example: python tools/export_student.py" in shown.stdout
    refused = run([sys.executable, str(TOOL), "none.py", "none.pth", "out.pth"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "error: Expected `CONFIG` to be a config file"
    )
    assert "Traceback" not in refused.stderr
