"""Reading weights: every layout with every wrapper, and everything that must be refused."""

from __future__ import annotations

import contextlib
import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import toy
from safetensors.torch import save_file
from torch import Tensor, nn

import mskd_plugin  # noqa: F401  (registers the networks)
from mskd_plugin.checkpoints.weights import class_count, load_weights, read_checkpoint
from mskd_plugin.errors import SettingError


def plain(model: nn.Module, head: str = "fc") -> dict[str, Tensor]:
    """Return the weights as the CRD benchmark's and torchvision's networks name them."""
    return {
        key.replace("backbone.", "").replace("head.fc", head): value
        for key, value in model.state_dict().items()
    }


def distilled(student: nn.Module) -> dict[str, Tensor]:
    teacher = {f"teacher.{k}": v for k, v in toy.network("resnet14").state_dict().items()}
    connector = {"distiller.connectors.stage3.weight": torch.rand(2)}
    return {f"architecture.{k}": v for k, v in student.state_dict().items()} | teacher | connector


def with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


LAYOUTS = {
    "mmpretrain": lambda m: m.state_dict(),
    "mmrazor": distilled,
    "torchvision": plain,
    "torchvision, head classifier": lambda m: plain(m, "classifier"),
    "torchvision, head linear": lambda m: plain(m, "linear"),
    "torchvision, head classifier.0": lambda m: plain(m, "classifier.0"),
}
WRAPPINGS = {
    "plain": lambda w: w,
    "mmengine": lambda w: {"meta": {"epoch": 1}, "state_dict": w, "optimizer": {"lr": 0.1}},
    "benchmark": lambda w: {
        "epoch": 240,
        "model": w,
        "best_acc": torch.tensor(72.3),
        "optimizer": {"param_groups": [{"lr": 0.05}], "state": {}},
    },
    "net beside its name": lambda w: {"model": "resnet20", "net": w},
    "net": lambda w: {"net": w, "acc": np.float64(91.2)},
    "data parallel": lambda w: {"state_dict": with_prefix(w, "module.")},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_wrapping(layout: str, wrapping: str, tmp_path: Path) -> None:
    source, target = toy.network(seed=1), toy.network(seed=2)
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](LAYOUTS[layout](source)), path)
    assert load_weights(target, path) == layout.split(",")[0]
    assert_equal_weights(target, source)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_networks_give_their_own_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(num_classes=7).eval()
    for buffer_name, buffer in reference.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    path = tmp_path / f"{name}.pth"
    torch.save(reference.state_dict(), path)
    model = toy.network(name, num_classes=7)
    assert load_weights(model, str(path)) == "torchvision"
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_safetensors(layout: str, tmp_path: Path) -> None:
    source, target = toy.network(seed=1), toy.network(seed=2)
    path = tmp_path / "model.safetensors"
    save_file(LAYOUTS[layout](source), path)
    assert load_weights(target, str(path)) == layout.split(",")[0]
    assert_equal_weights(target, source)


@pytest.mark.parametrize("content", [b"", b"weights", b"\x10" + 7 * b"\0" + b"{}"])
def test_files_that_safetensors_cannot_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SettingError, match=r"safetensors can read, but got .*SafetensorError"):
        load_weights(toy.network(), path)
    with pytest.raises(SettingError, match=r"got '.*gone.safetensors', which is not"):
        load_weights(toy.network(), tmp_path / "gone.safetensors")


def test_safetensors_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SettingError, match=r"without safetensors.*pip install safetensors"):
        load_weights(toy.network(), path)


def test_files_of_old_torch_and_without_batch_counts(tmp_path: Path) -> None:
    source, target = toy.network(seed=1), toy.network(seed=2)
    target.state_dict()["backbone.bn1.num_batches_tracked"].fill_(5)
    weights = {k: v for k, v in plain(source).items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "old.pth"
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    assert load_weights(target, path) == "torchvision"
    for key, value in target.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, source.state_dict()[key]), key
    assert target.state_dict()["backbone.bn1.num_batches_tracked"] == 5


def test_values_keep_the_precision_of_the_model(tmp_path: Path) -> None:
    source, target = toy.network(seed=1), toy.network(seed=2)
    path = tmp_path / "half.pth"
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in plain(source).items()}, path
    )
    load_weights(target, path)
    weight = target.state_dict()["head.fc.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.state_dict()["head.fc.weight"].half().float())


def drop(key: str) -> object:
    return lambda w: {k: v for k, v in w.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("bn1.weight"), r"1 missing keys: backbone.bn1.weight\.$"),
        (drop("bn1.running_var"), r"1 missing keys: backbone.bn1.running_var\.$"),
        (drop("fc.bias"), r"1 missing keys: head.fc.bias\.$"),
        (lambda w: w | {"extra": torch.zeros(1)}, r"1 unexpected keys: backbone.extra\.$"),
        (
            lambda w: w | {"fc.weight": torch.zeros(100, 64), "fc.bias": torch.zeros(100)},
            r"2 differing shapes: head.fc.weight is \(100, 64\) instead of \(10, 64\), "
            r"head.fc.bias is \(100,\) instead of \(10,\)\.$",
        ),
        (
            lambda w: plain(toy.network("resnet20")),
            r"72 unexpected keys: backbone.layer1.1.conv1.weight, .* and 62 more\.$",
        ),
        (
            lambda w: w | {"linear.weight": torch.zeros(10, 64)},
            r"1 unexpected keys: linear.weight\.$",
        ),
        (lambda w: with_prefix(w, "student."), r"47 missing keys: .*; 56 unexpected keys: "),
    ],
)
def test_weights_that_do_not_fit(change: object, message: str, tmp_path: Path) -> None:
    target, untouched = toy.network(seed=2), toy.network(seed=2)
    path = tmp_path / "other.pth"
    torch.save({"model": change(plain(toy.network(seed=1)))}, path)
    with pytest.raises(SettingError, match=message) as error:
        load_weights(target, path)
    assert str(error.value).startswith(
        f"Expected `teacher_ckpt` to be weights of CIFARResNet (depth 8, classes 10), but got "
        f"'{path}', which read in the layout of "
    )
    assert_equal_weights(target, untouched)


