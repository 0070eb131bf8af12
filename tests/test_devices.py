"""What runs on a GPU, followed on a machine without one: shapes, types and devices alone."""

from __future__ import annotations

import os

import needs
import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from mmrazor.models.task_modules.recorder.param_recorder import ParameterRecorder
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mskd_plugin.data_preprocessor import BatchDataPreprocessor
from mskd_plugin.datasets import Digits, InMemoryImages
from mskd_plugin.functional import contrastive, decoupling
from mskd_plugin.functional.constants import kept
from mskd_plugin.launch import use_method
from mskd_plugin.losses import MultiScaleContrastiveLoss

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None, reason="torch for CPUs alone does not know CUDA's devices"
    ),
    needs.torch_2_9,  # older torch looks for a GPU to move tensors without numbers to
]
#: Methods that read numbers of the device on the host, which tensors without numbers cannot give.
READING = {"crd"}


@pytest.fixture
def gpu(monkeypatch):
    """Give tensors no numbers; those of different devices cannot meet in an operation, and the
    host cannot wait for a number.
    """
    # A parameter with numbers cannot be given a tensor without.
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    # What is kept for a device would stay without numbers for those that come later.
    for module, name in ((decoupling, "_pooling_matrix"), (contrastive, "_repeated")):
        monkeypatch.setattr(module, name, kept(getattr(module, name).__wrapped__))
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_gpu(model):
    """Move an algorithm as its runner does, and tell the recorders of the new parameters."""
    model.to("cuda")
    distiller = model.distiller
    for manager, network in (
        (distiller.student_recorders, model.student),
        (distiller.teacher_recorders, model.teacher),
    ):
        for recorder in manager.recorders.values():
            if isinstance(recorder, ParameterRecorder):
                recorder.data_buffer.clear()
                recorder.prepare_from_model(network)
    return model


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("method, phase", toy.PHASES)
def test_every_method_stays_on_the_device(method, phase, inference_mode, gpu):
    model = toy.digits_pair(method, phase)
    model.teacher_inference_mode = inference_mode
    with gpu:
        batch = toy.batch()
        samples = [sample.to("cuda") for sample in batch["data_samples"]]
        images = batch["inputs"].to("cuda")
        model = to_gpu(model)
        if method in READING:
            with pytest.raises(DataDependentOutputException):
                model(images, samples, mode="loss")
            return
        losses = model(images, samples, mode="loss")
        total, logged = model.parse_losses(losses)
    assert {value.device.type for value in (total, *losses.values(), *logged.values())} == {"cuda"}
    assert total.requires_grad and total.dtype == torch.float32


@pytest.mark.parametrize("method", ["mskd", "ofa", "at"])
@pytest.mark.parametrize("pair", ["swin-t_mixer-s16", "vit-s_resnet18", "convnext-t_deit-t"])
def test_so_do_networks_of_tokens(pair, method, gpu):
    cfg = Config.fromfile(toy.ROOT / "configs" / "_base_" / "pairs" / f"{pair}_cifar100.py")
    init_default_scope(cfg.default_scope)
    cfg.pair.teacher_ckpt = None
    use_method(cfg, method)
    model = MODELS.build(cfg.model).train()
    scores = torch.nn.functional.one_hot(torch.tensor(0), cfg.pair.num_classes).float()
    sample = DataSample().set_gt_label(0).set_gt_score(scores)  # as batch augments leave it
    with gpu:
        images = torch.empty(2, 3, 224, 224, device="cuda")
        losses = to_gpu(model)(images, [sample.to("cuda")] * 2, mode="loss")
    assert {value.device.type for value in losses.values()} == {"cuda"}


@pytest.mark.skipif("MSKD_TEST_GPUS" in os.environ, reason="GPUs are asked for")
def test_no_test_runs_on_a_gpu_unasked():
    # A CPU's machine shows no more of it; a scheduler may have named GPUs of its own.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_a_tensor_left_behind_is_found(gpu):
    loss = MultiScaleContrastiveLoss()
    with gpu:
        regions = (torch.empty(4, 1, 8, device="cuda"),)
        assert loss(regions, regions).device.type == "cuda"
        with pytest.raises(RuntimeError, match="two (different )?devices"):
            loss(regions, (torch.empty(4, 1, 8),))


def test_images_in_memory_stay_on_the_device(gpu):
    dataset = Digits(pipeline=[dict(type="PackInputs")], indices=12)
    images = InMemoryImages(dataset, padding=4, flip_prob=0.5, device="cpu")
    with gpu:
        images.device = torch.device("cuda")
        images.labels, images._reaches = images.labels.to("cuda"), images._reaches.to("cuda")
        batch = images.__getitems__([3, 1, 2])
        assert batch["data_samples"][0].gt_label.device.type == "cuda"
        assert batch["inputs"].device.type == "cuda"
        preprocessor = BatchDataPreprocessor(mean=[1.0] * 3, std=[2.0] * 3).to("cuda")
        normalised = preprocessor(batch, training=True)["inputs"]
    assert normalised.device.type == "cuda" and normalised.shape == (3, 3, 32, 32)
