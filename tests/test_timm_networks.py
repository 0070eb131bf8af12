"""Networks of timm by name, with a stand-in for timm: what is asked of it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import TIMMBackbone
from mmpretrain.structures import DataSample
from torch import nn

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier, network
from mskd_plugin.timm_networks import timm_network
from mskd_plugin.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "heterogeneous").glob("*_timm-*.py"))
WIDTHS = (4, 6, 8, 12, 16)


class Net(nn.Module):
    """As timm's networks are used: stages that ``feature_info`` lists, and a classifier."""

    def __init__(self, gives_maps: bool = True) -> None:
        super().__init__()
        self.num_features, self.gives_maps = WIDTHS[-1], gives_maps
        for index, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS)):
            self.add_module(f"layer{index}", nn.Conv2d(before, after, 3, stride=2, padding=1))
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"layer{i}"}
            for i, width in enumerate(WIDTHS)
        ]
        self.fc: nn.Module = nn.Linear(WIDTHS[-1], 1000)

    def reset_classifier(self, num_classes: int, global_pool: str) -> None:
        assert (num_classes, global_pool) == (0, "")
        self.fc = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(len(WIDTHS)):
            x = getattr(self, f"layer{index}")(x)
        return x if self.gives_maps else x.flatten(2).mT


@pytest.fixture
def timm(monkeypatch):
    module = ModuleType("timm")

    def create_model(model_name, pretrained=False, **settings):
        assert not pretrained
        if model_name not in ("resnet50d", "tokens"):
            raise RuntimeError(f"Unknown model ({model_name})")
        return Net(gives_maps=model_name != "tokens")

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    # Where timm is not installed, mmpretrain puts a refusal in front of the wrapper.
    plain = getattr(TIMMBackbone.__init__, "__wrapped__", TIMMBackbone.__init__)
    monkeypatch.setattr(TIMMBackbone, "__init__", plain)
    timm_network.cache_clear()
    yield module
    timm_network.cache_clear()


def test_the_stages_are_what_timm_lists(timm):
    net = network("timm:resnet50d")
    assert net.stages == tuple((f"backbone.timm_model.layer{i}", WIDTHS[i]) for i in range(1, 5))
    assert net.final == ("backbone.timm_model", 16) and net.width == 16
    init_default_scope("mmpretrain")
    model = MODELS.build(classifier("timm:resnet50d", 10)).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.backbone.timm_model(images)
    torch.testing.assert_close(model(images), model.head.fc(features.mean((2, 3))))


def test_timms_own_weights_fit(timm, tmp_path):
    init_default_scope("mmpretrain")
    own = Net()
    torch.save(own.state_dict(), tmp_path / "timm.pth")
    model = MODELS.build(classifier("timm:resnet50d", 1000))
    assert load_weights(model, tmp_path / "timm.pth") == "timm"
    images = torch.randn(1, 3, 64, 64)
    expected = own.fc(own(images).mean((2, 3)))
    torch.testing.assert_close(model.eval()(images), expected)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_pair_takes_a_step(timm, file):
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    samples = [DataSample().set_gt_label(label) for label in (3, 5)]
    losses = model(torch.randn(2, 3, 224, 224), samples, mode="loss")
    name = next(key for key in losses if key.startswith("distill.loss_"))
    losses[name].backward()
    assert losses[name] > 0
    assert model.student.backbone.layers[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.parameters())


def test_refusals(timm, monkeypatch):
    with pytest.raises(SettingError, match=r"network of timm's, but got 'timm:nothing'.*Unknown"):
        network("timm:nothing")
    with pytest.raises(SettingError, match=r"gives maps.*'timm:tokens' .*\(1, 49, 16\)"):
        network("timm:tokens")
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_network.cache_clear()
    with pytest.raises(SettingError, match=r"'timm:resnet50d' without timm.*pip install timm"):
        Config.fromfile(CONFIGS[0])
