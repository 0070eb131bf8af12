"""The steps of reading weights, each by itself; test_weights.py reads whole files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from mmpretrain.registry import MODELS

from mskd_plugin.checkpoints.weights import (
    _local_file,
    check_source,
    differences,
    fit_weights,
    load_weights,
    weights_of,
)
from mskd_plugin.errors import SettingError


def test_fitted_weights_are_complete_though_a_file_lacks_the_counts_of_batches():
    source, target = (MODELS.build(toy.classifier("student")) for _ in range(2))
    given = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    layout, fitted = fit_weights(target, given, "file", setting="teacher_ckpt")
    assert layout == "mmpretrain" and list(fitted) == list(target.state_dict())
    assert torch.equal(fitted["head.fc.weight"], source.head.fc.weight)


def test_what_is_no_tensor_is_not_compared():
    own = {"weight": torch.zeros(2), "state": {"a": 1}, "own": "x"}
    assert differences(own, {"weight": torch.ones(2), "state": None, "other": 3}) == ""
    told = "1 differing shapes: weight is (3,) instead of (2,)"
    assert differences(own, {"weight": torch.ones(3), "state": None}) == told


@pytest.mark.parametrize(
    "names, expected",
    [
        (["module.fc.bias", "module.bn.bias"], ["fc.bias", "bn.bias"]),
        (["module.fc.bias", "bn.bias"], ["module.fc.bias", "bn.bias"]),
    ],
)
def test_a_part_that_is_called_module_keeps_its_name(names, expected):
    weights = dict.fromkeys(names, torch.zeros(1))
    assert list(weights_of(weights, "file", setting="teacher_ckpt")) == expected


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "teacher.pth").touch()
    assert check_source("~/teacher.pth", "teacher_ckpt") == ("", str(tmp_path / "teacher.pth"))


def test_the_hash_in_a_name_is_torchvisions_alone(tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append(hash_prefix)
        Path(path).touch()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for source in ("https://example.org/net-0123abcd.pth", "torchvision://resnet34"):
        _local_file(source, "teacher_ckpt")
    assert asked == [None, "b627a593"]


def test_tables_that_a_network_computes_itself_need_not_be_loaded(tmp_path):
    arch = dict(embed_dims=4, depths=[1], num_heads=[1], extra_norm_every_n_blocks=0)
    backbone = dict(
        type="SwinTransformerV2", arch=arch, img_size=16, window_size=2, out_indices=(0,)
    )
    head = dict(type="LinearClsHead", num_classes=2, in_channels=4)
    config = dict(
        type="ImageClassifier",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=head,
    )
    source, target = (MODELS.build(config).eval() for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "swin_v2.pth")
    assert load_weights(target, tmp_path / "swin_v2.pth") == "mmpretrain"
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(target(images), source(images))


def test_a_parameter_that_a_network_drops_is_told(tmp_path):
    model = MODELS.build(toy.classifier("student"))
    torch.save(model.state_dict(), tmp_path / "student.pth")
    model._register_load_state_dict_pre_hook(lambda weights, *_: weights.pop("head.fc.weight"))
    with pytest.raises(SettingError, match="`teacher_ckpt`.*head.fc.weight, left out"):
        load_weights(model, tmp_path / "student.pth")
