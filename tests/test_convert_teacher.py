"""Converting published checkpoints: equal logits, and refusals that tell what is wrong."""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
import toy
from network_oracles import published_names
from torch import nn

from mskd_plugin.checkpoints.weights import load_weights
from mskd_plugin.errors import SettingError
from mskd_plugin.networks import NETWORKS

# One network of each kind of names, or of shapes.
FAMILIES = ["resnet20", "resnet8x4", "ResNet18", "ResNet50", "wrn_16_2", "wrn_40_2", "vgg8",
            "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2"]  # fmt: skip
TOOL = toy.ROOT / "tools" / "convert_teacher.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return toy.tool("convert_teacher")


build = functools.partial(toy.network, num_classes=100)


def benchmark_file(path: Path, name: str, **settings: int) -> nn.Module:
    """Write a file as the CRD benchmark publishes them, and return the network."""
    model = build(name, **settings)
    weights = published_names(name, model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    content = {
        "epoch": 240,
        "model": weights,
        "accuracy": torch.tensor(69.1),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path)
    return model


PUBLISHED = [name for name, net in NETWORKS.items() if net.num_classes == 100]


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, 100) for name in PUBLISHED), ("resnet8", 10), ("mobilenet_v1", 1000)],
)
def test_a_benchmark_checkpoint_round_trips(
    tool: ModuleType, name: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, converted = tmp_path / "ckpt_epoch_240.pth", tmp_path / "new" / f"{name}.pth"
    model = benchmark_file(source, name, num_classes=classes)
    tool.main([str(source), str(converted), "--net", name, "--num-classes", str(classes)])
    assert str(converted) in capsys.readouterr().out

    checkpoint = torch.load(converted, weights_only=True)
    assert {
        k: checkpoint["meta"][k] for k in ("net", "num_classes", "source", "source_layout")
    } == {
        "net": name,
        "num_classes": classes,
        "source": "ckpt_epoch_240.pth",
        "source_layout": "torchvision",
    }
    other = build(name, num_classes=classes, seed=1)
    assert load_weights(other, converted) == "mmpretrain"
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other(images), model(images))
    assert model(images).std() > 0


