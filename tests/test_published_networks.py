"""Checkpoints of mmpretrain's published networks in this project's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from mmengine.hub import get_config
from mmpretrain.registry import MODELS
from test_weights import assert_equal_weights, drop
from torch import nn

from mskd_plugin.checkpoints.weights import class_count, load_weights
from mskd_plugin.errors import SettingError

#: Networks of ours, and the published configs of mmpretrain that build the same.
PUBLISHED = {
    "resnet18": "resnet/resnet18_8xb32_in1k.py",
    "swin_t": "swin_transformer/swin-tiny_16xb64_in1k.py",
    "deit_t": "deit/deit-tiny_4xb256_in1k.py",
    "vit_s": "deit/deit-small_4xb256_in1k.py",
    "mixer_b16": "mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py",
    "convnext_t": "convnext/convnext-tiny_32xb128_in1k.py",
}


def published(config: str, seed: int = 1) -> nn.Module:
    """Build the model of a published config, each weight another number."""
    settings = get_config(f"mmpretrain::{config}").model
    settings.pop("train_cfg", None)
    torch.manual_seed(seed)
    model = MODELS.build(settings).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            shift = 1.0 if name.endswith("running_var") else 0.0
            value.copy_(0.05 * torch.randn(value.shape).abs() + shift)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_mmpretrains_published_networks_give_their_own_logits(name: str, tmp_path: Path) -> None:
    reference = published(PUBLISHED[name])
    torch.save({"meta": {}, "state_dict": reference.state_dict()}, tmp_path / "published.pth")
    model = toy.network(name, num_classes=1000)
    layout = load_weights(model, tmp_path / "published.pth")
    assert layout == ("mmpretrain's transformers" if name in ("deit_t", "vit_s") else "mmpretrain")
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.double()(images)
        assert expected.std() > 0
        torch.testing.assert_close(model.double()(images), expected, rtol=1e-12, atol=1e-12)
    assert class_count(reference.state_dict()) == 1000


@pytest.mark.parametrize("name", ["swin_t", "deit_t", "vit_s", "convnext_t"])
def test_mmpretrains_published_networks_drop_as_many_paths(name: str) -> None:
    reference = MODELS.build(get_config(f"mmpretrain::{PUBLISHED[name]}").model.backbone)
    rates = [
        [float(module.drop_prob) for module in backbone.modules() if hasattr(module, "drop_prob")]
        for backbone in (reference, toy.network(name, num_classes=1000).backbone)
    ]
    assert rates[0] == rates[1]


def test_a_swin_transformer_saved_by_older_versions(tmp_path: Path) -> None:
    reference, again = published(PUBLISHED["swin_t"]), published(PUBLISHED["swin_t"], seed=2)
    old = {
        key.replace("backbone.norm3.", "backbone.norm."): value
        for key, value in reference.state_dict().items()
    }
    old["backbone.stages.0.blocks.1.attn.attn_mask"] = torch.zeros(64, 49, 49)
    again.load_state_dict(old)  # mmpretrain reads it so
    assert_equal_weights(again, reference)
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    model = toy.network("swin_t", num_classes=1000)
    assert load_weights(model, tmp_path / "old.pth") == "mmpretrain's transformers"
    assert_equal_weights(model, reference)


@pytest.mark.parametrize(
    "config", [PUBLISHED["deit_t"], "t2t_vit/t2t-vit-t-14_8xb64_in1k.py", PUBLISHED["swin_t"]]
)
def test_a_model_in_mmpretrains_own_names_keeps_them(config: str, tmp_path: Path) -> None:
    """With its head for vision transformers, or a last normalisation that is called ``norm``."""
    reference, target = published(config), published(config, seed=2)
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "own.pth")
    assert load_weights(target, tmp_path / "own.pth") == "mmpretrain"
    assert_equal_weights(target, reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("head.layers.head.bias"), r"1 missing keys: head.fc.bias\.$"),
        (
            lambda w: w | {"head.layers.pre_logits.weight": torch.zeros(192, 192)},
            r"1 unexpected keys: head.layers.pre_logits.weight\.$",
        ),
        (
            lambda w: w | {"head.fc.weight": torch.zeros(1000, 192)},
            r"1 unexpected keys: head.layers.head.weight\.$",
        ),
        (
            lambda w: w | {"backbone.norm.weight": torch.zeros(192)},
            r"1 unexpected keys: backbone.norm3.weight\.$",
        ),
        (
            # Of images of another size, whose positions mmpretrain itself would resize.
            lambda w: w | {"backbone.pos_embed": torch.zeros(1, 577, 192)},
            r"1 differing shapes: backbone.pos_embed is \(1, 577, 192\) instead of \(1, 197, 192\)",
        ),
    ],
)
def test_vision_transformers_that_do_not_fit(change: object, message: str, tmp_path: Path) -> None:
    weights = published(PUBLISHED["deit_t"]).state_dict()
    target, untouched = toy.network("deit_t", 1000, seed=2), toy.network("deit_t", 1000, seed=2)
    torch.save(change(dict(weights)), tmp_path / "other.pth")
    with pytest.raises(SettingError, match=message):
        load_weights(target, tmp_path / "other.pth")
    assert_equal_weights(target, untouched)
