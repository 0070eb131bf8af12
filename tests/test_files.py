"""What is written takes the place of a file once it is whole."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config

from mskd_plugin.comparison import note_recipe, read_recipe
from mskd_plugin.files import write_json, written_whole
from mskd_plugin.networks import classifier

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch):
    """Let whatever is written end after its first half."""

    def cut(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise FULL

    def write_text(path, text, *_, **__):
        cut(path, text.encode())

    def fill():
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(torch, "save", lambda _, path: cut(path, b"weights"))
        monkeypatch.setattr(Config, "dump", lambda _, path: cut(path, b"model = dict()"))

    return fill


def test_the_new_content_comes_with_the_end(tmp_path):
    path, seen = tmp_path / "new" / "a.json", []
    for content in ("first", "second"):
        with written_whole(path) as file:
            assert file.name == path.name
            seen.append(path.exists() and path.read_text())
            file.write_text(content)
        assert path.read_text() == content and os.listdir(path.parent) == ["a.json"]
    assert seen == [False, "first"]


def test_json_is_written_into_a_new_folder(tmp_path):
    file = tmp_path / "new" / "folder" / "figures.json"
    for figures in ([{"ms": 1.5}], {"ms": 2}):  # the second time in the first's place
        write_json(figures, file)
        assert json.loads(file.read_text()) == figures


def test_the_same_content_is_the_same_file(tmp_path):
    # torch.save puts the file's name into the file.
    contents = []
    for folder in ("a", "b"):
        with written_whole(tmp_path / folder / "weights.pth") as file:
            torch.save({"weight": torch.arange(3.0)}, file)
        contents.append((tmp_path / folder / "weights.pth").read_bytes())
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "weights.pth")
    assert contents == 2 * [(tmp_path / "weights.pth").read_bytes()]


def test_what_was_there_outlives_a_full_disk(tmp_path, full_disk):
    path = tmp_path / "a.json"
    path.write_text("precious")
    full_disk()
    with pytest.raises(OSError, match="No space"), written_whole(path) as file:
        file.write_text("another")
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["a.json"]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    with written_whole(link) as file:
        file.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written_whole(pipe) as file:
        file.write_text("streamed")
    assert os.read(reader, 100) == b"streamed" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with written_whole(path) as file:
        assert file == path


def test_recipes_and_figures_outlive_a_full_disk(tmp_path, full_disk):
    note_recipe(tmp_path, {"config": "first"})
    write_json([1.5], tmp_path / "figures.json")
    full_disk()
    with pytest.raises(OSError, match="No space"):
        note_recipe(tmp_path, {"config": "second"})
    with pytest.raises(OSError, match="No space"):
        write_json([2.5], tmp_path / "figures.json")
    assert read_recipe(tmp_path) == {"config": "first"}
    assert json.loads((tmp_path / "figures.json").read_text()) == [1.5]


@pytest.mark.parametrize("name", ["convert_teacher", "export_student"])
def test_outputs_of_tools_outlive_a_full_disk(tmp_path, full_disk, name):
    source, out = tmp_path / "resnet20.pth", tmp_path / "out.pth"
    model = toy.MODELS.build(
        classifier("resnet20", {"convert_teacher": 100, "export_student": 10}[name])
    )
    torch.save({"state_dict": model.state_dict()}, source)
    student = toy.ROOT / "configs" / "demo" / "teacher_resnet20_digits.py"
    argv = {
        "convert_teacher": [str(source), str(out), "--net", "resnet20"],
        "export_student": [str(student), str(source), str(out)],
    }[name]
    outputs = [out] if name == "convert_teacher" else [out, out.with_suffix(".py")]
    for path in outputs:
        path.write_text("precious")
    full_disk()
    with pytest.raises(OSError, match="No space"):
        toy.tool(name).main([*argv, "--force"])
    assert [path.read_text() for path in outputs] == ["precious"] * len(outputs)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in [*outputs, source])
