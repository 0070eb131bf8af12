"""The config that a run writes into its work folder, away from everything it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import MSKD, TEACHER, call, forget_runs, scalars

from mskd_plugin.launch import use_method
from mskd_plugin.recipes import METHODS

PAIR = str(Path(MSKD).parents[1] / "_base_" / "pairs" / "resnet20_resnet8_digits.py")
IN_TWO_PHASES = f"""
_base_ = {PAIR!r}

from mskd_plugin.recipes import distill, ft, two_phases

model = distill(_base_, ft(_base_, init_epochs=1))
globals().update(two_phases(_base_, ft(_base_, init_epochs=1)))
"""
#: What the command line gives. Losses and connectors of mskd+cc are in another order by name.
RUNS = {
    "a leaf": [MSKD, "--amp", "--seed", "3"],
    "a pair with two methods": [PAIR, "--method", "mskd+kd"],
    "two methods with connectors": [PAIR, "--method", "mskd+cc"],
    "two phases": ["two_phases.py", "--seed", "4"],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("teacher")
    call("train", TEACHER, "--work-dir", work_dir, epochs=1)
    return work_dir / "epoch_1.pth"


def last_checkpoint(work_dir: Path) -> dict:
    path = Path((work_dir / "last_checkpoint").read_text())
    return torch.load(path)


@pytest.mark.parametrize("name", RUNS)
def test_a_dumped_config_trains_again_by_itself(name, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two_phases.py").write_text(IN_TWO_PHASES)
    arguments = RUNS[name]
    first, second, alone = (tmp_path / folder for folder in ("first", "second", "alone"))
    call("train", *arguments, "--work-dir", first, "--teacher", teacher)
    dumped = first / Path(arguments[0]).name
    text = dumped.read_text()
    assert "_base_" not in text and "recipes" not in text and "import " not in text

    alone.mkdir()
    moved = dumped.rename(alone / "again.py")
    Path("two_phases.py").unlink()
    monkeypatch.chdir(alone)
    forget_runs()
    toy.tool("train").main([str(moved), "--work-dir", str(second)])

    expected, got = last_checkpoint(first), last_checkpoint(second)
    assert got["meta"]["epoch"] == expected["meta"]["epoch"] == 2
    assert got["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(got["state_dict"][key], value), key
    losses = [[e["loss"] for e in scalars(run) if "loss" in e] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == len(set(losses[0])) == 4
    again = Config.fromfile(second / "again.py").to_dict()
    once = Config.fromfile(moved).to_dict()
    assert again.pop("work_dir") != once.pop("work_dir")
    assert again == once


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_dumped_config_draws_the_same_weights(method, tmp_path):
    cfg = Config.fromfile(PAIR)
    cfg.pair.settings = {"crd": {"num_images": 100}}
    use_method(cfg, method)
    cfg.dump(tmp_path / "dumped.py")
    weights = []
    for config in (cfg, Config.fromfile(tmp_path / "dumped.py")):
        init_default_scope(config.default_scope)
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        model.init_weights()
        weights.append(model.state_dict())
    first, second = weights
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
