"""The connector, built through the registry, against the naive loops and torch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from oracles import decouple as naive_decouple
from seeded import random
from tolerances import assert_close
from torch import nn

import mskd_plugin
from mskd_plugin.errors import SettingError
from mskd_plugin.functional import decouple

TYPE = "MultiScaleDecouplingConnector"


def build(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return MODELS.build({"type": TYPE, **settings}).to(dtype)


def assert_regions_close(actual, expected, dtype=torch.float64):
    assert isinstance(actual, tuple)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, dtype)


def test_the_registry_gives_the_public_class():
    assert type(build()) is mskd_plugin.connectors.MultiScaleDecouplingConnector


def test_defaults_are_the_functional_ones_without_a_parameter():
    connector, feature_map = build(), random(2, 3, 7, 7)
    assert_regions_close(connector(feature_map), decouple(feature_map))
    assert list(connector.parameters()) == []


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("scales", [(1, 2, 4), [3, 1]])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_regions_equal_the_naive_means(dtype, autocast, scales, overlap):
    feature_map = random(2, 3, 7, 5).to(dtype)
    connector = build(dtype, scales=scales, overlap=overlap)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        regions = connector(feature_map)
    expected = naive_decouple(feature_map.double().tolist(), scales, overlap)
    assert_regions_close(regions, expected, autocast or dtype)


@pytest.mark.parametrize("overlap", [0.0, 0.3])
@pytest.mark.parametrize("size", [(8, 8), (7, 6)])
def test_projecting_after_pooling_equals_pooling_the_projected_map(size, overlap):
    connector = build(projector="linear", in_channels=6, out_channels=10, overlap=overlap)
    linear = connector.projector
    assert linear.bias.abs().min() > 0
    feature_map = random(2, 6, *size)
    projected_map = F.conv2d(feature_map, linear.weight[:, :, None, None], linear.bias)
    assert_regions_close(connector(feature_map), decouple(projected_map, overlap=overlap))


@pytest.mark.parametrize("hidden", [None, 7])
def test_the_mlp_is_linear_norm_relu_linear(hidden):
    connector = build(projector="mlp", in_channels=6, out_channels=10, hidden_channels=hidden)
    first, norm, _, last = connector.projector
    assert first.weight.shape == (hidden or 10, 6)
    assert last.weight.shape == (10, hidden or 10)
    feature_map = random(2, 6, 4, 4)
    for regions, pooled in zip(connector(feature_map), decouple(feature_map), strict=True):
        h = pooled @ first.weight.T + first.bias
        h = (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, correction=0, keepdim=True) + norm.eps
        ).sqrt()
        h = (h * norm.weight + norm.bias).clamp(min=0)
        assert_close(regions, h @ last.weight.T + last.bias)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_a_projector_treats_images_apart(projector):
    # Else the loss would depend on how images are spread over processes.
    connector = build(projector=projector, in_channels=6, out_channels=4).train()
    feature_map = random(5, 6, 4, 4)
    together = connector(feature_map)
    assert_regions_close(tuple(scale[:2] for scale in together), connector(feature_map[:2]))


@pytest.mark.parametrize("projector", ["none", "linear", "mlp"])
def test_gradient_of_map_and_projector(projector):
    channels = {} if projector == "none" else {"in_channels": 3, "out_channels": 4}
    connector = build(projector=projector, scales=(1, 2), **channels)
    feature_map = random(2, 3, 4, 4).requires_grad_()
    parameters = tuple(connector.parameters())

    def function(feature, *values):
        names = [name for name, _ in connector.named_parameters()]
        return torch.func.functional_call(connector, dict(zip(names, values, strict=True)), feature)

    assert torch.autograd.gradcheck(function, (feature_map, *parameters))


SETTINGS = {
    "scales": ({"scales": (1, 2)}, {}),
    "overlap": ({"overlap": 0.5}, {}),
    "projector": (
        {"projector": "mlp"},
        {"in_channels": 6, "out_channels": 6, "projector": "linear"},
    ),
    "out_channels": (
        {"out_channels": 5},
        {"in_channels": 6, "projector": "linear", "out_channels": 6},
    ),
    "hidden_channels": (
        {"hidden_channels": 9},
        {"in_channels": 6, "projector": "mlp", "out_channels": 6},
    ),
    "init_cfg": (
        {"init_cfg": {"type": "Constant", "layer": "Linear", "val": 0.5}},
        {"in_channels": 6, "projector": "linear", "out_channels": 6},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_regions(name):
    change, base = SETTINGS[name]
    feature_map = random(2, 6, 8, 8)
    results = []
    for settings in (base, {**base, **change}):
        connector = build(**settings)
        connector.init_weights()
        results.append(connector(feature_map))
    before, after = results
    assert [r.shape for r in before] != [r.shape for r in after] or any(
        (b - a).abs().max() > 1e-3 for b, a in zip(before, after, strict=True)
    )


def test_tokens_are_pooled_as_the_map_they_stand_for():
    feature_map = random(2, 6, 4, 4)
    patches = feature_map.flatten(2).transpose(1, 2)
    tokens = torch.cat([random(2, 2, 6, seed=1), patches], dim=1)
    expected = decouple(feature_map)
    assert_regions_close(build(class_tokens=2)(tokens), expected)
    assert_regions_close(build()(patches), expected)
    # Laid out as 2 x 8, the same patches have other neighbours.
    connector = build(map_size=[2, 8], scales=(1, 2))
    assert_regions_close(connector(patches), decouple(feature_map.reshape(2, 6, 2, 8), (1, 2)))


def test_pooled_vectors_pass_at_scale_1():
    vectors = random(3, 6)
    assert_regions_close(build(scales=(1,))(vectors), (vectors[:, None],))


def test_a_tuple_of_one_tensor_is_that_tensor():
    feature_map = random(2, 6, 4, 4)
    for record in ((feature_map,), [feature_map], (feature_map, None)):
        assert_regions_close(build()(record), decouple(feature_map))


def test_channels_last_gives_the_same_values_and_gradients():
    connector = build(projector="linear", in_channels=6, out_channels=5)
    grads, values = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        feature_map = random(2, 6, 7, 7).to(memory_format=memory_format).requires_grad_()
        regions = connector(feature_map)
        sum(scale.square().sum() for scale in regions).backward()
        values.append(regions)
        grads.append(feature_map.grad)
    assert_regions_close(*values)
    assert_close(*grads)


def test_a_teacher_map_of_inference_mode_can_be_projected():
    connector = build(projector="linear", in_channels=6, out_channels=5, scales=(1, 2))
    with torch.inference_mode():
        feature_map = random(2, 6, 4, 4)
    assert feature_map.is_inference()
    regions = connector(feature_map)
    assert_regions_close(regions, connector(feature_map.clone()))
    sum(scale.sum() for scale in regions).backward()
    assert connector.projector.weight.grad.abs().sum() > 0


def test_mmrazor_chains_connectors_in_a_list():
    from mmrazor.models.distillers import ConfigurableDistiller

    settings = {"type": TYPE, "scales": (1, 2)}
    conv = {"type": "ConvModuleConnector", "in_channel": 6, "out_channel": 4}
    distiller = ConfigurableDistiller(connectors={"stage4": [conv, settings]})
    chain = distiller.connectors["stage4"]
    assert isinstance(chain, nn.Sequential)
    assert [r.shape for r in chain(torch.randn(2, 6, 4, 4))] == [(2, 1, 4), (2, 4, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, r"`scales` .*distinct positive integers.* got \(\)"),
        ({"scales": (2, 2)}, r"`scales` .*distinct positive integers.* got \(2, 2\)"),
        ({"overlap": 1.0}, r"`overlap` .*\[0, 1\).* got 1.0"),
        ({"class_tokens": -1}, "`class_tokens` .*at least 0.* got -1"),
        ({"class_tokens": 1.0}, "`class_tokens` .*at least 0.* got 1.0"),
        ({"map_size": (7,)}, r"`map_size` .*two positive integers.* got \(7,\)"),
        ({"map_size": 7}, r"`map_size` .*two positive integers.* got 7"),
        ({"map_size": ()}, r"`map_size` .*two positive integers.* got \(\)"),
        ({"map_size": (True, 4)}, r"`map_size` .*two positive integers.* got \(True, 4\)"),
        ({"map_size": (-7, -7)}, r"`map_size` .*two positive integers.* got \(-7, -7\)"),
        *(
            ({"projector": "mlp", "in_channels": 6, "out_channels": 5, name: value}, told)
            for name in ("in_channels", "out_channels", "hidden_channels")
            for value in (0, -1, 5.0, "5", True)
            for told in [rf"`{name}` .*whole number of at least 1, but got {value!r}"]
        ),
        ({"in_channels": -1}, "`in_channels` .*at least 1, but got -1"),
        ({"projector": "conv"}, r"`projector` .*'none', 'linear', 'mlp'.* got 'conv'"),
        ({"projector": "linear"}, "`in_channels and out_channels` .*'linear'.* got None and None"),
        (
            {"projector": "mlp", "in_channels": 6},
            "`in_channels and out_channels` .*'mlp'.* got 6 and None",
        ),
        (
            {"projector": "linear", "out_channels": 5},
            "`in_channels and out_channels` .*'linear'.* got None and 5",
        ),
        (
            {"in_channels": 6, "out_channels": 5},
            "`projector` .*to map 6 channels to 5, but got 'none'",
        ),
        (
            {"projector": "linear", "in_channels": 6, "out_channels": 5, "hidden_channels": 4},
            "`hidden_channels` .*'mlp', but got 4",
        ),
    ],
)
def test_malformed_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        mskd_plugin.connectors.MultiScaleDecouplingConnector(**settings)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"in_channels": 5}, (2, 6, 4, 4), "`in_channels` .*6 channels.* got 5"),
        ({"in_channels": 5}, (2, 16, 6), "`in_channels` .*6 channels.* got 5"),
        ({}, (2, 6, 3, 3), "`scales` .*scale 4 for a side of 3"),
        ({}, (2, 6), "`scales` .*scale 2 for a side of 1"),
        ({}, (2, 17, 6), "`class_tokens` .*0 of 17 tokens"),
        ({"map_size": (4, 4)}, (2, 17, 6), r"`map_size` .*17 patch tokens.* got \(4, 4\)"),
        ({}, (2, 6, 4, 4, 4), r"`feature_map` .*shape \(2, 6, 4, 4, 4\)"),
    ],
)
def test_maps_that_do_not_fit(settings, shape, message):
    with pytest.raises(SettingError, match=message):
        build(**settings)(random(*shape))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ((torch.zeros(1, 2, 4, 4),) * 2, "`data_idx` .*one tensor.* 2 tensors"),
        ((), "`data_idx` .*one tensor.* 0 tensors"),
        (None, "`feature` .*a tensor or a tuple.* got NoneType"),
        ({"x": torch.zeros(1, 2, 4, 4)}, "`feature` .*a tensor or a tuple.* got dict"),
    ],
)
def test_records_that_hold_no_single_tensor(record, message):
    with pytest.raises(SettingError, match=message):
        build()(record)


def test_its_text_shows_the_settings():
    assert "scales=(1, 2), overlap=0.5" in repr(build(scales=[1, 2], overlap=0.5))
