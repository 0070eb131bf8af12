"""FitNet, AT, NST, SP, CC, VID, RKD, PKT and CRD as recipes: connectors, taps, settings, steps."""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
import toy
from feature_oracles import dot
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmpretrain.structures import DataSample
from seeded import random
from tolerances import assert_close

from mskd_plugin import recipes
from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import distill
from mskd_plugin.recipes.taps import stage_pairs, stage_sides

METHODS = ("fitnet", "at", "nst", "sp", "cc", "vid", "rkd", "pkt", "crd")
PAIRS = [
    ("resnet20", "resnet8"),
    ("vgg13", "MobileNetV2"),
    ("wrn_40_2", "ShuffleV1"),
    ("ResNet50", "vgg8"),
]


def base(teacher="resnet20", student="resnet8", **pair):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=10, **pair),
        num_train_images=24,
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
    )


def batch():
    data = toy.batch(size=4)
    for index, sample in enumerate(data["data_samples"]):
        sample.set_metainfo(dict(sample_idx=2 * index))
    return data


def parts(name, *pair, **settings):
    return getattr(recipes, name)(base(*pair), **settings)


@functools.cache
def build_once(name, teacher="resnet20", student="resnet8"):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return MODELS.build(distill(base(teacher, student), parts(name, teacher, student)))


@pytest.mark.parametrize("name", METHODS)
def test_steps_lower_the_loss_of_a_batch(name):
    model, data = build_once(name), batch()
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("teacher.")
    }
    optimizer = torch.optim.Adam(trained.values(), lr=1e-3)
    values = []
    for _ in range(8):
        losses = model(**data, mode="loss")
        distilled = [value for key, value in losses.items() if key.startswith("distill.loss_")]
        assert distilled and all(value.isfinite() for value in distilled)
        loss = sum(distilled) + losses["student.loss"]
        optimizer.zero_grad()
        loss.backward()
        # Else data-parallel training stops: every parameter takes part in every step.
        assert not [name for name, parameter in trained.items() if parameter.grad is None]
        optimizer.step()
        values.append(sum(value.item() for value in distilled))
    assert values[-1] < values[0]
    assert not any(parameter.grad is not None for parameter in model.teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("teacher, student", PAIRS[1:])
def test_maps_of_other_sizes_and_channels_fit(name, teacher, student):
    losses = build_once(name, teacher, student)(**batch(), mode="loss")
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_states_settings_and_the_call_overrides_them(name):
    method = getattr(recipes, name)
    of_pair = base(settings={name: dict(loss_weight=7.0)})
    losses = method(of_pair)["distill_losses"].values()
    assert {loss["loss_weight"] for loss in losses} == {7.0}
    losses = method(of_pair, loss_weight=8.0)["distill_losses"].values()
    assert {loss["loss_weight"] for loss in losses} == {8.0}
    with pytest.raises(
        SettingError, match=rf"`pair\.settings\.{name}\.wieght` .* loss_weight.* got 7.0"
    ):
        method(base(settings={name: dict(wieght=7.0)}))


#: The CRD benchmark's settings on CIFAR-100.
PUBLISHED = {
    "fitnet": dict(loss_weight=100.0, normalize=False, div_element=True),
    "at": dict(loss_weight=1000.0, power=2),
    "nst": dict(loss_weight=50.0),
    "sp": dict(loss_weight=3000.0),
    "cc": dict(loss_weight=0.02),
    "vid": dict(loss_weight=1.0, init_variance=5.0, eps=1e-5),
    "rkd": dict(loss_weight=1.0, distance_weight=25.0, angle_weight=50.0),
    "pkt": dict(loss_weight=30000.0),
    "crd": dict(loss_weight=0.8, embedding_channels=128, num_negatives=16384, temperature=0.07,
                momentum=0.5, num_images=24),
}  # fmt: skip
STAGES = {"fitnet": [2], "at": [1, 2, 3], "nst": [1, 2, 3], "sp": [3], "vid": [1, 2, 3]}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_benchmarks(name):
    losses = parts(name)["distill_losses"]
    stages = [f"loss_{name}_stage{k}" for k in STAGES[name]] if name in STAGES else [f"loss_{name}"]
    assert list(losses) == stages
    for loss in losses.values():
        assert PUBLISHED[name].items() <= loss.items()


OTHER = {
    "stage": -1,
    "stages": (-1, -2),
    "power": 4,
    "embedding_channels": 6,
    "num_images": 99,
    "num_negatives": 9,
}


@pytest.mark.parametrize(
    "name, setting",
    [
        (name, setting)
        for name in METHODS
        for setting in list(inspect.signature(getattr(recipes, name)).parameters)[1:]
    ],
)
def test_every_setting_reaches_the_config(name, setting):
    changed = parts(name, **{setting: OTHER.get(setting, 0.123)})
    assert changed != parts(name)


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_do_not_exist_are_refused(name):
    setting = "stage" if name == "fitnet" else "stages"
    for stage in (0, 3, -4):
        with pytest.raises(
            SettingError, match=f"stages.*-3 to -1 for resnet20 and resnet8.*{stage}"
        ):
            parts(name, **{setting: stage if name == "fitnet" else (stage,)})


def test_stages_pair_up_from_the_last():
    pairs = stage_pairs(base("resnet50", "resnet8"))
    assert [(pair.name, pair.student_source, pair.teacher_source) for pair in pairs] == [
        ("stage1", "backbone.layer1", "backbone.layer2"),
        ("stage2", "backbone.layer2", "backbone.layer3"),
        ("stage3", "backbone.layer3", "backbone.layer4"),
    ]
    assert (pairs[0].student_channels, pairs[0].teacher_channels) == (16, 512)


def test_methods_join():
    both = distill(base(), parts("at"), parts("rkd"), parts("crd"), parts("sp"))
    assert len(both["distiller"]["distill_losses"]) == 6


# --- sizes and regressors ----------------------------------------------------------------------


def test_sizes_of_the_stages():
    state = torch.get_rng_state()
    student, teacher = stage_sides(base("vgg13", "MobileNetV2"))
    assert student == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert teacher == [(16, 16), (8, 8), (4, 4), (4, 4)]
    assert stage_sides(base("resnet34", "resnet18"))[0] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert stage_sides(base("resnet34", "resnet8"))[0] == [(224, 224), (112, 112), (56, 56)]
    assert stage_sides(base(image_side=64))[0] == [(64, 64), (32, 32), (16, 16)]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "pair, stage, expected",
    [
        (("resnet20", "resnet8"), None, dict(resize="none", kernel_size=1)),
        (("wrn_40_2", "ShuffleV1"), None, dict(resize="double")),
        (("ShuffleV1", "wrn_40_2"), None, dict(resize="halve")),
        (("vgg13", "MobileNetV2"), -1, dict(resize="double")),
        (("ShuffleV1", "resnet8"), -3, dict(resize="halve")),
        (("MobileNetV2", "resnet8"), -1, dict(resize="none", kernel_size=7)),
    ],
)
def test_the_layer_of_fitnets_follows_from_the_sizes(pair, stage, expected):
    (connector,) = parts("fitnet", *pair, stage=stage)["connectors"].values()
    assert expected.items() <= connector.items()
    losses = build_fitnet(pair, stage)(**batch(), mode="loss")
    assert all(value.isfinite() for value in losses.values())


