"""Weights that a training starts from have a place in its model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toy
from safetensors.torch import save_file

from mskd_plugin import launch
from mskd_plugin.checks.resumed import check_initial_weights
from mskd_plugin.errors import SettingError


def test_initial_weights_have_a_place_in_the_model(tmp_path):
    student = toy.build().student.state_dict()
    for name, start in (("alone", ""), ("inside", "architecture.")):
        torch.save({start + key: value for key, value in student.items()}, tmp_path / name)
    cfg = toy.runner_config(tmp_path, load_from=str(tmp_path / "alone"))
    told = r"`load_from` .* with keys like architecture\.\S+, but got '.*alone' with the keys backb"
    with pytest.raises(SettingError, match=told):
        launch.build_runner(cfg)
    launch.build_runner(toy.runner_config(tmp_path, load_from=str(tmp_path / "inside")))


def initial(source, resume=False):
    """Look at the weights that a training of a wrapped network starts from."""
    network = torch.nn.DataParallel(torch.nn.Linear(2, 1))
    runner = SimpleNamespace(_resume=resume, _load_from=source, model=network)
    check_initial_weights(runner)


def test_a_part_of_the_initial_weights_is_enough(tmp_path):
    file = str(tmp_path / "start.pth")
    torch.save({"more": torch.ones(1), "bias": torch.ones(1)}, file)
    initial(file)
    torch.save({key: torch.ones(1) for key in "abcd"}, file)
    told = "`load_from` .*, with keys like weight, but got '.*start.pth' with the keys a, b, c, ..."
    with pytest.raises(SettingError, match=told):
        initial(file)


def test_initial_weights_that_cannot_be_read(tmp_path):
    file = tmp_path / "start.pth"
    file.write_bytes(b"weights")
    with pytest.raises(SettingError, match="`load_from` to be a checkpoint that torch can read"):
        initial(str(file))
    torch.save({"epoch": 3}, file)
    with pytest.raises(SettingError, match="`load_from` to be a file with weights"):
        initial(str(file))


def test_initial_weights_that_mmengine_cannot_read(tmp_path):
    file = tmp_path / "start.safetensors"
    save_file({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, file)
    with pytest.raises(SettingError, match="`load_from` to be a file that MMEngine reads"):
        initial(str(file))


def test_what_is_no_file_or_is_resumed_has_no_initial_weights(tmp_path):
    file = tmp_path / "start.pth"
    torch.save({"epoch": 3}, file)
    initial(str(file), resume=True)
    initial("s3://bucket/start.pth")
    initial(None)
