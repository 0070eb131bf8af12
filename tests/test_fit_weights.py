"""The steps of reading weights, each by itself; test_weights.py reads whole files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from mmpretrain.registry import MODELS

from mskd_plugin.checkpoints.weights import _local_file, check_source, fit_weights, weights_of


def test_fitted_weights_are_complete_though_a_file_lacks_the_counts_of_batches():
    source, target = (MODELS.build(toy.classifier("student")) for _ in range(2))
    given = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    layout, fitted = fit_weights(target, given, "file", setting="teacher_ckpt")
    assert layout == "mmpretrain" and list(fitted) == list(target.state_dict())
    assert torch.equal(fitted["head.fc.weight"], source.head.fc.weight)


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
