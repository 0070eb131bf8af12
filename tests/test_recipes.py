"""Recipes: what they put into a config, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import toy
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import ClsDataPreprocessor
from mskd_by_hand import assert_loss_is_that_of_the_loops

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import alone, distill, kd, mskd


def base(teacher="resnet20", student="resnet8"):
    return dict(
        pair=dict(teacher=teacher, student=student, num_classes=10),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
    )


def losses(model):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return MODELS.build(model)(**toy.batch(), mode="loss")


def test_mskd_joins_with_kd_and_each_keeps_its_value():
    both = losses(distill(base(), mskd(base()), kd(base()), ce_weight=0.5))
    for methods in ((mskd, kd), (kd, mskd)):
        joined = distill(base(), *(method(base()) for method in methods))
        assert joined["architecture"]["head"]["loss"]["loss_weight"] == 1
    assert distill(base(), kd(base()))["architecture"]["head"]["loss"]["loss_weight"] == 0.1
    weights = {"student.loss": 0.5, "distill.loss_kd": 1, "distill.loss_mskd_stage3": 1}
    assert set(weights) <= set(both)
    alone_ = losses(distill(base(), mskd(base())))
    for name in ("student.loss", "distill.loss_mskd_stage3"):
        torch.testing.assert_close(both[name], weights[name] * alone_[name])


def test_several_stages_with_their_weights():
    model = distill(base(), mskd(base(), stages=(-1, -2), stage_weights=(1.0, 0.5), loss_weight=2))
    cfg = model["distiller"]["distill_losses"]
    assert {name: loss["loss_weight"] for name, loss in cfg.items()} == {
        "loss_mskd_stage3": 2.0,
        "loss_mskd_stage2": 1.0,
    }
    assert {"distill.loss_mskd_stage3", "distill.loss_mskd_stage2"} <= set(losses(model))


def test_networks_of_unlike_depth_pair_up_from_the_last_stage():
    parts = mskd(base(teacher="resnet50"), stages=(-1, -3))
    assert parts["student_recorders"]["stage3"]["source"] == "backbone.layer3"
    assert parts["teacher_recorders"]["stage3"]["source"] == "backbone.layer4"
    assert parts["teacher_recorders"]["stage1"]["source"] == "backbone.layer2"
    assert parts["connectors"]["stage1_student"]["out_channels"] == 512


@pytest.mark.parametrize(
    "setting",
    [dict(keep="consistent"), dict(complementary_weight=2), dict(exclude_same_class=True)],
)
def test_settings_by_class_get_what_they_read(setting):
    plain = losses(distill(base(), mskd(base())))["distill.loss_mskd_stage3"]
    changed = losses(distill(base(), mskd(base(), **setting)))["distill.loss_mskd_stage3"]
    if "exclude_same_class" in setting:  # four images of four classes: nothing to exclude
        torch.testing.assert_close(changed, plain)
    else:  # weights of 0 or 2 on some regions, whose losses are positive
        assert changed < plain if "keep" in setting else changed > plain


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(stages=(-4,)), "stages.*-3 to -1.*-4"),
        (dict(stages=(0,)), "stages"),
        (dict(stage_weights=(1, 2)), "stage_weights.*1 weights"),
        (
            dict(stages=(-2,), keep="consistent"),
            r"stages.*\(-1,\).*\(-2,\) for resnet20 to resnet8\.",
        ),
        (dict(stages=(-1, -2), complementary_weight=2.0), "stages"),
    ],
)
def test_mskd_refuses(settings, match):
    with pytest.raises(SettingError, match=match):
        mskd(base(), **settings)


def test_names_are_checked():
    with pytest.raises(SettingError, match="resnet9.*Did you mean 'resnet8"):
        mskd(base(student="resnet9"))
    with pytest.raises(SettingError, match="role.*'assistant'"):
        alone(base(), "assistant")
    with pytest.raises(SettingError, match="connectors.*two different 'stage3_student'"):
        distill(base(), mskd(base()), mskd(base(), scales=(1,)))


def test_the_normalisation_is_stated_with_its_type():
    """But for a classifier alone, which has a default."""
    pair = base()
    del pair["data_preprocessor"]["type"]
    with pytest.raises(SettingError, match=r"`data_preprocessor\.type` .* but got None"):
        distill(pair, mskd(pair))
    assert alone(pair)["data_preprocessor"]["std"] == [1.0] * 3
    pair["data_preprocessor"]["type"] = ClsDataPreprocessor  # a class has no name to put a scope to
    with pytest.raises(SettingError, match=r"`data_preprocessor\.type` .* but got <class"):
        distill(pair, mskd(pair))
    del pair["data_preprocessor"]
    for make in (alone, distill):
        with pytest.raises(SettingError, match="`data_preprocessor` to be a dict .* got None"):
            make(pair)


def test_alone_takes_either_network():
    assert alone(base())["backbone"]["depth"] == 8
    assert alone(base(), "teacher")["backbone"]["depth"] == 20
    assert alone(base())["data_preprocessor"]["std"] == [1.0] * 3


@pytest.mark.parametrize(
    "net, source, channels",
    [
        ("wrn_16_2", "backbone.relu", 128),
        ("MobileNetV2", "backbone.conv2", 1280),
        ("vgg8", "backbone.relu4", 512),
    ],
)
def test_the_last_stage_is_the_map_that_is_pooled(net, source, channels):
    parts = mskd(base(teacher=net, student=net), scales=(1, 2), complementary_weight=2)
    recorded = next(r for r in parts["teacher_recorders"].values() if r["type"] == "ModuleOutputs")
    assert recorded["source"] == source
    connector = next(c for name, c in parts["connectors"].items() if name.endswith("teacher"))
    assert connector["in_channels"] == channels
    model = distill(base(teacher=net, student=net), parts)
    init_default_scope("mmpretrain")
    assert_loss_is_that_of_the_loops(
        model, toy.batch(), scales=(1, 2), complementary_weight=2, categorized=True
    )
