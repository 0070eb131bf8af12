"""The method of docs/own_method.md: its module, its config, and its commands in a short form."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import toy
from fresh_process import run_python
from tolerances import assert_close

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes import METHODS
from mskd_plugin.recipes.method import method

PAGE = (toy.ROOT / "docs" / "own_method.md").read_text()
MODULE, CONFIG = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHORT = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files, on a pair whose data and networks are small, and weights of a teacher."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(toy.ROOT / "configs")
    (folder / "tools").symlink_to(toy.ROOT / "tools")
    (folder / "my").mkdir()
    (folder / "my/gram.py").write_text(MODULE)
    config = CONFIG.replace("resnet32x4_resnet8x4_cifar100", "resnet20_resnet8_digits")
    (folder / "my/pair.py").write_text(config)
    code = (
        "import torch, mskd_plugin\n"
        "from mmpretrain.registry import MODELS\n"
        "from mskd_plugin.networks import classifier\n"
        "model = MODELS.build(classifier('resnet20', 10))\n"
        f"torch.save(dict(state_dict=model.state_dict()), {str(folder / 'resnet32x4.pth')!r})\n"
    )
    run_python(code, toy.ROOT)
    return folder


def test_each_command_works(folder):
    export, *commands = COMMANDS.splitlines()
    assert export.startswith("export PYTHONPATH=. ")
    environment = {**os.environ, "PYTHONPATH": f".{os.pathsep}{toy.ROOT}", "OMP_NUM_THREADS": "1"}
    for line in commands:
        python, tool, *words = shlex.split(line)
        assert python == "python"
        options = ["--cfg-options", *SHORT, "pair.settings.gram.loss_weight=5"]
        if tool.endswith("compare.py"):
            words = [word for word in words if word not in ("student", "kd", "mskd", "gram")]
            options = ["--seeds", "1", *options]
        command = [sys.executable, tool, *words, *options]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    results = folder / "work_dirs/compare_pair"
    top1 = json.loads((results / "results.json").read_text())
    assert list(top1) == ["gram+kd"]
    logs = [*(results / "gram+kd_seed0").glob("*/vis_data/scalars.json")]
    scalars = [json.loads(line) for line in logs[0].read_text().splitlines()]
    assert any("distill.loss_gram" in entry and "distill.loss_kd" in entry for entry in scalars)
    # The dumped config has it all and names the module.
    (dumped,) = (results / "gram+kd_seed0").glob("*.py")
    assert "type='GramLoss'" in dumped.read_text() and "'my.gram'" in dumped.read_text()
    assert "loss_weight=5" in dumped.read_text()


def test_the_loss_is_what_the_page_says(folder):
    code = (
        "import torch, mskd_plugin\n"
        "from my.gram import GramLoss\n"
        "features = [torch.tensor(rows) for rows in "
        "([[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]])]\n"
        "print(GramLoss(loss_weight=2.0)(*features).item())\n"
    )
    # The cosine of the student's two images is 0.8, of the teacher's 0; twice among four.
    value = float(run_python(code, folder, toy.ROOT).stdout)
    assert_close(value, 2.0 * 2 * 0.8**2 / 4, torch.float32)


def test_a_name_that_is_taken_is_refused(monkeypatch):
    monkeypatch.setattr("mskd_plugin.recipes.method.METHODS", dict(METHODS))

    def kd(base):
        return {}

    def teacher(base):
        return {}

    for function in (kd, teacher):
        with pytest.raises(SettingError, match=f"to be a name unlike .* got '{function.__name__}'"):
            method(function)


def test_a_module_may_be_read_again(monkeypatch):
    known: dict = {}
    monkeypatch.setattr("mskd_plugin.recipes.method.METHODS", known)
    monkeypatch.setattr("mskd_plugin.recipes.method.METHOD_SETTINGS", {})

    def mine(base, *, loss_weight: float = 1.0):
        return {}

    first, second = method(mine), method(mine)
    assert known == {"mine": second} and first is not second


def test_a_method_may_take_any_settings(monkeypatch):
    monkeypatch.setattr("mskd_plugin.recipes.method.METHODS", {})
    known: dict = {}
    for module in ("method", "pair"):
        monkeypatch.setattr(f"mskd_plugin.recipes.{module}.METHOD_SETTINGS", known)

    @method
    def mine(base, *, loss_weight=1.0, **settings):
        return {"distill_losses": {"loss_mine": {**settings, "loss_weight": loss_weight}}}

    settings = dict(mine=dict(a=1))
    pair = dict(teacher="resnet20", student="resnet8", num_classes=10, settings=settings)
    assert mine(dict(pair=pair), b=2)["distill_losses"] == {
        "loss_mine": dict(a=1, b=2, loss_weight=1.0)
    }
