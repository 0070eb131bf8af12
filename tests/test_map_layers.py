"""The layers and connectors of AB, FT and OFD, and the loss of FT's paraphraser, against naive
loops."""

from __future__ import annotations

import math

import map_oracles as oracles
import pytest
import torch
from test_map_losses import SIZE, build, lists, random, shaken, state
from tolerances import assert_close
from torch.autograd import gradcheck

from mskd_plugin.errors import SettingError


@pytest.mark.parametrize("normalized", [True, False])
def test_mmrazors_translator_is_the_published_encoder(normalized):
    module = shaken(build("Translator", in_channel=3, out_channel=2, use_bn=normalized))
    maps = random(SIZE, 3, 4, 3, seed=1)
    assert_close(module(maps), oracles.encoder(lists(maps), state(module.encoder), normalized))
    paraphraser = build("Paraphraser", in_channel=3, out_channel=2, phase="train").double()
    paraphraser.encoder.load_state_dict(module.encoder.state_dict(), strict=not normalized)
    if not normalized:
        assert_close(paraphraser(maps), module(maps))


def test_the_paraphrasers_loss_equals_the_naive_loops():
    loss = shaken(build("ParaphraserLoss", in_channels=3, factor_channels=2, loss_weight=0.5))
    factor, feature = random(SIZE, 2, 4, 3, seed=1), random(SIZE, 3, 4, 3, seed=2)
    expected = 0.5 * oracles.mean_squared(
        oracles.decoder(lists(factor), state(loss.decoder)), lists(feature)
    )
    assert_close(loss(factor, feature), expected)
    factor.requires_grad_(), feature.requires_grad_()
    loss(factor, feature).backward()
    assert factor.grad.abs().sum() > 0 and feature.grad is None
    assert gradcheck(lambda f: loss(f, feature.detach()), factor)
    # MMRazor's way to the same value.
    paraphraser = build("Paraphraser", in_channel=3, out_channel=2).double()
    paraphraser.decoder.load_state_dict(loss.decoder.state_dict())
    theirs = build("L2Loss", normalize=False, div_element=True)
    whole = theirs(paraphraser(feature), feature)
    assert_close(loss(paraphraser.encoder(feature), feature), 0.5 * whole)
    assert loss(factor[:0], feature[:0]) == 0
    # Its default weight is the published one.
    assert build("ParaphraserLoss", in_channels=3, factor_channels=2).loss_weight == 1


def test_the_paraphrasers_error_is_taken_in_float32():
    loss = build("ParaphraserLoss", in_channels=3, factor_channels=2)
    factor, feature = (random(SIZE, c, 4, 3, seed=c, dtype=torch.bfloat16) for c in (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, reconstruction = loss(factor, feature), loss.decoder(factor)
    assert value.dtype == torch.float32 and reconstruction.dtype == torch.bfloat16
    expected = oracles.mean_squared(lists(reconstruction), lists(feature))
    assert_close(value, expected, torch.float32)


@pytest.mark.parametrize(
    ("resize", "kernel_size"), [("none", 1), ("none", 2), ("halve", 1), ("double", 1)]
)
def test_abs_connector_is_a_convolution_and_a_normalisation(resize, kernel_size):
    settings = dict(in_channels=2, out_channels=3, resize=resize, kernel_size=kernel_size)
    module = shaken(build("ActivationBoundaryConnector", **settings))
    maps, params = random(SIZE, 2, 4, 6, seed=1), state(module)
    weight, bias = params["conv.weight"], params["conv.bias"]
    if resize == "double":
        convolved = oracles.transposed_convolved(lists(maps), weight, bias, padding=1, stride=2)
    else:
        halved = dict(padding=1, stride=2) if resize == "halve" else {}
        convolved = oracles.convolved(lists(maps), weight, bias, **halved)
    expected = oracles.batch_normalized(convolved, params["bn.weight"], params["bn.bias"])
    assert_close(module(maps), expected)
    assert (module(maps) < 0).any()


def test_mmrazors_conv_module_is_ofds_connector():
    module = build(
        "ConvModuleConnector", in_channel=2, out_channel=512, norm_cfg=dict(type="BN"), act_cfg=None
    )
    weight = module.conv_module.conv.weight
    # Initialised as published: normal, variance 2 / (kernel positions x output channels).
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.1)
    assert module.conv_module.conv.bias is None
    module = shaken(build("ConvModuleConnector", in_channel=2, out_channel=3, act_cfg=None,
                          norm_cfg=dict(type="BN")))  # fmt: skip
    params, maps = state(module.conv_module), random(SIZE, 2, 4, 3, seed=1)
    convolved = oracles.convolved(lists(maps), params["conv.weight"])
    expected = oracles.batch_normalized(convolved, params["bn.weight"], params["bn.bias"])
    assert_close(module(maps), expected)


@pytest.mark.parametrize("name", ["in_channels", "factor_channels"])
def test_malformed_settings_of_the_paraphraser(name):
    with pytest.raises(SettingError, match=f"`{name}`.*whole"):
        build("ParaphraserLoss", **{"in_channels": 3, "factor_channels": 2, name: 0})


@pytest.mark.parametrize(
    ("factor", "feature", "match"),
    [
        ((3, 2), (3, 3, 4, 4), "`teacher_factor`.*N, C, H, W"),
        ((3, 2, 4, 4), (3, 3), "`teacher_feature`.*N, C, H, W"),
        ((3, 2, 4, 4), (2, 3, 4, 4), "same images"),
        ((3, 3, 4, 4), (3, 3, 4, 4), "`teacher_factor`.*2 channels.*3"),
        ((3, 2, 4, 4), (3, 2, 4, 4), "`teacher_feature`.*3 channels.*2"),
    ],
)
def test_inputs_that_do_not_fit_the_paraphraser(factor, feature, match):
    loss = build("ParaphraserLoss", in_channels=3, factor_channels=2)
    with pytest.raises(SettingError, match=match):
        loss(torch.zeros(factor), torch.zeros(feature))