def test_the_student_of_a_distillation_must_be_whole(tmp_path: Path) -> None:
    weights = distilled(toy.network(seed=1))
    del weights["architecture.head.fc.bias"]
    torch.save({"state_dict": weights}, tmp_path / "distilled.pth")
    with pytest.raises(SettingError, match="layout of mmrazor has 1 missing keys: head.fc.bias"):
        load_weights(toy.network(), tmp_path / "distilled.pth")


class Payload:
    """What a file must not hold: creating it runs code."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(__file__).with_name("ran"),)


@pytest.mark.parametrize("old_format", [False, True])
def test_files_that_could_run_code_are_refused(old_format: bool, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    content = {"model": plain(toy.network()), "best": Payload()}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(
        SettingError, match=r"holds an object of type \S+; .*torch.save\(model.state_dict"
    ):
        load_weights(toy.network(), path)
    assert not Path(__file__).with_name("ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a checkpoint that torch can read"),
        (b"<html>404</html>", "a checkpoint that torch can read"),
        (b"hello\n", r"a checkpoint that torch can read, but got .* \(Unp.* 101\)"),
        (b"PK\x03\x04 cut off", "a checkpoint that torch can read"),
        ([1, 2], "a file with a dict of weights, but got .* with a list"),
        (torch.zeros(2), "a file with a dict of weights, but got .* with a Tensor"),
        ({}, "a file with weights, plain or under one of 'state_dict', 'model', 'net'"),
        ({"epoch": 3, "optimizer": {}}, "with the keys epoch, optimizer"),
        ({"model": {"epoch": 3}}, "with the keys epoch"),
        ({0: torch.zeros(2)}, "with the keys 0"),
    ],
)
def test_files_that_are_no_checkpoints(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(SettingError, match=message):
        load_weights(toy.network(), path)


@pytest.mark.parametrize("old_format", [False, True])
def test_files_that_were_cut_off(old_format: bool, tmp_path: Path) -> None:
    path, model = tmp_path / "cut.pth", toy.network()
    torch.save(plain(model), path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for kept in range(0, len(whole), len(whole) // 90):
        path.write_bytes(whole[:kept])
        with pytest.raises(SettingError, match="a checkpoint that torch can read, but got .*cut"):
            load_weights(model, path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/", "Expected `checkpoint` to be a file, .* but got '/', which is a folder"),
        ("nowhere/teacher.pth", "Expected `checkpoint` to be a file, .* which is not there"),
        ("s3://bucket/teacher.pth", "a path, an http"),
        (
            "torchvision://resnet33",
            "the name of a torchvision model, but got 'torchvision://resnet33'",
        ),
    ],
)
def test_sources_that_do_not_exist(source: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load_weights(toy.network(), source, setting="checkpoint")


@pytest.mark.parametrize(
    "source", ["torchvision://resnet34", "torchvision://resnet34.imagenet1k_v1"]
)
def test_torchvision_names(source: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.resnet34().state_dict()
    asked = []

    def download(url: str, path: str, hash_prefix: str | None = None) -> None:
        asked.append((url, path, hash_prefix))
        torch.save(weights, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = toy.network("resnet34", num_classes=1000)
    for _ in range(2):  # the second time from the cache
        assert load_weights(model, source) == "torchvision"
    assert torch.equal(model.head.fc.weight, weights["fc.weight"])
    name = "resnet34-b627a593.pth"
    assert asked == [(f"https://download.pytorch.org/models/{name}", str(cache / name), "b627a593")]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:  # else a failing test would never end
            server.shutdown()
            thread.join()


def test_addresses_with_equal_file_names(cache: Path, tmp_path: Path) -> None:
    models = {name: toy.network(seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, model in models.items():
        (tmp_path / "site" / name).mkdir(parents=True)
        torch.save({"model": plain(model)}, tmp_path / "site" / name / "ckpt_epoch_240.pth")
    with served(tmp_path / "site") as address:
        for name, model in models.items():
            target = toy.network(seed=9)
            assert load_weights(target, f"{address}/{name}/ckpt_epoch_240.pth") == "torchvision"
            assert_equal_weights(target, model)
        with pytest.raises(
            SettingError,
            match=r"that can be downloaded, but got .*404.* A file put at .*c.pth is used",
        ):
            load_weights(toy.network(), f"{address}/c.pth")
    assert len(list(cache.glob("*/ckpt_epoch_240.pth"))) == 2


@pytest.mark.parametrize("first", [True, False], ids=["first", "other machine"])
def test_the_first_process_downloads_before_the_others_look(
    first: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    def download(url: str, path: str, hash_prefix: str | None = None) -> None:
        events.append("downloaded")
        torch.save({"epoch": 7}, path)

    module = "mskd_plugin.checkpoints.weights"
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(f"{module}.is_main_process", lambda: first)
    monkeypatch.setattr(f"{module}.barrier", lambda: events.append("all are here"))
    address = "https://example.org/teacher.pth"
    assert read_checkpoint(address, setting="teacher_ckpt") == {"epoch": 7}
    expected = ["downloaded", "all are here"]
    assert events == (expected if first else expected[::-1])


def test_class_count() -> None:
    model = toy.network(num_classes=17)
    for layout in LAYOUTS.values():
        assert class_count(layout(model)) == 17
    assert class_count({"conv1.weight": torch.zeros(1)}) is None