def build_fitnet(pair, stage):
    init_default_scope("mmpretrain")
    return MODELS.build(distill(base(*pair), parts("fitnet", *pair, stage=stage)))


def test_sizes_that_fitnets_cannot_compare_are_refused():
    with pytest.raises(
        SettingError, match="stage.*2 x 2 positions of MobileNetV2 and 8 x 8 positions of resnet8"
    ):
        parts("fitnet", "resnet8", "MobileNetV2", stage=-1)


def test_the_larger_map_of_a_student_is_pooled_before_the_regressor_of_vid():
    connectors = parts("vid", "ShuffleV1", "wrn_40_2")["connectors"]
    assert [connector["pool"] for connector in connectors.values()] == [2, 2, 2]
    connectors = parts("vid", "wrn_40_2", "ShuffleV1")["connectors"]
    assert [connector["pool"] for connector in connectors.values()] == [1, 1, 1]


def build_connector(kind, **settings):
    torch.manual_seed(0)
    return MODELS.build({"type": f"mmrazor.{kind}", **settings}).double()


def naive_convolution(image, weight, bias, stride, padding):
    """One image [C][H][W], one output channel: weight [C][kh][kw]."""
    kernel, size = len(weight[0]), len(image[0])
    out = (size + 2 * padding - kernel) // stride + 1
    return [
        [
            bias
            + math.fsum(
                image[c][top + i][left + j] * weight[c][i][j]
                for c in range(len(image))
                for i in range(kernel)
                for j in range(kernel)
                if 0 <= top + i < size and 0 <= left + j < size
            )
            for left in range(-padding, stride * out - padding, stride)
        ]
        for top in range(-padding, stride * out - padding, stride)
    ]


def naive_doubling(image, weight, bias):
    """Transposed 4 x 4 convolution of stride 2, padding 1; weight [C][4][4]."""
    size = len(image[0])
    out = [[bias] * (2 * size) for _ in range(2 * size)]
    for c, y, x in ((c, y, x) for c in range(len(image)) for y in range(size) for x in range(size)):
        for i in range(4):
            for j in range(4):
                row, column = 2 * y + i - 1, 2 * x + j - 1
                if 0 <= row < 2 * size and 0 <= column < 2 * size:
                    out[row][column] += image[c][y][x] * weight[c][i][j]
    return out


