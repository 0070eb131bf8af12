"""The tools from end to end, on a few digits; most of them inside this process, to be quick."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tool_runs import (
    DEMO,
    ENVIRONMENT,
    MSKD,
    TEACHER,
    TERMS,
    TOOLS,
    accuracies,
    call,
    forget_runs,
    scalars,
    scalars_of,
    shell,
    wait_for_the_next_second,
)

from mskd_plugin import cli
from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError

# --- train, resume, test, export
# -------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Train a teacher, and return its checkpoint."""
    work_dir = tmp_path_factory.mktemp("teacher")
    call("train", TEACHER, "--work-dir", work_dir)
    return work_dir / "epoch_2.pth"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher):
    """Distil for two epochs, and return the work folder."""
    work_dir = tmp_path_factory.mktemp("mskd")
    arguments = [MSKD, "--work-dir", work_dir, "--teacher", teacher, "--amp", "--seed", "1"]
    call("train", *arguments)
    return work_dir


@pytest.fixture(scope="module")
def resumed(distilled, teacher):
    """Continue the distillation for a third epoch, and return the work folder."""
    arguments = [MSKD, "--work-dir", distilled, "--teacher", teacher, "--amp", "--seed", "1"]
    wait_for_the_next_second()
    call("train", *arguments, "--resume", epochs=3)
    return distilled


def test_the_options_are_those_of_the_run(distilled, teacher):
    cfg = Config.fromfile(distilled / Path(MSKD).name)
    assert cfg.model.teacher_ckpt == str(teacher)
    assert cfg.optim_wrapper.type == "BFloat16OptimWrapper"
    assert cfg.randomness.seed == 1
    assert cfg.work_dir == str(distilled)
    assert cfg.train_dataloader.batch_size == 16


def test_a_seed_of_0_is_one_and_leaves_what_else_the_config_says_of_randomness(
    tmp_path, monkeypatch
):
    tool, given = toy.tool("train"), []
    monkeypatch.setattr(tool, "dry_run", given.append)
    options = ["--cfg-options", "randomness.diff_rank_seed=True", "randomness.seed=3"]
    tool.main([TEACHER, "--dry-run", "--seed", "0", "--work-dir", str(tmp_path), *options])
    assert given[0].randomness == dict(seed=0, diff_rank_seed=True)


def test_student_and_terms_are_logged_apart(distilled):
    first = scalars(next(iter(distilled.glob("*"))).parent)[1]  # after the teacher's accuracy
    assert first["loss"] == pytest.approx(
        first["student.loss"] + first["distill.loss_mskd_stage3"], rel=1e-5
    )
    cfg = Config.fromfile(distilled / Path(MSKD).name)
    weight = cfg.model.distiller.distill_losses.loss_mskd_stage3.loss_weight
    assert first["distill.loss_mskd_stage3"] == pytest.approx(
        weight * sum(first[term] for term in TERMS), rel=1e-5
    )
    assert len({first[name] for name in ("student.loss", *TERMS)}) == 3


def test_progress_is_shown_with_the_time_left(distilled):
    log = next(distilled.glob("*/*.log")).read_text()
    lines = [line for line in log.splitlines() if "Epoch(train)" in line]
    assert len(lines) == 4 and all("eta: 0:00:" in line for line in lines)
    assert all(f"{name}: " in line for name in ("student.loss", *TERMS) for line in lines)
    assert "Preflight passed" in log and "Teacher on the validation data: accuracy/top1" in log


def test_tensorboard_has_the_same_numbers(distilled):
    (events,) = sorted(distilled.glob("*/vis_data/events.out.tfevents.*"))[:1]
    board = EventAccumulator(str(events))
    board.Reload()
    entries = scalars(events.parent.parent.parent)
    for name in ("student.loss", "distill.loss_mskd_stage3", *TERMS, "accuracy/top1"):
        written = [event.value for event in board.Scalars(name)]
        logged = [entry[name] for entry in entries if name in entry]
        assert written == pytest.approx(logged[: len(written)], rel=1e-5)
        assert len(written) == (2 if name == "accuracy/top1" else 4)
    assert [event.value for event in board.Scalars("teacher/accuracy/top1")] == pytest.approx(
        [entries[0]["teacher/accuracy/top1"]]
    )


