"""The backbones beyond the table: other sizes, other packages' forms of the same net, and settings
that cannot work."""

from __future__ import annotations

import re

import pytest
import torch
from mmrazor.registry import MODELS as MMRAZOR_MODELS
from network_oracles import randomize, shuffle
from torch import nn

from mskd_plugin import backbones
from mskd_plugin.backbones.base import ChannelShuffle
from mskd_plugin.errors import SettingError

SMALLEST = {
    "CIFARMobileNetV2": {},
    "CIFARShuffleNetV1": {},
    "CIFARShuffleNetV2": {},
    "CIFARVGG": {"depth": 8},
    "CIFARWideResNet": {"depth": 10},
    "MobileNetV1": {},
}


def images(side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("depth", "factor"), [(16, 1), (16, 2), (40, 2)])
def test_wide_residual_networks_are_those_of_mmrazor(depth: int, factor: int) -> None:
    ours = backbones.CIFARWideResNet(depth, factor).double().eval()
    randomize(ours, seed=0)
    theirs = MMRAZOR_MODELS.build(
        {"type": "WideResNet", "depth": depth, "widen_factor": factor}
    ).double()
    renamed = {
        re.sub(r"^block(\d)\.layer", r"layer\1", key).replace("convShortcut", "downsample"): value
        for key, value in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed, strict=True)
    x = images(32).double()
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("side", "expected"), [(32, 4), (48, 6), (64, 4)])
def test_vgg_pools_a_fourth_time_at_64_rows_only(side: int, expected: int) -> None:
    (feature,) = backbones.CIFARVGG(depth=8)(images(side))
    assert feature.shape == (2, 512, expected, expected)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channel_shuffle(groups: int) -> None:
    x = torch.arange(2 * 12 * 2, dtype=torch.float64).reshape(2, 12, 2, 1)
    assert torch.equal(ChannelShuffle(groups)(x), shuffle(x, groups))


@pytest.mark.parametrize("name", SMALLEST)
def test_one_channel_and_the_registry(name: str) -> None:
    from mmpretrain.registry import MODELS

    model = MODELS.build({"type": name, "in_channels": 1, **SMALLEST[name]})
    assert type(model) is getattr(backbones, name)
    (feature,) = model(images(32, channels=1))
    feature.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.train() is model and model.eval() is model and not model.training


def test_width_and_expansion_of_mobilenet_v2() -> None:
    wide = backbones.CIFARMobileNetV2(expand_ratio=2, widen_factor=1.5)
    assert wide.conv1[0].out_channels == 48
    assert wide.blocks[1][0].conv[0].out_channels == 2 * 24
    assert wide(images(32))[0].shape == (2, 1920, 2, 2)


def test_initialisation_can_be_replaced() -> None:
    constant = {"type": "Constant", "layer": "Conv2d", "val": 0.5}
    for name, settings in SMALLEST.items():
        model = getattr(backbones, name)(**settings, init_cfg=constant)
        model.init_weights()
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all((conv.weight == 0.5).all() for conv in convs), name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CIFARWideResNet", {"depth": 18}, r"`depth` to be 6n\+4 .*got 18"),
        ("CIFARWideResNet", {"depth": 4}, r"`depth` to be 6n\+4 .*got 4"),
        ("CIFARWideResNet", {"depth": 16, "widen_factor": 0}, "`widen_factor` to be at least 1"),
        ("CIFARVGG", {"depth": 12}, "`depth` to be one of 8, 11, 13, 16, 19, but got 12"),
        ("CIFARMobileNetV2", {"expand_ratio": 0}, "`expand_ratio` to be at least 1, but got 0"),
        ("CIFARMobileNetV2", {"widen_factor": 0.05}, "`widen_factor` to be at least 1/16"),
    ],
)
def test_settings_that_cannot_work(name: str, settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        getattr(backbones, name)(**settings)
