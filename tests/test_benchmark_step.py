"""The benchmark of training steps: its counts against the networks' published ones."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from types import SimpleNamespace

import needs
import pytest
import torch
import toy
from tool_runs import forget_runs, shell

from mskd_plugin.errors import SettingError

ROOT = toy.ROOT
benchmark_step = toy.tool("benchmark_step")
DEMO = ROOT / "configs" / "demo"


@pytest.fixture(autouse=True)
def own_run():
    forget_runs()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    names = ("student_resnet8_digits", "kd_resnet20_resnet8_digits")
    configs = [str(DEMO / f"{name}.py") for name in names]
    options = ["--steps", "2", "--warmup", "0", "--batch-size", "4", "--json", str(file)]
    benchmark_step.main([*configs, *options])
    return json.loads(file.read_text())


def test_operations_are_those_of_the_networks(rows):
    # Two operations a MAC; forward and backward of the student, but no gradient of the images.
    student, teacher = 2e-3 * 12.51, 2e-3 * 40.82
    stem = 2e-9 * 32 * 32 * 27 * 16
    assert rows[0]["GFLOP per image"] == pytest.approx(3 * student - stem, rel=0.01)
    assert rows[1]["GFLOP per image"] == pytest.approx(3 * student - stem + teacher, rel=0.01)


def test_figures_fit_together(rows):
    for row in rows:
        assert row["images per second"] == pytest.approx(4e3 / row["ms per step"])
        assert row["relative time"] == pytest.approx(row["ms per step"] / rows[0]["ms per step"])
        low, high = row["quartiles"]
        assert low <= row["ms per step"] <= high
        # Four images of 32 x 32 leave at least the stem's map, 16 channels in float32.
        assert row["peak memory (MiB)"] > 4 * 16 * 32 * 32 * 4 / 2**20
    assert rows[0]["relative time by turns"] == rows[0]["relative memory"] == 1
    assert rows[0]["parts (ms)"]["teacher forward"] == 0
    for part in ("teacher forward", "student forward", "connectors and losses", "backward", "step"):
        assert 0 < rows[1]["parts (ms)"][part]
    for row in rows:
        parts, shares = row["parts (ms)"], row["parts, share of the step"]
        assert sum(shares.values()) == pytest.approx(1)
        assert parts["rest"] > 0 and set(parts) == {*benchmark_step.WATCHED, "rest"}
        assert shares["backward"] == pytest.approx(parts["backward"] / sum(parts.values()))
        relative = parts["backward"] / rows[0]["parts (ms)"]["backward"]
        assert row["parts, relative"]["backward"] == pytest.approx(relative)
        assert row["parts, relative"]["teacher forward"] is None  # the first has no teacher


@pytest.mark.parametrize("name, value", [("steps", 1), ("warmup", -1), ("block", 0)])
def test_bad_options_are_named(name, value):
    config = str(DEMO / "student_resnet8_digits.py")
    with pytest.raises(SettingError, match=rf"--{name}.*at least {value + 1}.*{value}"):
        benchmark_step.main([config, f"--{name}", str(value)])


@needs.torch_2_9
def test_the_fast_loop_counts_the_same_operations(rows, tmp_path, monkeypatch):
    file, told = tmp_path / "rows.json", []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(1))
    config = str(DEMO / "kd_resnet20_resnet8_digits.py")
    options = ["--steps", "2", "--warmup", "0", "--block", "2", "--batch-size", "4"]
    compiled = ("compile", "compile_losses")
    eager = [f"default_hooks.networks.{part}.backend=aot_eager" for part in compiled]
    benchmark_step.main([config, *options, "--fast", "--json", str(file), "--cfg-options", *eager])
    plain, fast = json.loads(file.read_text())
    assert (plain["config"], fast["config"]) == (rows[1]["config"], f"{rows[1]['config']}, fast")
    assert fast["GFLOP per image"] == plain["GFLOP per image"] == rows[1]["GFLOP per image"]
    assert fast["images per second"] == pytest.approx(4e3 / fast["ms per step"])
    assert all(fast["parts (ms)"][part] > 0 for part in ("teacher forward", "backward", "step"))
    # Of both, which --cfg-options compiles: two blocks of two, two dissected, one for the memory.
    assert len(told) == 2 * 7


def test_memory_of_cuda_graphs_is_not_measured(rows):
    subject = object.__new__(benchmark_step.Subject)
    subject.networks = [SimpleNamespace(cuda_graphs=True)]
    assert subject.peak_memory() is None
    row = {**rows[1], "peak memory (MiB)": None, "relative memory": None}
    table = benchmark_step.markdown([rows[0], row], 1e12).splitlines()
    titles, first, second = ([c.strip() for c in table[i].split("|")] for i in (2, 4, 5))
    for title in ("peak MiB", "relative"):
        assert second[titles.index(title)] == "-" != first[titles.index(title)]


def test_a_block_is_timed_as_a_whole(tmp_path, monkeypatch):
    now, waits = [0.0], []
    monkeypatch.setattr(benchmark_step.Subject, "step", lambda self: now.__setitem__(0, now[0] + 3))
    monkeypatch.setattr("mskd_plugin.measure.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("mskd_plugin.measure.synchronize", lambda: waits.append(now[0]))
    monkeypatch.setattr(benchmark_step.Subject, "dissected_step", lambda self: None)
    monkeypatch.setattr(benchmark_step, "peak_memory", lambda function: 1.0)
    monkeypatch.setattr(benchmark_step, "matrix_rate", lambda: 1e12)
    monkeypatch.setattr(benchmark_step.Subject, "_count_operations", lambda self: 6 * 10**12)
    monkeypatch.setattr(benchmark_step, "markdown", lambda rows, rate: reported.extend(rows) or "")
    monkeypatch.setattr(benchmark_step, "PARTS", ())
    reported = []
    config = str(DEMO / "student_resnet8_digits.py")
    benchmark_step.main([config, "--steps", "2", "--warmup", "1", "--block", "5"])
    assert waits == [15, 30, 30, 45]  # 5 steps of 3 seconds in each of 3 blocks
    assert reported[0]["ms per step"] == 3e3
    assert reported[0]["share of matrix rate"] == 2  # 6 T operations in 3 s at a rate of 1 T/s


def test_times_are_compared_turn_by_turn(tmp_path):
    figures = {"flops": 1, "batch_size": 1, "parts": defaultdict(lambda: [1.0])}
    first = SimpleNamespace(name="a", seconds=[1.0, 2.0, 3.0], **figures)
    second = SimpleNamespace(name="b", seconds=[6.0, 2.0, 3.0], **figures)
    _, row = benchmark_step.report([first, second], [1.0, 1.0], 1.0)
    assert row["relative time"] == 1.5 and row["relative time by turns"] == 1


def test_switches_and_mode_are_those_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_step.Subject, "_begin", lambda self: None)
    options = ["--amp", "--batch-size", "1", "--cfg-options", "model.backbone.norm_eval=True"]
    args = benchmark_step.parse_args(["x", *options])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(str(ROOT / "configs" / "student_r18_imagenet.py"), args)
    assert type(subject.wrapper).__name__ == "BFloat16OptimWrapper"
    assert subject.model.training and not subject.model.backbone.bn1.training


@pytest.mark.parametrize("held", [[], ["--in-memory"]], ids=str)
def test_real_batches_are_the_configs_own(tmp_path, held):
    args = benchmark_step.parse_args(["x", "--real", "--batch-size", "4", *held])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(str(DEMO / "student_resnet8_digits.py"), args)
    first, second = next(subject.batches), next(subject.batches)
    assert first["inputs"].shape == (4, 3, 32, 32)
    assert not first["inputs"].equal(second["inputs"])
    assert len(first["data_samples"]) == (1 if held else 4)


def test_a_step_logs_its_losses_as_the_runner_does(tmp_path):
    args = benchmark_step.parse_args(["x", "--batch-size", "4"])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(str(DEMO / "student_resnet8_digits.py"), args)
    logged = subject.runner.message_hub.log_scalars
    assert "train/loss" not in logged
    subject.step()
    assert len(logged["train/loss"].data[0]) == 1


@pytest.mark.parametrize("held", [[], ["--in-memory"]], ids=str)
def test_every_real_batch_is_a_whole_one(tmp_path, held):
    config = str(DEMO / "student_resnet8_digits.py")
    options = ["--cfg-options", "train_dataloader.dataset.indices=10"]
    args = benchmark_step.parse_args([config, "--real", "--batch-size", "4", *held, *options])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(config, args)
    assert {len(next(subject.batches)["inputs"]) for _ in range(6)} == {4}
    forget_runs()
    args.batch_size = 11
    told = "`train_dataloader` .* one batch, here of 11, but got 10 images, and drop_last=True"
    with pytest.raises(SettingError, match=told):
        benchmark_step.Subject(config, args)


def test_two_processes_share_the_work(tmp_path):
    file = tmp_path / "rows.json"
    ran = shell(
        *[
            "torchrun.sh",
            2,
            ROOT / "tools/benchmark_step.py",
            DEMO / "kd_resnet20_resnet8_digits.py",
        ],
        *["--steps", "2", "--warmup", "1", "--batch-size", "4", "--json", file],
    )
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads(file.read_text())
    assert row["processes"] == 2
    assert row["images per second"] == pytest.approx(2 * 4e3 / row["ms per step"])
    assert ran.stdout.count("| config |") == 1  # the main process alone reports


@pytest.mark.parametrize(
    "name, teacher, student, losses",
    [
        ("kd_resnet20_resnet8_digits", "teacher", "architecture", "distiller"),
        ("student_resnet8_digits", None, "backbone", None),
    ],
)
def test_each_part_has_its_time(tmp_path, monkeypatch, name, teacher, student, losses):
    args = benchmark_step.parse_args(["x", "--batch-size", "4"])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(str(DEMO / f"{name}.py"), args)
    now = [0.0]
    monkeypatch.setattr(benchmark_step.time, "perf_counter", lambda: now[0])

    def lasts(owner, method, duration):
        own = getattr(owner, method)

        def slow(*args, **kwargs):
            now[0] += duration
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, method, slow)

    expected = {"data": 1, "student forward": 2, "backward": 4, "step": 8, "rest": 16}
    expected |= {"teacher forward": 32, "connectors and losses": 64} if teacher else {}
    batch = next(subject.batches)
    source = SimpleNamespace(next=lambda: batch)
    lasts(source, "next", 1)
    subject.batches = iter(lambda: source.next(), None)
    lasts(getattr(subject.inner, student), "forward", 2)
    lasts(subject.wrapper, "backward", 4)
    lasts(subject.wrapper, "step", 8)
    lasts(subject.inner.data_preprocessor, "forward", 16)
    if teacher:
        lasts(getattr(subject.inner, teacher), "forward", 32)
        lasts(getattr(subject.inner, losses), "compute_distill_losses", 64)
    subject.dissected_step()
    assert subject.parts == {part: [expected.get(part, 0)] for part in benchmark_step.PARTS}


def test_watched_methods_come_back_those_of_an_instance_too():
    compiled, plain, spent = torch.nn.ReLU(), torch.nn.ReLU(), defaultdict(float)

    def forward(x):
        return x + 1

    compiled.forward = forward
    watched = [("a", compiled, "forward"), ("b", plain, "forward")]
    with benchmark_step.stopwatch(spent, watched):
        assert compiled(torch.ones(1)) == 2 and plain(torch.ones(1)) == 1
    assert set(spent) == {"a", "b"}
    assert compiled.forward is forward and "forward" not in vars(plain)


@needs.torch_2_4
def test_a_config_and_its_fast_form_have_logs_of_their_own(tmp_path, monkeypatch):
    # mmengine tells runs apart by name and second; these begin in the same one.
    clock = SimpleNamespace(time=lambda: 1e9, strftime=time.strftime, localtime=time.localtime)
    monkeypatch.setattr("mmengine.runner.runner.time", clock)
    eager = ["--cfg-options", "default_hooks.networks.compile.backend=aot_eager"]
    config = str(DEMO / "student_resnet8_digits.py")
    subjects = []
    for fast in (False, True):
        args = benchmark_step.parse_args([config, "--batch-size", "4", *(eager if fast else [])])
        args.work_dir = str(tmp_path)
        subjects.append(benchmark_step.Subject(config, args, fast))
    plain, fast = (type(subject.runner.message_hub).__name__ for subject in subjects)
    assert (plain, fast) == ("MessageHub", "DeferringMessageHub")


@pytest.mark.parametrize(
    "name, options, side",
    [
        ("heterogeneous/kd_resnet50_deit-t_cifar100", [], 224),
        ("heterogeneous/kd_resnet50_deit-t_cifar100", ["--side", "64"], 64),
        ("cifar10/student_resnet8_cifar10", [], 32),
        ("cifar10/student_resnet8_cifar10", ["--in-memory"], 32),
        ("student_r18_imagenet", [], 224),
    ],
)
def test_synthetic_images_have_the_side_of_the_configs_own(
    tmp_path, monkeypatch, name, options, side
):
    monkeypatch.setattr(benchmark_step.Subject, "_begin", lambda self: None)
    args = benchmark_step.parse_args(["x", "--batch-size", "1", *options])
    args.work_dir = str(tmp_path)
    subject = benchmark_step.Subject(str(ROOT / "configs" / f"{name}.py"), args)
    assert next(subject.batches)["inputs"].shape == (1, 3, side, side)


@pytest.mark.parametrize("phase", [1, 2])
def test_a_method_in_two_phases_is_in_the_phase_asked_for(tmp_path, phase):
    args = benchmark_step.parse_args(["x", "--phase", str(phase), "--batch-size", "2"])
    args.work_dir = str(tmp_path)
    config = ROOT / "configs/cifar100/fsp_resnet32x4_resnet8x4.py"
    subject = benchmark_step.Subject(str(config), args)
    assert subject.inner.phase == phase
    losses = subject.model.train_step(next(subject.batches), optim_wrapper=subject.wrapper)
    assert any("loss_fsp" in name for name in losses) == (phase == 1)