def test_a_used_work_dir_needs_resume(distilled, teacher):
    before = {path: path.stat().st_mtime_ns for path in distilled.rglob("*")}
    with pytest.raises(SettingError, match="`--work-dir`.*--resume to continue"):
        call("train", MSKD, "--work-dir", distilled, "--teacher", teacher)
    assert {path: path.stat().st_mtime_ns for path in distilled.rglob("*")} == before


def test_resume_continues(resumed):
    first, second = sorted(path for path in resumed.iterdir() if path.is_dir())
    epochs = [[e["epoch"] for e in scalars_of(run) if "loss" in e] for run in (first, second)]
    assert epochs == [[1, 1, 2, 2], [3, 3]]
    assert (resumed / "last_checkpoint").read_text() == str(resumed / "epoch_3.pth")
    assert not any("teacher/accuracy/top1" in entry for entry in scalars_of(second))
    # Steps and the momentum of the optimizer go on.
    checkpoint = torch.load(resumed / "epoch_3.pth")
    assert checkpoint["meta"]["iter"] == 6
    assert {state["momentum_buffer"].dtype for state in states(checkpoint)} == {torch.float32}


def states(checkpoint):
    return checkpoint["optimizer"]["state"].values()


def accuracy_of(config, checkpoint, work_dir):
    """Return the accuracy that test.py reports."""
    call("test", config, checkpoint, "--work-dir", work_dir)
    (report,) = work_dir.glob("*/*.json")
    return json.loads(report.read_text())["accuracy/top1"]


def test_testing_and_exporting_give_the_logged_accuracy(resumed, tmp_path):
    checkpoint, student = resumed / "epoch_3.pth", tmp_path / "student.pth"
    expected = accuracies(resumed)[-1]
    # An accuracy that any network gets would compare nothing.
    assert len(accuracies(resumed)) == 4 and 0 < expected < 100  # epoch 2's made again
    assert accuracy_of(MSKD, checkpoint, tmp_path / "whole") == expected
    toy.tool("export_student").main([MSKD, str(checkpoint), str(student)])
    assert accuracy_of(MSKD, student, tmp_path / "exported") == expected
    alone = DEMO / "student_resnet8_digits.py"
    assert accuracy_of(str(alone), student, tmp_path / "alone") == expected


def test_testing_reads_the_weights_that_it_is_given_alone(resumed, tmp_path):
    config, other = tmp_path / "alone.py", tmp_path / "other.pth"
    torch.save(toy.network("resnet8").state_dict(), other)
    base = DEMO / "student_resnet8_digits.py"
    config.write_text(f"_base_ = {str(base)!r}\nload_from = {str(other)!r}\nresume = True\n")
    expected = accuracies(resumed)[-1]
    assert accuracy_of(config, resumed / "epoch_3.pth", tmp_path / "run") == expected


def test_testing_leaves_the_config_of_the_training(resumed):
    (config,) = resumed.glob("*.py")
    before = config.read_text()
    for _ in range(2):
        call("test", config, resumed / "epoch_3.pth", "--work-dir", resumed)
    assert config.read_text() == before and (resumed / "test" / config.name).exists()


def test_a_checkpoint_can_be_named_to_resume_from(resumed, teacher, tmp_path):
    arguments = [MSKD, "--work-dir", tmp_path, "--teacher", teacher, "--seed", "1"]
    call("train", *arguments, "--resume", resumed / "epoch_3.pth", epochs=4)
    assert {e["epoch"] for e in scalars(tmp_path) if "loss" in e} == {4}


def test_the_learning_rate_is_scaled_on_demand(tmp_path):
    alone = tmp_path / "alone.py"
    schedule = 'dict(_delete_=True, type="MultiStepLR", milestones=[1])'
    alone.write_text(
        f"""_base_ = "{DEMO}/student_resnet8_digits.py"\nparam_scheduler = {schedule}"""
    )
    call("train", alone, "--work-dir", tmp_path, "--auto-scale-lr", epochs=1)
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "Scaling the original LR by 0.25" in log  # 16 images a step, meant for 64
    assert "the learning rate is meant for" not in log


