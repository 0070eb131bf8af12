"""Every pair with every method: built, or refused when the config is made."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mskd_plugin.errors import SettingError
from mskd_plugin.launch import load_config, use_method
from mskd_plugin.networks import NETWORKS
from mskd_plugin.recipes import METHODS

ROOT = Path(__file__).resolve().parent.parent
#: That of timm's networks is in test_timm_networks.py, since timm need not be installed.
PAIRS = sorted(
    file for file in (ROOT / "configs" / "_base_" / "pairs").glob("*.py") if "timm" not in file.stem
)
#: FSP multiplies maps of neighbouring stages, so both networks need the same channels.
WITHOUT_FSP = {
    "resnet32x4_shufflev1_cifar100",
    "resnet32x4_shufflev2_cifar100",
    "resnet50_mobilenet-v1_imagenet",
    "resnet50_mobilenetv2_cifar100",
    "resnet50_vgg8_cifar100",
    "vgg13_mobilenetv2_cifar100",
    "wrn-40-2_shufflev1_cifar100",
    "wrn-40-2_wrn-40-1_cifar100",
}
#: Transformers and MLPs, whose stages are tokens; what compares maps lays those out as one.
OF_TOKENS = {"deit-t", "mixer-b16", "mixer-s16", "swin-t", "vit-s"}
#: Networks without a ReLU at the ends of their stages: all of tokens, and ConvNeXt.
WITHOUT_RELU = OF_TOKENS | {"convnext-t"}
#: Networks whose classifier reads something other than the average of the last map.
NOT_POOLED = {"convnext-t", "deit-t", "vit-s"}
#: Methods of values before the ReLU, those that classify regions, and those that read the images'
#: classes, which mixed images have not.
OF_RELU, OF_REGIONS = {"ab", "ofd", "reviewkd"}, {"sdd_dkd", "sdd_kd", "sdd_nkd"}
OF_CLASSES = {"crd", "dkd", "nkd", "wsld"} | {"sdd_dkd", "sdd_kd", "sdd_nkd"}


def refused_for(pair: str) -> set[str]:
    """What a pair cannot do, from its name, ``<teacher>_<student>_<data>``."""
    teacher, student, _ = pair.rsplit("_", 2)
    names = {teacher, student}
    refused = {"fsp"} if pair in WITHOUT_FSP or names & WITHOUT_RELU else set()
    if names & WITHOUT_RELU:
        refused |= OF_RELU
    if names & NOT_POOLED:
        refused |= OF_REGIONS
    if student in WITHOUT_RELU:  # trained with mixup and cutmix
        refused |= OF_CLASSES
    return refused


def pair_config(file: Path) -> Config:
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    cfg.pair.teacher_ckpt = None
    # CRD's two memories of ImageNet's images would take gigabytes.
    cfg.pair.settings = cfg.pair.get("settings", {})
    cfg.pair.settings.crd = {**cfg.pair.settings.get("crd", {}), "num_images": 100}
    return cfg


@pytest.mark.parametrize("file", PAIRS, ids=lambda file: file.stem)
def test_every_method_builds_for_the_pair(file, monkeypatch):
    base = pair_config(file)
    # Backbones of mmpretrain compute with tensors while it is built, which the meta device cannot.
    names = {base.pair.teacher, base.pair.student}
    on_cpu = "ResNet50" in names or any(NETWORKS[name].num_classes == 1000 for name in names)
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        monkeypatch.setattr(kind, "reset_parameters", lambda module: None)  # nothing is computed
    refused = set()
    for name in METHODS:
        cfg = base.copy()
        try:
            use_method(cfg, name)
        except SettingError as error:
            assert base.pair.student in str(error) and base.pair.teacher in str(error)
            refused.add(name)
            continue
        with torch.device("cpu" if on_cpu else "meta"):
            model = MODELS.build(cfg.model)
        losses = set(model.distiller.distill_losses)
        assert losses and losses == set(model.distiller.loss_forward_mappings)
        assert not any(p.requires_grad for p in model.teacher.parameters())
        in_two_phases = type(model).__name__ == "TwoPhaseDistill"
        assert in_two_phases == (name in ("ab", "fsp", "ft"))
    assert refused == refused_for(file.stem)


def test_what_is_said_of_pairs_is_said_of_pairs_that_exist():
    stems = {file.stem for file in PAIRS}
    assert stems >= WITHOUT_FSP
    assert set(METHODS) >= OF_RELU | OF_REGIONS | OF_CLASSES | {"fsp"}
    named = {name for stem in stems for name in stem.rsplit("_", 2)[:2]}
    assert named >= OF_TOKENS | WITHOUT_RELU | NOT_POOLED
    tokens = {name for name, net in NETWORKS.items() if net.tokens}
    assert {name.replace("-", "_") for name in OF_TOKENS} == tokens
    pooled = {name for name, net in NETWORKS.items() if net.final_is_pooled}
    assert {name.replace("-", "_") for name in NOT_POOLED} == set(NETWORKS) - pooled


@pytest.mark.parametrize(
    "pair, built",
    [("swin-t_resnet18", 22), ("mixer-b16_resnet18", 22), ("convnext-t_deit-t", 15),
     ("resnet50_deit-t", 15), ("resnet34_resnet18", 26)],
)  # fmt: skip
def test_how_many_of_the_26_methods_a_pair_has(pair, built):
    assert len(METHODS) - len(refused_for(f"{pair}_imagenet")) == built


def test_two_phases_change_the_schedule():
    cfg = pair_config(next(f for f in PAIRS if f.stem == "resnet32x4_resnet8x4_cifar100"))
    use_method(cfg, "ft")
    assert cfg.train_cfg.max_epochs == 270
    assert cfg.find_unused_parameters
    assert cfg.param_scheduler[-1].begin == 30


def test_methods_join():
    cfg = pair_config(next(f for f in PAIRS if f.stem == "resnet32x4_resnet8x4_cifar100"))
    use_method(cfg, "mskd+dkd")
    assert {"loss_dkd"} < set(cfg.model.distiller.distill_losses)
    assert cfg.model.architecture.head.loss.loss_weight == 1


def test_the_method_names_the_work_dir(tmp_path):
    import argparse

    options = dict(cfg_options={}, launcher="none", work_dir=None)
    file = next(f for f in PAIRS if f.stem == "resnet20_resnet8_digits")
    cfg = load_config(argparse.Namespace(config=str(file), method="mskd+kd", **options))
    assert cfg.work_dir == "work_dirs/mskd+kd_resnet20_resnet8_digits"
    with pytest.raises(SettingError, match="--method.*a pair alone"):
        load_config(argparse.Namespace(config=str(file), method=None, **options))
    with pytest.raises(SettingError, match="--method.*Did you mean 'mskd'"):
        use_method(pair_config(file), "mkd")
    with pytest.raises(SettingError, match="states a pair"):
        use_method(Config(dict(model=dict())), "mskd")
    for alone in ("student", "teacher"):
        cfg = pair_config(file)
        use_method(cfg, alone)
        assert cfg.model.backbone.depth == (8 if alone == "student" else 20)


def test_the_list_shows_what_works(capsys):
    tool = toy.tool("list_configs")
    tool.main(["--pair", "wrn-40-2_wrn"])
    printed = capsys.readouterr().out
    assert "| mskd | x | x |" in printed
    assert "| fsp | x | a |" in printed
    assert "a: Expected `pair` to be of networks with equal channels" in printed
    assert "     2: [16, 16, 32, 64] in wrn_40_1 and [16, 32, 64, 128] in wrn_40_2." in printed
    assert tool.matrix("16-2_cifar")[0] == ["wrn-40-2_wrn-16-2_cifar100"]
    tool.main(["--pair", "convnext-t_deit-t_imagenet"])
    assert "  1: " in (printed := capsys.readouterr().out) and "1, 1" not in printed
    letters = list(itertools.islice(tool._letters(), 30))
    assert letters[:3] == ["a", "b", "c"] and letters[22:27] == ["w", "y", "z", "aa", "ab"]
    assert len(set(letters)) == 30 and "x" not in letters
    with pytest.raises(SettingError, match="--pair.*'nothing'"):
        tool.main(["--pair", "nothing"])