@pytest.mark.parametrize("torch_version", ["", "2.5.1"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_with_the_options_of_its_training(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    as_zip: bool,
) -> None:
    """As the CRD benchmark's train_teacher.py writes its last one."""
    model = build("resnet8")
    weights = published_names("resnet8", model.state_dict())
    options = argparse.Namespace(model="resnet8", learning_rate=0.05, lr_decay_epochs=[150, 180])
    source = tmp_path / "resnet8_last.pth"
    torch.save({"opt": options, "model": weights}, source, _use_new_zipfile_serialization=as_zip)
    if torch_version:
        monkeypatch.setattr(torch, "__version__", torch_version)
    tool.main([str(source), str(tmp_path / "out.pth"), "--net", "resnet8"])
    written = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    assert written.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_another_nets_file_is_refused_with_its_keys(
    tool: ModuleType, name: str, tmp_path: Path
) -> None:
    source, other = tmp_path / "ckpt.pth", FAMILIES[FAMILIES.index(name) - 1]
    benchmark_file(source, name)
    with pytest.raises(SettingError) as refusal:
        tool.main([str(source), str(tmp_path / "out.pth"), "--net", other])
    message = str(refusal.value)
    assert message.startswith(
        f"Expected `--net` to be the network of the file, {name}, but got {other!r}. With that: "
    )
    expected, found = (set(build(net).state_dict()) for net in (other, name))
    named = {n: re.findall(rf"\d+ {n}: (.*?)(?: and \d+ more|;|\.$)", message)
             for n in ("missing keys", "unexpected keys", "differing shapes")}  # fmt: skip
    assert named["missing keys"] or named["unexpected keys"] or named["differing shapes"]
    for kind, keys in (("missing keys", expected - found), ("unexpected keys", found - expected)):
        assert all(set(text.split(", ")) <= keys for text in named[kind]), kind
        count = re.search(rf"(\d+) {kind}", message)
        counted = [k for k in keys if kind[0] == "u" or not k.endswith("num_batches_tracked")]
        assert (int(count[1]) if count else 0) == len(counted), kind
    assert not (tmp_path / "out.pth").exists()


def test_a_file_cut_short_is_refused_with_its_keys(tool: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "ckpt.pth"
    benchmark_file(source, "wrn_16_1")
    checkpoint = torch.load(source, weights_only=True)
    del checkpoint["model"]["block3.layer.0.convShortcut.weight"]
    torch.save(checkpoint, source)
    with pytest.raises(
        SettingError,
        match=r"weights of CIFARWideResNet \(depth 16, width 1, classes 100\).*"
        r"1 missing keys: backbone\.block3\.layer\.0\.convShortcut\.weight",
    ):
        tool.main([str(source), str(tmp_path / "out.pth"), "--net", "wrn_16_1"])


def test_a_torchvision_file(tool: ModuleType, tmp_path: Path) -> None:
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18-f37072fd.pth")
    tool.main(
        [str(tmp_path / "resnet18-f37072fd.pth"), str(tmp_path / "out.pth"), "--net", "resnet18"]
    )
    state_dict = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert torch.equal(
        state_dict["backbone.layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"]
    )
    assert torch.equal(state_dict["head.fc.weight"], weights["fc.weight"])


def test_refusals(tool: ModuleType, tmp_path: Path) -> None:
    source, out = tmp_path / "ckpt.pth", tmp_path / "out.pth"
    benchmark_file(source, "resnet20")

    expected = (
        "`--net` to be the network of the file, resnet20, but got 'resnet32'. .*"
        "60 missing keys: backbone.layer1.3.conv1.weight"
    )
    with pytest.raises(SettingError, match=expected):
        tool.main([str(source), str(out), "--net", "resnet32"])
    with pytest.raises(SettingError, match="Did you mean 'resnet20'"):
        tool.main([str(source), str(out), "--net", "resnet-20"])
    with pytest.raises(
        SettingError, match="`--num-classes` to be 100, as the classifier in .*, but got 10"
    ):
        tool.main([str(source), str(out), "--net", "resnet20", "--num-classes", "10"])
    with pytest.raises(SettingError, match="`SRC` to be a file, .* which is not there"):
        tool.main([str(tmp_path / "none.pth"), str(out), "--net", "resnet20"])
    torch.save(torchvision.models.alexnet(num_classes=100).state_dict(), tmp_path / "alexnet.pth")
    expected = "^Expected `SRC` to be weights of CIFARResNet .*missing keys.*unexpected keys"
    with pytest.raises(SettingError, match=expected):
        tool.main([str(tmp_path / "alexnet.pth"), str(out), "--net", "resnet20"])
    ten = toy.network("resnet20", num_classes=10).state_dict()
    torch.save(ten, tmp_path / "ten.pth")
    with pytest.raises(SettingError, match="`--net` to be the network of the file, resnet20, but"):
        tool.main([str(tmp_path / "ten.pth"), str(out), "--net", "resnet32"])
    assert not out.exists()

    out.write_text("precious")
    with pytest.raises(SettingError, match="`DST` to be a new file, or --force"):
        tool.main([str(source), str(out), "--net", "resnet20"])
    assert out.read_text() == "precious"
    tool.main([str(source), str(out), "--net", "resnet20", "--force"])
    assert torch.load(out, weights_only=True)["meta"]["net"] == "resnet20"


def test_from_any_directory_with_help_and_exit_status(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")]),
    }

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    shown = call("--help")
    assert shown.returncode == 0
    assert "example: python tools/convert_teacher.py" in shown.stdout
    refused = call("none.pth", "out.pth", "--net", "resnet20")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: Expected `SRC` to be a file")
    assert "Traceback" not in refused.stderr