# --- bad input
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message, own_process",
    [
        (["none.py"], "`config` to be a config file, but got 'none.py'", False),
        (
            [MSKD, "--teacher", "{tmp}/none.pth"],
            "`--teacher` to be a file, a URL or torchvision://NAME",
            False,
        ),
        ([MSKD], "`teacher_ckpt` to be the teacher's weights (--teacher FILE", False),
        # As users see it; once, since it takes seconds to import the host packages.
        ([MSKD], "`teacher_ckpt` to be the teacher's weights (--teacher FILE", True),
        (
            [MSKD, "--teacher", "{tmp}/teacher_7.pth"],
            "`teacher_ckpt` to be weights of CIFARResNet (depth 20, classes 10), but got",
            False,
        ),
        ([MSKD, "--resume", "{tmp}/none.pth"], "`--resume` to be a checkpoint, but got", False),
        ([MSKD, "--resume", "{tmp}"], "which is a folder", False),
        (
            [MSKD, "--resume", "{tmp}/teacher_7.pth"],
            "which has no meta, message_hub. Weights alone begin a new training",
            False,
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path, capsys, monkeypatch, argv, message, own_process
):
    toy.teacher_file(tmp_path)
    argv = [TOOLS / "train.py", *[text.format(tmp=tmp_path) for text in argv]]
    argv = [*map(str, argv), "--work-dir", str(tmp_path / "run")]
    if own_process:
        ran = subprocess.run(
            [sys.executable, *argv], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        status, error, output = ran.returncode, ran.stderr, ran.stdout
    else:
        forget_runs()
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            run_tool(toy.tool("train").main)
        status, (output, error) = stopped.value.code, capsys.readouterr()
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Expected ") and message in line
    assert error.splitlines()[-1] == line
    assert "Traceback" not in output + error
    left = [path for path in (tmp_path / "run").glob("*") if path.is_file()]
    # Where the network had to be built there is a log and the config; the next training may use
    # the folder.
    assert {path.suffix for path in left} <= {".py"}
    if "digits" not in line and "teacher_ckpt" not in line:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refused", [False, True])
def test_no_thread_of_a_process_group_outlives_a_tool(tmp_path, refused):
    # One that still holds a tensor when Python exits aborts the process.
    program = f"""
import os, sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from mskd_plugin import cli
from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError

def threads():
    return set(os.listdir("/proc/self/task"))

def main():
    before = threads()
    distributed.init_process_group(
        "gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1
    )
    group.update(threads() - before)
    assert group
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    model.runner = dict(model=model)  # a circle, as MMEngine's runner has
    if {refused}:
        raise SettingError("a", "b", "c")

group = set()
try:
    run_tool(main)
except SystemExit:
    pass
assert not group & threads()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "backend, fails, left", [("nccl", True, 0), ("gloo", True, 1), ("nccl", False, 1)]
)
def test_after_an_error_of_one_process_nccl_is_not_waited_for(monkeypatch, backend, fails, left):
    calls = []
    monkeypatch.setattr(cli.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(cli.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(cli.dist, "destroy_process_group", lambda: calls.append(1))

    def main():
        if fails:
            raise SettingError("a", "b", "c")

    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        run_tool(main)
    assert len(calls) == left


def test_run_tool_leaves_other_errors_and_results_alone(capsys):
    assert run_tool(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)
    assert capsys.readouterr().err == ""


def test_what_the_terminal_cannot_show_ends_no_tool(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_tool(lambda: print("1 ± 2", flush=True))
    assert terminal.buffer.getvalue().strip() == rb"1 \xb1 2"


@pytest.mark.parametrize("name", sorted(path.name for path in TOOLS.glob("*.py")))
def test_python_tools_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.tool(name.removesuffix(".py")).parse_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: python tools/{name} " in text


@pytest.mark.parametrize("name", sorted(path.name for path in TOOLS.glob("*.sh")))
def test_shell_tools_help_with_an_example_and_refuse_bad_arguments(name):
    helped = shell(name, "--help")
    assert helped.returncode == 0 and helped.stderr == ""
    assert f"usage: tools/{name}" in helped.stdout
    before = {"slurm_train.sh": "gpu mskd ", "torchrun.sh": "8 tools/benchmark_step.py "}
    assert f"tools/{name} {before.get(name, '')}configs" in helped.stdout
    for argv in ([], ["config.py"], ["config.py", "a", "b", "zero"], ["a", "0", "0", "0"]):
        refused = shell(name, *argv)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith("error: expected ")
        assert f"usage: tools/{name}" in refused.stderr
