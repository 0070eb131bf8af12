"""What the tools refuse before they measure, train or write: numbers out of range, files that
cannot be written, and files that would be lost."""

from __future__ import annotations

import os
import pickle
import re
import sys

import pytest
import toy
from tool_runs import DEMO, MSKD

from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError, check_output

STUDENT = str(toy.ROOT / "configs" / "cifar100" / "student_resnet8x4.py")
PAIR = str(toy.ROOT / "configs" / "_base_" / "pairs" / "resnet20_resnet8_digits.py")
STUDENT_DIGITS = str(DEMO / "student_resnet8_digits.py")
#: What each tool needs besides its options.
NEEDED = {
    "benchmark_data": [STUDENT],
    "benchmark_loss": ["--max-scale", "1"],
    "benchmark_step": [MSKD],
    "compare": [PAIR],
    "convert_teacher": ["a.pth", "b.pth", "--net", "resnet20"],
    "export_student": [MSKD, "a.pth", "b.pth"],
    "train": [MSKD],
}


@pytest.mark.parametrize(
    "name, option, least",
    [
        *(("benchmark_data", option, 1) for option in ("images", "side", "batch-size", "batches")),
        *[("benchmark_data", "turns", 2), ("benchmark_data", "workers", 0)],
        *(("benchmark_loss", option, 1) for option in ("batch-sizes", "max-scale", "channels")),
        *[("benchmark_loss", "side", 4), ("benchmark_loss", "repeats", 2)],
        *(("benchmark_step", option, 1) for option in ("batch-size", "side", "block")),
        *[("benchmark_step", "steps", 2), ("benchmark_step", "warmup", 0)],
        *(("compare", option, 1) for option in ("seeds", "jobs")),
        *[("convert_teacher", "num-classes", 1), ("export_student", "image-size", 1)],
        ("train", "seed", 0),
    ],
)
def test_a_number_that_is_too_small_is_named(name, option, least):
    parse = toy.tool(name).parse_args
    for value in (least - 1, -7):
        told = f"Expected `--{option}` to be a whole number of at least {least}, but got {value}."
        with pytest.raises(SettingError, match=re.escape(told)):
            parse([*NEEDED[name], f"--{option}", str(value)])
    kept = vars(parse([*NEEDED[name], f"--{option}", str(least)]))[option.replace("-", "_")]
    assert kept in (least, [least])


def test_each_of_several_numbers_counts():
    args = toy.tool("benchmark_data").parse_args([STUDENT, "--batch-size", "4", "8"])
    assert args.batch_size == [4, 8]
    with pytest.raises(SettingError, match="`--batch-size` .* but got 0"):
        toy.tool("benchmark_data").parse_args([STUDENT, "--batch-size", "4", "0", "8"])


def test_what_is_no_number_and_what_is_too_small_end_with_status_2(capsys, monkeypatch):
    for value in ("x", "-1"):
        monkeypatch.setattr(sys, "argv", ["benchmark_step.py", MSKD, "--steps", value])
        with pytest.raises(SystemExit) as stopped:
            run_tool(toy.tool("benchmark_step").main)
        assert stopped.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in last and "--steps" in last and value in last


# --- files to write
# --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, argv, setting",
    [
        ("benchmark_data", [STUDENT, "--images", "8", "--json", "{out}"], "--json"),
        ("benchmark_loss", ["--json", "{out}"], "--json"),
        ("benchmark_loss", ["--plot", "{out}.png"], "--plot"),
        ("benchmark_step", [MSKD, "--json", "{out}"], "--json"),
        ("convert_teacher", ["a.pth", "{out}", "--net", "resnet20", "--force"], "DST"),
        ("export_student", [MSKD, "a.pth", "{out}.pth", "--force"], "OUT.pth"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, argv, setting):
    suffix = next(arg for arg in argv if arg.startswith("{out}")).removeprefix("{out}")
    (tmp_path / "file").write_text("kept")
    (tmp_path / f"folder{suffix}").mkdir()
    for out, told in (
        ("file/new/out", rf"{tmp_path}/file', which is no folder"),
        ("folder", "which is a folder"),
    ):
        given = [arg.format(out=tmp_path / out) for arg in argv]
        with pytest.raises(SettingError, match=f"`{setting}` to be a file to write, .*{told}"):
            toy.tool(name).main(given)
    assert (tmp_path / "file").read_text() == "kept"


def test_the_config_beside_exported_weights_must_be_writable_too(tmp_path):
    (tmp_path / "out.py").mkdir()
    argv = [MSKD, "a.pth", str(tmp_path / "out.pth"), "--force"]
    with pytest.raises(SettingError, match=r"`OUT.pth` .*out\.py', which is a folder"):
        toy.tool("export_student").main(argv)


@pytest.mark.parametrize("name, argv", [("train", []), ("test", [__file__]), ("compare", [])])
def test_a_work_folder_that_is_none(tmp_path, name, argv):
    config = PAIR if name == "compare" else STUDENT_DIGITS
    (tmp_path / "file").write_text("kept")
    for folder in ("file", "file/run"):
        given = [config, *argv, "--work-dir", str(tmp_path / folder)]
        told = "`--work-dir` to be a folder to write into, .*file'.*, which is no folder"
        with pytest.raises(SettingError, match=told):
            toy.tool(name).main(given)


def test_where_nobody_may_write(tmp_path, monkeypatch):
    new = tmp_path / "new" / "out.json"
    check_output("--json", new)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(SettingError, match=rf"`--json` .*{tmp_path}', which may not be written"):
        check_output("--json", new)


def test_a_link_to_nothing_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "run", tmp_path / "run" / "new"):
        with pytest.raises(SettingError, match="`--work-dir` to be a folder .* which is no folder"):
            check_output("--work-dir", folder, folder=True)


