"""The walk-through of docs/own_images.md: its config, and each of its commands, on a few images."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from tool_runs import accuracies, forget_runs, wait_for_the_next_second

PAGE = (toy.ROOT / "docs" / "own_images.md").read_text()
(CONFIG,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHORT = [
    "train_dataloader.batch_size=6",
    "train_dataloader.num_workers=0",
    "train_dataloader.dataset.pipeline.1.scale=128",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "train_cfg.max_epochs=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of three classes for training and three for validation, beside ``configs``."""
    folder = tmp_path_factory.mktemp("user")
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("daisy", "rose", "tulip"):
            images = folder / "data/flowers" / split / name
            images.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (150, 140, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{number}.jpg")
    (folder / "configs").symlink_to(toy.ROOT / "configs")
    (folder / "my").mkdir()
    (folder / "my/flowers.py").write_text(CONFIG)
    return folder


def test_each_command_works(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for line in COMMANDS.splitlines():
        python, tool, *words = shlex.split(line.replace("epoch_100", "epoch_1"))
        assert python == "python"
        name = tool.removeprefix("tools/").removesuffix(".py")
        if name in ("train", "test"):
            words += ["--cfg-options", *SHORT]
        forget_runs()
        toy.tool(name).main(words)
        wait_for_the_next_second()
    shown = capsys.readouterr().out
    assert "LR by 0.0234375" in shown  # 6 images a step, meant for 256
    found = accuracies(folder / "work_dirs/mskd+kd_flowers")[-1]
    assert f"accuracy/top1: {found:.4f}" in shown.rpartition("Epoch(test)")[2]
    weights = torch.load(folder / "flowers.pth")
    weights = weights.get("state_dict", weights)
    assert weights["head.fc.weight"].shape == (3, 512)
