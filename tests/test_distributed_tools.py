"""The tools that start several processes: two on a CPU train and test as one does."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
import toy
from tolerances import assert_close
from tool_runs import TOOLS, forget_runs, shell


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Train with two processes, and in this one with twice the batch size."""
    folder = tmp_path_factory.mktemp("processes")
    student = dict(
        toy.classifier("student"),
        backbone=dict(
            type="ResNet_CIFAR",
            depth=18,
            base_channels=4,
            stem_channels=4,
            # Batch statistics would tell the batch sizes apart.
            norm_cfg=dict(type="GN", num_groups=2),
        ),
    )
    student["head"]["in_channels"] = 32
    distiller = toy.distiller(negatives="all")
    distiller["student_recorders"]["stage3"]["source"] = "backbone.layer4"
    distiller["connectors"]["stage3_student"]["in_channels"] = 32
    model = toy.algorithm(
        architecture=student,
        distiller=distiller,
        teacher_ckpt=str(toy.teacher_file(folder)),
    )
    cfg = toy.runner_config(folder / "one", model)
    cfg.train_dataloader.dataset.pipeline = [dict(type="PackInputs")]
    cfg.val_dataloader.dataset.indices = cfg.test_dataloader.dataset.indices = 25
    for key in ("work_dir", "experiment_name", "launcher"):
        cfg.pop(key)
    cfg.dump(folder / "toy.py")
    ran = shell(
        *["dist_train.sh", folder / "toy.py", 2, "--work-dir", folder / "two"],
        *["--cfg-options", "train_dataloader.batch_size=4"],
    )
    assert ran.returncode == 0, ran.stderr
    forget_runs()
    toy.tool("train").main([str(folder / "toy.py"), "--work-dir", str(folder / "one")])
    return folder


def test_two_processes_train_to_the_weights_of_one(two_processes):
    weights = {}
    for name in ("one", "two"):
        work_dir = two_processes / name
        assert {path.name for path in work_dir.glob("*.pth")} == {"epoch_2.pth"}
        assert len([path for path in work_dir.iterdir() if path.is_dir()]) == 1  # one log
        weights[name] = torch.load(work_dir / "epoch_2.pth")["state_dict"]
    assert weights["one"].keys() == weights["two"].keys()
    for key, value in weights["one"].items():
        assert_close(weights["two"][key], value, torch.float32)


def test_two_processes_test_as_one_does(two_processes):
    config, checkpoint = two_processes / "toy.py", two_processes / "two" / "epoch_2.pth"
    ran = shell(
        *["dist_test.sh", config, checkpoint, 2, "--work-dir", two_processes / "test_two"],
    )
    assert ran.returncode == 0, ran.stderr
    (report,) = (two_processes / "test_two").glob("*/*.json")
    of_two = json.loads(report.read_text())["accuracy/top1"]
    forget_runs()
    toy.tool("test").main(
        [str(config), str(checkpoint), "--work-dir", str(two_processes / "test_one")]
    )
    (report,) = (two_processes / "test_one").glob("*/*.json")
    # 25 images: the 26th, which evens the shares out, must not count.
    assert of_two == json.loads(report.read_text())["accuracy/top1"]
    assert (of_two * 25 / 100) == pytest.approx(round(of_two * 25 / 100))


def test_two_processes_resume_in_a_copied_folder(two_processes):
    copy = shutil.copytree(two_processes / "two", two_processes / "copy")
    ran = shell(
        *["dist_train.sh", two_processes / "toy.py", 2, "--work-dir", copy, "--resume"],
        *["--cfg-options", "train_dataloader.batch_size=4", "train_cfg.max_epochs=3"],
    )
    assert ran.returncode == 0, ran.stderr
    _, log = sorted(copy.glob("*/*.log"))
    assert f"from {copy / 'epoch_2.pth'}" in log.read_text()
    assert (copy / "epoch_3.pth").exists()


@pytest.mark.parametrize(
    "gpus, env, expected",
    [
        (4, {}, ["--gres=gpu:4", "--ntasks=4", "--ntasks-per-node=4", "--cpus-per-task=14"]),
        (16, {}, ["--gres=gpu:8", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=14"]),
        (
            4,
            dict(GPUS_PER_NODE="2", CPUS_PER_TASK="3", SRUN_ARGS="--quotatype=auto -x bad-node"),
            ["--gres=gpu:2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"],
        ),
    ],
)
def test_the_command_line_for_slurm(tmp_path, gpus, env, expected):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    ran = shell(
        *["slurm_train.sh", "part", "a job", "a config.py", gpus, "--amp", "--seed", "1"],
        **{**env, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        *["--partition=part", "--job-name=a job", *expected, "--kill-on-bad-exit=1"],
        *env.get("SRUN_ARGS", "").split(),
        *[sys.executable, "-u", str(TOOLS / "train.py"), "a config.py", "--launcher", "slurm"],
        *["--amp", "--seed", "1"],
    ]