def test_an_input_from_home_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pth").touch()
    with pytest.raises(SettingError, match="`DST` to be another name than SRC's"):
        check_output("DST", tmp_path / "a.pth", inputs={"SRC": "~/a.pth"})


def test_a_plot_that_matplotlib_does_not_write(tmp_path):
    for name in ("loss.foo", "loss"):
        with pytest.raises(SettingError, match=rf"`--plot` to be .*\.png.* but got '.*{name}'"):
            toy.tool("benchmark_loss").main(["--plot", str(tmp_path / name)])


@pytest.mark.parametrize("way", ["same", "relative", "symlink", "hard link"])
@pytest.mark.parametrize("name", ["export_student", "convert_teacher"])
def test_the_checkpoint_is_not_overwritten(tmp_path, monkeypatch, name, way):
    source, out = tmp_path / "epoch_1.pth", tmp_path / "out.pth"
    source.write_text("precious")
    monkeypatch.chdir(tmp_path)
    if way == "symlink":
        out.symlink_to(source)
    elif way == "hard link":
        out.hardlink_to(source)
    else:
        out = source if way == "same" else os.path.join("..", tmp_path.name, source.name)
    files = [str(source), str(out)]
    argv, told = {
        "export_student": ([MSKD, *files], "`OUT.pth` to be another name than CHECKPOINT's"),
        "convert_teacher": ([*files, "--net", "resnet20"], "`DST` to be another name than SRC's"),
    }[name]
    with pytest.raises(SettingError, match=told):
        toy.tool(name).main([*argv, "--force"])
    assert source.read_text() == "precious"


# --- what is read
# ----------------------------------------------------------------------------------


def test_a_checkpoint_in_the_place_of_the_config_and_a_broken_config_to_export(tmp_path):
    export = toy.tool("export_student").main
    checkpoint = tmp_path / "epoch_1.pth"
    checkpoint.touch()
    with pytest.raises(SettingError, match=r"`CONFIG` to be a file in \.py, .*epoch_1\.pth"):
        export([str(checkpoint), MSKD, str(tmp_path / "out.pth")])
    broken = tmp_path / "broken.py"
    broken.write_text("_base_ = '../_base_/gone.py'\n")
    with pytest.raises(SettingError, match=r"`CONFIG` .*broken\.py' \(.*gone\.py"):
        export([str(broken), str(checkpoint), str(tmp_path / "out.pth")])


def test_a_pair_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("pair = dict(\n")
    tool = toy.tool("list_configs")
    monkeypatch.setattr(tool, "PAIRS", tmp_path)
    with pytest.raises(SettingError, match=r"`config` .*own\.py' \(SyntaxError"):
        tool.main([])


@pytest.mark.parametrize("got", ["nothing", "an error that ends so."])
def test_a_settings_error_is_a_sentence_with_one_full_stop(got):
    stated = f"Expected `x` to be a number, but got {got.removesuffix('.')}."
    assert str(SettingError("x", "a number", got)) == stated
    assert str(SettingError("x", "a number", got, "More.")) == f"{stated} More."


def test_an_error_of_another_process_arrives_as_it_is():
    error = SettingError("scales", "no larger than the map", 4, "Give fewer.").inside("stage3")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is SettingError and str(arrived) == str(error)
    assert str(arrived.inside("connectors")).startswith("Expected `connectors.stage3.scales` to be")