@pytest.mark.parametrize(
    "settings, kernel, side",
    [
        ({}, 1, 4),
        ({"kernel_size": 3}, 3, 2),
        ({"resize": "halve"}, 3, 2),
        ({"resize": "double"}, 4, 8),
    ],
    ids=str,
)
def test_the_regressor_of_fitnets_equals_the_naive_loops(settings, kernel, side):
    regressor = build_connector("FitNetRegressor", in_channels=2, out_channels=3, **settings)
    assert regressor.conv.weight.shape[2:] == (kernel, kernel)
    feature = random(3, 2, 4, 4, seed=1)
    weight, bias = regressor.conv.weight.tolist(), regressor.conv.bias.tolist()
    resize = settings.get("resize")
    maps = []
    for image in feature.tolist():
        for o in range(3):
            if resize == "double":  # weights of a transposed convolution: [C][O][kh][kw]
                maps.append(naive_doubling(image, [w[o] for w in weight], bias[o]))
            else:
                stride, padding = (2, 1) if resize == "halve" else (1, 0)
                maps.append(naive_convolution(image, weight[o], bias[o], stride, padding))
    out = torch.tensor(maps, dtype=torch.float64).view(3, 3, side, side)
    mean = out.mean((0, 2, 3), keepdim=True)  # of the batch: train mode
    variance = (out - mean).square().mean((0, 2, 3), keepdim=True)
    expected = ((out - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    assert_close(regressor(feature), expected)


@pytest.mark.parametrize("settings", [{}, {"pool": 2}], ids=str)
def test_the_regressor_of_vid_equals_the_naive_loops(settings):
    regressor = build_connector("VIDRegressor", in_channels=2, out_channels=3, **settings)
    pool = settings.get("pool", 1)
    assert [tuple(p.shape) for p in regressor.parameters()] == [
        (3, 2, 1, 1),
        (3, 3, 1, 1),
        (3, 3, 1, 1),
    ]
    feature = random(2, 2, 4, 4, seed=1)
    layers = [p[:, :, 0, 0].tolist() for p in regressor.parameters()]
    out = regressor(feature)
    for n in range(2):
        for y in range(4 // pool):
            for x in range(4 // pool):
                window = feature[n, :, y * pool : (y + 1) * pool, x * pool : (x + 1) * pool]
                vector = window.mean((1, 2)).tolist()
                for depth, layer in enumerate(layers):
                    vector = [dot(row, vector) for row in layer]
                    vector = [max(v, 0.0) for v in vector] if depth < 2 else vector
                assert_close(out[n, :, y, x], vector)


@pytest.mark.parametrize(
    "kind, settings, match",
    [
        ("FitNetRegressor", dict(in_channels=0), "in_channels"),
        ("FitNetRegressor", dict(out_channels=0), "out_channels"),
        ("FitNetRegressor", dict(resize="shrink"), r"resize.*one of.*'shrink'"),
        ("FitNetRegressor", dict(resize="halve", kernel_size=3), "kernel_size.*1 unless"),
        ("VIDRegressor", dict(in_channels=0), "in_channels"),
        ("VIDRegressor", dict(out_channels=0), "out_channels"),
        ("VIDRegressor", dict(pool=0), "pool"),
    ],
)
def test_settings_of_regressors_are_checked(kind, settings, match):
    with pytest.raises(SettingError, match=match):
        build_connector(kind, **{"in_channels": 2, "out_channels": 3, **settings})


def test_windows_of_vid_must_fill_the_map():
    regressor = build_connector("VIDRegressor", in_channels=2, out_channels=3, pool=3)
    with pytest.raises(SettingError, match=r"pool.*\(4, 4\).*3"):
        regressor(random(1, 2, 4, 4, seed=0))


# --- sample indices ----------------------------------------------------------------------------


def test_data_sets_give_their_indices_by_themselves():
    init_default_scope("mmpretrain")
    dataset = DATASETS.build(
        dict(type="Digits", split="train", pipeline=[dict(type="PackInputs")], indices=50)
    )
    samples = [dataset[i]["data_samples"] for i in (7, 49, 0)]
    index = build_connector("SampleIndex")(samples)
    assert index.tolist() == [7, 49, 0] and index.dtype == torch.int64


def test_a_missing_index_is_named():
    with pytest.raises(SettingError, match=r"PackInputs.meta_keys.*'sample_idx'.*\['img_path'\]"):
        build_connector("SampleIndex")([DataSample(metainfo=dict(img_path="a.png"))])


def test_crd_needs_the_number_of_images():
    without = {key: value for key, value in base().items() if key != "num_train_images"}
    with pytest.raises(SettingError, match="num_train_images.*None.*`num_images`"):
        recipes.crd(without)
    loss = recipes.crd(without, num_images=5)["distill_losses"]["loss_crd"]
    assert loss["num_images"] == 5
