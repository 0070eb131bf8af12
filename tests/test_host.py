"""Every mend of ``mskd_plugin.host``: the failure without it, and the host with it."""

import json
import math
import sys
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import LOAD_HOST_ALONE, ROOT, run_python

from mskd_plugin import host
from mskd_plugin.requirements import installed

# ------------------------------------------------ fresh processes, with and without mends

WITHOUT = (
    LOAD_HOST_ALONE
    + """
import json, warnings
errors, seen = {}, []
def attempt(name, action):
    try:
        action()
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
def import_models():
    import mmrazor.models
def soft_cross_entropy():
    import torch
    from mmrazor.models.losses import KDSoftCELoss
    KDSoftCELoss()(torch.zeros(1, 2), torch.zeros(1, 2))
def pack():
    from mmrazor.datasets.transforms.formatting import PackCRDClsInputs
    PackCRDClsInputs()
def config():
    from mmengine.config import Config
    Config.fromstring("_base_ = 'mmcls::resnet/resnet18_8xb32_in1k.py'", ".py")
def transformer():
    import mmcv.cnn.bricks.transformer
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    attempt("models", import_models)
    host.stand_in_for_quantization()
    left = [name for name in sys.modules if name.startswith(host.QUANTIZATION)]
    attempt("models with stand-in", import_models)
    attempt("transformer", transformer)
attempt("KDSoftCELoss", soft_cross_entropy)
attempt("PackCRDClsInputs", pack)
attempt("config", config)
attempt("mmcls", lambda: __import__("mmcls"))
print(json.dumps([errors, left, [str(w.message) for w in caught]]))
"""
)
WITH = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mskd_plugin
    import mmrazor.models, mmrazor.engine, mmrazor.datasets, mmrazor.implementations
