"""Reading checkpoints with the restricted pickle module that torch before 2.6 needs; it runs on any
torch."""

from __future__ import annotations

import collections
import io
import os
import pickle
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import MultiStepLR, OneCycleLR

from mskd_plugin.checkpoints import plain_pickle
from mskd_plugin.checkpoints.plain_pickle import Placeholder, load_plain


@pytest.fixture
def old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1")


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def save_content(content: object) -> Path:
        path = tmp_path / "content.pth"
        torch.save(content, path, _use_new_zipfile_serialization=request.param)
        return path

    return save_content


def of_training() -> dict[str, Any]:
    """What mmengine's checkpoints consist of, with every kind of object that it writes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(1, 3)).sum().backward()
    optimizer.step()
    schedulers = [
        OneCycleLR(optimizer, eta_max=0.1, total_steps=4),
        MultiStepLR(optimizer, milestones=[2, 2]),
    ]
    return {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("a", "b")}, "seed": None},
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0, 3.0], [1, 1])}},
        "scores": [np.float32(0.5), np.float64(0.25), np.int64(3), np.bool_(True), np.arange(3)],
        "bytes": b"\xff",
    }


@pytest.mark.usefixtures("old_torch")
def test_a_training_checkpoint_gives_its_tensors_and_plain_data(save):
    written = of_training()
    read = load_plain(save(written))
    assert type(read["state_dict"]) is collections.OrderedDict
    for name, value in written["state_dict"].items():
        assert torch.equal(read["state_dict"][name], value)
    assert read["meta"] == written["meta"]
    momenta = [s["momentum_buffer"] for s in read["optimizer"]["state"].values()]
    assert torch.equal(momenta[0], written["optimizer"]["state"][0]["momentum_buffer"])
    assert read["param_schedulers"][0]["total_steps"] == 4
    beside = [
        read["bytes"],
        *read["scores"],
        read["param_schedulers"][1]["milestones"],
        *read["message_hub"]["log_scalars"].values(),
    ]
    assert [type(value) for value in beside] == [Placeholder] * 8
    assert read["param_schedulers"][0]["anneal_func"] is Placeholder


@pytest.mark.usefixtures("old_torch")
def test_all_kinds_of_tensors_and_plain_values(save):
    written = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "bfloat": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "part": torch.arange(6.0).reshape(2, 3).t()[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    plain = {
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "set": {1, 2},
        "complex": 1j,
        "nothing": (None, [], {}),
    }
    read = load_plain(save({**written, **plain}))
    for name, value in written.items():
        assert read[name].dtype is value.dtype and torch.equal(read[name], value)
    assert type(read["parameter"]) is torch.nn.Parameter
    assert {name: read[name] for name in plain} == plain
    shared = torch.zeros(2)
    one, two = load_plain(save([shared, shared[:1]]))
    one.fill_(1)
    assert two.item() == 1


@pytest.mark.usefixtures("old_torch")
def test_tensors_of_the_oldest_files(save):
    old = Call(torch._utils._rebuild_tensor, torch.arange(4.0)._typed_storage(), 1, (3,), (1,))
    assert load_plain(save(old)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("version", ["2.5.1", torch.__version__], ids=["old", "own"])
def test_tensors_of_another_device_are_read_onto_the_cpu(tmp_path, monkeypatch, version):
    path = tmp_path / "content.pth"
    torch.save(torch.arange(3.0), path, _use_new_zipfile_serialization=False)
    on_cpu, on_gpu = (b"X" + bytes([len(name), 0, 0, 0]) + name for name in (b"cpu", b"cuda:9"))
    assert path.read_bytes().count(on_cpu) == 1
    path.write_bytes(path.read_bytes().replace(on_cpu, on_gpu))
    monkeypatch.setattr(torch, "__version__", version)
    read = load_plain(path)
    assert read.tolist() == [0, 1, 2] and read.device.type == "cpu"


@pytest.mark.usefixtures("old_torch")
def test_bytes_are_placeholders(save):
    for content in (b"\xff", bytearray(b"\xff"), bytearray()):
        assert type(load_plain(save(content))) is Placeholder


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("name", ["_reconstruct", "scalar"])
def test_numbers_of_both_numpys_are_placeholders(core, name):
    stream = f"cnumpy.{core}.multiarray\n{name}\n.".encode()
    assert plain_pickle.load(io.BytesIO(stream)) is Placeholder


def test_text_is_read_in_the_encoding_that_torch_names():
    assert plain_pickle.load(io.BytesIO(b"U\x02\xc3\xa9."), encoding="utf-8") == "é"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: object):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class Own:
    pass


@pytest.mark.usefixtures("old_torch")
@pytest.mark.parametrize(
    "content",
    [
        Call(os.getenv, "HOME"),
        Call(eval, "1"),
        Call(getattr, torch.Tensor, "mean"),
        Call(getattr, torch.Size([1]), "count"),
        np.array([Call(os.getenv, "HOME")], dtype=object),
        Own(),
        torch.nn.Linear(1, 1),
        Call(torch.hub.load, "a/b"),
    ],
    ids=["getenv", "eval", "tensor", "instance", "object-array", "class", "module", "torch"],
)
def test_anything_else_is_refused(save, content):
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL [\w.]+ "):
        load_plain(save({"model": torch.zeros(1), "best": content}))


@pytest.mark.parametrize("name", ["load", "save", "compile", "hub", "Tensor", "nothing"])
def test_of_torch_itself_dtypes_alone_are_found(name):
    with pytest.raises(pickle.UnpicklingError, match=f"GLOBAL torch.{name} "):
        plain_pickle.load(io.BytesIO(b"\x80\x02ctorch\n" + name.encode() + b"\n."))
    assert plain_pickle.load(io.BytesIO(b"\x80\x02ctorch\nint8\n.")) is torch.int8
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL numpy\.int8 "):
        plain_pickle.load(io.BytesIO(b"\x80\x02cnumpy\nint8\n."))


def test_methods_are_told_with_their_owner():
    stream = pickle.dumps(Call(getattr, torch.Size, "count"), protocol=2)
    with pytest.raises(pickle.UnpicklingError, match=r"asks for 'count' of <class 'torch\.Size'>"):
        plain_pickle.load(io.BytesIO(stream))


def set_attributes(found: bytes, **attributes: object) -> bytes:
    """A stream that finds something and sets its attributes."""
    state = pickle.dumps((None, attributes), protocol=2)[2:-1]
    return b"\x80\x02" + found + state + b"b."


@pytest.mark.parametrize(
    "found",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"c__builtin__\ngetattr\n",
        b"cnumpy\ndtype\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"ctorch\nfloat32\n",
    ],
)
def test_a_file_cannot_change_what_it_finds(found):
    import torch._utils

    shared = [
        torch._utils._rebuild_tensor_v2,
        Placeholder,
        torch.Size,
        plain_pickle.Unpickler,
        plain_pickle._attribute,
    ]
    before = [dict(vars(value)) for value in shared]
    try:
        plain_pickle.load(io.BytesIO(set_attributes(found, __defaults__=(), changed=1)))
    except (AttributeError, TypeError):
        pass
    assert [dict(vars(value)) for value in shared] == before
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


@pytest.mark.parametrize("name", ["module", "method"])
def test_sources_of_modules_are_refused(name):
    stream = pickle.dumps((name, 1), protocol=2)[:-1] + b"Q."
    unpickler = plain_pickle.Unpickler(io.BytesIO(stream))
    unpickler.persistent_load = lambda saved_id: saved_id
    with pytest.raises(pickle.UnpicklingError, match=f"'{name}' is stored where weights should be"):
        unpickler.load()


def test_storages_outside_of_torch_are_refused():
    stream = pickle.dumps(("storage",), protocol=2)[:-1] + b"Q."
    with pytest.raises(pickle.UnpicklingError, match="persistent"):
        plain_pickle.load(io.BytesIO(stream))


@pytest.mark.usefixtures("old_torch")
def test_archives_with_code_are_refused(tmp_path):
    torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)).save(tmp_path / "script.pt")
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        load_plain(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        tar.add(tmp_path / "script.pt", "storages")
    with pytest.raises(pickle.UnpicklingError, match="tar archive"):
        load_plain(tmp_path / "old.tar")


@pytest.mark.usefixtures("old_torch")
@pytest.mark.parametrize("keep", [1, 40, 200, 0.5, 0.95])
def test_damaged_files(save, keep):
    path = save(of_training())
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)):
        load_plain(path)


@pytest.mark.parametrize("version", ["2.5.1", torch.__version__], ids=["old", "own"])
def test_files_without_their_end(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    path = tmp_path / "content.pth"
    content = {"weight": torch.zeros(2), "iter": 1000, "sizes": (1, 2, 3, 10**30), "lr": 0.5}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for kept in range(0, len(whole), 3):
        path.write_bytes(whole[:kept])
        with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)):
            load_plain(path)


@pytest.mark.usefixtures("old_torch")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "stream, error",
    [
        (b"K\x01Q.", "TypeError"),  # a storage's place that is a number,
        (b"]X\x07\x00\x00\x00storageaQ.", "AssertionError"),  # a list,
        (b")Q.", "IndexError"),  # empty
        (b"K\x01}X\x01\x00\x00\x00aK\x02sb.", "AttributeError"),  # a number with attributes
        (b"Ix\n.", "ValueError"),
        (b"\x8e" + b"\xff" * 8, "OverflowError"),
        (b"\x8e" + b"\xff" * 7 + b"\x0f", "MemoryError"),
    ],
)
def test_damaged_streams(tmp_path, legacy, stream, error):
    path = tmp_path / "content.pth"
    if legacy:
        before = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
        path.write_bytes(b"".join(map(pickle.dumps, before)) + b"\x80\x02" + stream)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("content/data.pkl", b"\x80\x02" + stream)
            archive.writestr("content/version", "3\n")
    with pytest.raises(pickle.UnpicklingError, match=f"^{error}: "):
        load_plain(path)


@pytest.mark.parametrize("version", ["2.6.0.dev20241015+cpu", "2.6.0a0+df5bbc09d1.nv24.12"])
def test_previews_of_torch_2_6_read_with_their_own_check(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: kwargs)
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5
        monkeypatch.setattr(torch.serialization, "safe_globals", nullcontext, raising=False)
    assert load_plain(tmp_path) == {"map_location": "cpu", "weights_only": True}


@pytest.mark.skipif(
    not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="torch before 2.6"
)
def test_newer_torch_reads_with_its_own_check(save, monkeypatch):
    read = load_plain(save(of_training()))
    assert read["message_hub"]["log_scalars"]["loss"].mean() == 2
    asked = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs))
    load_plain(save({}))
    assert asked == [{"map_location": "cpu", "weights_only": True}]
