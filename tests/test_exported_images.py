"""Exported students see images as in training: normalised alike, channels in its order."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import toy
from mmengine.dataset import default_collate
from mmpretrain import ImageClassificationInferencer, get_model
from mmpretrain.registry import MODELS
from student_files import CLASSES, distillation, logits_on_rgb, randomized, save, write

import mskd_plugin  # noqa: F401  (registers the networks)
from mskd_plugin.datasets import Digits
from mskd_plugin.networks import classifier


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return toy.tool("export_student")


def test_a_student_of_mmrazors_own_normalisation(tool: ModuleType, tmp_path: Path) -> None:
    """MMRazor's configs normalise by MMEngine's ``ImgDataPreprocessor``."""
    own = {"type": "mmengine.ImgDataPreprocessor", "bgr_to_rgb": True}
    own |= {"mean": [10.0, 60.0, 110.0], "std": [50.0, 60.0, 70.0]}
    base = distillation(tmp_path / "kd.py")
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]
    files = {"type": "CustomDataset", "data_root": "data/own", "pipeline": pipeline}
    config = write(
        tmp_path / "files.py",
        _base_=[base.name],
        model={"data_preprocessor": {**own, "_delete_": True}},
        test_dataloader={"dataset": files},
    )
    student = randomized(classifier("resnet8", 10))
    checkpoint = save(student, tmp_path / "epoch_1.pth", dataset_meta={"classes": CLASSES})
    out = tmp_path / "student.pth"
    tool.main([str(config), str(checkpoint), str(out)])
    inferencer = ImageClassificationInferencer(str(out.with_suffix(".py")), pretrained=str(out))
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (result,) = inferencer(rgb[..., ::-1].copy())
    expected = logits_on_rgb(student, rgb).softmax(-1)[0].numpy()
    np.testing.assert_array_equal(result["pred_scores"], expected)


def test_a_student_of_images_that_nobody_normalises(tool: ModuleType, tmp_path: Path) -> None:
    digits = {"type": "Digits", "split": "test", "pipeline": [{"type": "PackInputs"}]}
    config = write(
        tmp_path / "alone.py",
        model=classifier("resnet8", 10),
        test_dataloader={"dataset": digits},
    )
    student = randomized(classifier("resnet8", 10))
    checkpoint, out = save(student, tmp_path / "epoch_1.pth", prefix=""), tmp_path / "student.pth"
    tool.main([str(config), str(checkpoint), str(out), "--image-size", "32"])
    model = get_model(str(out.with_suffix(".py")), pretrained=str(out))
    inferencer = ImageClassificationInferencer(model)
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = inferencer.preprocess([rgb[..., ::-1].copy()])
    given = model.data_preprocessor(next(iter(images)))["inputs"]
    assert given.equal(torch.from_numpy(rgb).permute(2, 0, 1)[None].float())


@pytest.mark.parametrize("to_rgb", [None, True, False])
def test_a_student_of_images_in_memory_that_their_pipeline_normalises(
    tool: ModuleType, tmp_path: Path, to_rgb: bool | None
) -> None:
    normalize = {"type": "mmcv.Normalize", "mean": [10.0, 60.0, 110.0], "std": [50.0, 60.0, 70.0]}
    if to_rgb is not None:
        normalize["to_rgb"] = to_rgb
    pipeline = [normalize, {"type": "PackInputs"}]
    digits = {"type": "Digits", "split": "test", "pipeline": pipeline}
    model = {**classifier("resnet8", 10), "data_preprocessor": {"to_rgb": True}}
    config = write(tmp_path / "alone.py", model=model, test_dataloader={"dataset": digits})
    student = randomized(classifier("resnet8", 10))
    checkpoint, out = save(student, tmp_path / "epoch_1.pth", prefix=""), tmp_path / "student.pth"
    tool.main([str(config), str(checkpoint), str(out), "--image-size", "32"])
    exported = get_model(str(out.with_suffix(".py")), pretrained=str(out))
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (given,) = ImageClassificationInferencer(exported).preprocess([rgb[..., ::-1].copy()])
    in_training = Digits(split="test", pipeline=pipeline).pipeline({"img": rgb})
    preprocess = MODELS.build({"type": "ClsDataPreprocessor", "to_rgb": True})
    expected = preprocess(default_collate([in_training]))["inputs"]
    assert exported.data_preprocessor(given)["inputs"].equal(expected)