print(json.dumps([str(w.message) for w in caught]))
"""


@pytest.fixture(scope="module")
def without_mends():
    return json.loads(run_python(WITHOUT).stdout.splitlines()[-1])


def test_models_do_not_import_without_the_stand_in(without_mends):
    errors, left, _ = without_mends
    assert "is not installed properly" in errors["models"]
    assert left == [host.QUANTIZATION]
    assert "models with stand-in" not in errors


@pytest.mark.parametrize(
    "name, error",
    [
        ("KDSoftCELoss", "TypeError: get_placeholder"),
        ("PackCRDClsInputs", "ImportError: `mmcls` is not installed"),
        ("config", "ModuleNotFoundError: mmcls is not installed"),
        ("mmcls", "ModuleNotFoundError: No module named 'mmcls'"),
    ],
)
def test_mmcls_names_are_dead_without_the_alias(without_mends, name, error):
    assert without_mends[0][name].startswith(error)


def test_import_brings_all_of_mmrazor_and_no_misleading_advice(without_mends):
    with_mends = json.loads(run_python(WITH, ROOT).stdout.splitlines()[-1])
    advice = "Fail to import ``MultiScaleDeformableAttention``"
    assert not any(message.startswith(advice) for message in with_mends)
    if set(installed("mmcv")) == {"mmcv-lite"}:
        assert any(message.startswith(advice) for message in without_mends[2])


def test_preparing_twice_changes_nothing():
    from mmengine.model import MMDistributedDataParallel

    before = list(sys.meta_path), MMDistributedDataParallel.__init__
    host.prepare_host()
    host.alias_mmcls()
    assert before == (list(sys.meta_path), MMDistributedDataParallel.__init__)


# ---------------------------------------------------------------- quantization


def test_stand_in_says_what_is_missing():
    from mmrazor.structures import quantization

    assert set(quantization.BackendConfigs) == {"academic", "native", "openvino", "tensorrt"}
    assert not hasattr(quantization.QConfigHandler, "__wrapped__")  # what Python asks itself
    for use in (
        lambda: quantization.QConfigHandler({}),
        lambda: quantization.QConfigHandler.replace_fakequant,
        lambda: quantization.BackendConfigs["native"].configs,
    ):
        with pytest.raises(
            ImportError, match=rf"quantization does not import with torch {torch.__version__[:4]}"
        ):
            use()


def test_quantization_that_imports_is_kept(monkeypatch):
    working = types.ModuleType(host.QUANTIZATION)
    monkeypatch.setitem(sys.modules, host.QUANTIZATION, working)
    host.stand_in_for_quantization()
    assert sys.modules[host.QUANTIZATION] is working


# ---------------------------------------------------------------- mmcls


def test_mmcls_modules_are_those_of_mmpretrain():
    import mmcls.models.classifiers.image
    import mmpretrain
    from mmcls.datasets.transforms.formatting import PackClsInputs
    from mmcls.models import ImageClassifier
    from mmcls.structures import ClsDataSample

    assert mmcls.models.classifiers.image is mmpretrain.models.classifiers.image
    assert (
        mmpretrain.models.classifiers.image.__spec__.name == "mmpretrain.models.classifiers.image"
    )
    assert ImageClassifier is mmpretrain.models.ImageClassifier
    assert PackClsInputs is mmpretrain.datasets.PackInputs
    assert isinstance(mmpretrain.structures.DataSample(), ClsDataSample)
    with pytest.raises(ModuleNotFoundError, match=r"mmcls\.no_such"):
        import_module("mmcls.no_such")


def classifier(scope):
    return {
        "type": f"{scope}ImageClassifier",
        "backbone": {"type": f"{scope}ResNet_CIFAR", "depth": 18},
        "neck": {"type": f"{scope}GlobalAveragePooling"},
        "head": {"type": f"{scope}LinearClsHead", "num_classes": 3, "in_channels": 512},
        "data_preprocessor": {"type": f"{scope}ClsDataPreprocessor"},
    }


@pytest.mark.parametrize(
    "config",
    [classifier("mmcls."), {"_scope_": "mmcls", **classifier("")}],
    ids=["prefix", "scope"],
)
@pytest.mark.parametrize("registry", ["mmengine", "mmrazor", "mmpretrain", "mmcls"])
def test_mmcls_types_are_built_as_those_of_mmpretrain(config, registry):
    from mmpretrain.models import ClsDataPreprocessor, ImageClassifier, ResNet_CIFAR

    model = import_module(f"{registry}.registry").MODELS.build(config)
    assert type(model) is ImageClassifier
    assert type(model.backbone) is ResNet_CIFAR
    assert type(model.data_preprocessor) is ClsDataPreprocessor


@pytest.mark.filterwarnings("ignore:The current default scope")
def test_mmcls_config_paths(tmp_path):
    from mmengine.config import Config

    leaf = tmp_path / "leaf.py"
    leaf.write_text("_base_ = 'mmcls::resnet/resnet18_8xb32_in1k.py'\n")
    assert Config.fromfile(leaf).model.backbone.depth == 18
    kd = Path(import_module("mmrazor").__file__).parent / ".mim/configs/distill/mmcls"
    config = Config.fromfile(kd / "kd/kd_logits_resnet34_resnet18_8xb32_in1k.py")
    config.model.teacher_ckpt = None
    model = import_module("mmrazor.registry").MODELS.build(config.model)
    assert type(model.student).__name__ == type(model.teacher).__name__ == "ImageClassifier"


def test_soft_cross_entropy_of_mmrazor():
    from mmrazor.models.losses import KDSoftCELoss

    student, teacher = [[0.2, -1.0, 0.7], [1.5, 0.1, -0.3]], [[1.0, 0.0, -2.0], [0.3, 0.3, 2.2]]
    expected = 0.0
    for s, t in zip(student, teacher):
        log_sum = math.log(sum(math.exp(v / 2) for v in s))
        weights = [math.exp(v / 2) for v in t]
        expected += sum(w * (log_sum - v / 2) for w, v in zip(weights, s)) / sum(weights) * 4 / 2
    actual = KDSoftCELoss(tau=2.0)(torch.tensor(student), torch.tensor(teacher))
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_crd_pipeline_packs_an_image():
    from mmengine.dataset import Compose
    from mmpretrain.structures import DataSample

    pipeline = [
        {"type": "mmcls.RandomFlip", "prob": 1.0},
        {"type": "mmrazor.PackCRDClsInputs", "meta_keys": ("sample_idx", "ori_shape")},
    ]
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    packed = Compose([import_module("mmpretrain.registry").TRANSFORMS.build(t) for t in pipeline])(
        {
            "img": image,
            "gt_label": 2,
            "sample_idx": 7,
            "contrast_sample_idxs": np.array([7, 1, 3]),
            "ori_shape": (4, 5),
        }
    )
    sample = packed["data_samples"]
    assert torch.equal(packed["inputs"], torch.from_numpy(image[:, ::-1].transpose(2, 0, 1).copy()))
    assert type(sample) is DataSample and sample.gt_label.tolist() == [2]
    assert sample.sample_idx.item() == 7 and sample.contrast_sample_idxs.tolist() == [7, 1, 3]
    assert sample.ori_shape == (4, 5)


def test_installed_mmcls_is_left_alone(tmp_path):
    (tmp_path / "mmcls").mkdir()
    (tmp_path / "mmcls/__init__.py").write_text("own = True\n")
    code = LOAD_HOST_ALONE + "host.alias_mmcls()\nimport mmcls\nassert mmcls.own\n"
    run_python(code + "assert 'mmpretrain' not in sys.modules\n", tmp_path)


def test_numpy_that_takes_unequal_lists_leaves_crd_dataset_alone(monkeypatch):
    from mmrazor.datasets.crd_dataset_wrapper import CRDDataset

    before = CRDDataset._parse_fullset_contrast_info
    monkeypatch.setattr(CRDDataset, "_parse_fullset_contrast_info", before)  # put back after all
    monkeypatch.setattr(np, "__version__", "1.23.5")
    host.keep_unequal_classes()
    assert CRDDataset._parse_fullset_contrast_info is before


def test_crd_dataset_takes_unequal_classes():
    from mmrazor.datasets.crd_dataset_wrapper import CRDDataset

    labels = [0, 1, 1, 2, 2, 2]

    class Images:
        test_mode = False

        def get_gt_labels(self):
            return labels

        def __len__(self):
            return len(labels)

    crd = CRDDataset.__new__(CRDDataset)
    vars(crd).update(
        dataset=Images(), sample_mode="exact", num_classes=None, percent=1.0, neg_num=3
    )
    with pytest.raises(ValueError, match="inhomogeneous"):
        CRDDataset._parse_fullset_contrast_info.__wrapped__(crd)
    crd._parse_fullset_contrast_info()
    for label in range(3):
        others = sorted(i for i, other in enumerate(labels) if other != label)
        assert sorted(crd.cls_negative[label].tolist()) == others
    crd.dataset = types.SimpleNamespace(get_gt_labels=lambda: int("no label"))
    with pytest.raises(ValueError, match="no label"):
        crd._parse_fullset_contrast_info()
    positive, *negatives = crd._get_contrast_info({}, 1)["contrast_sample_idxs"].tolist()
    assert positive == 1 and set(negatives) <= {0, 3, 4, 5}
