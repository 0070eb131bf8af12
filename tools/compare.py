"""Compare methods on one pair: train every one over several seeds with the same recipe.

python tools/compare.py configs/_base_/pairs/resnet32x4_resnet8x4_cifar100.py --teacher \
    resnet32x4.pth --methods student kd mskd crd

Every training is a run of ``tools/train.py`` in a folder of its own, with its log and checkpoints.
Ends with a table, a plot, and all accuracies as JSON. Finished trainings are kept and reused, so
that methods and seeds can be added; interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mskd_plugin.checks.settings import check_settings
from mskd_plugin.cli import run_tool
from mskd_plugin.comparison import (
    SETTINGS_OF,
    Result,
    check_recipe,
    digest_of_config,
    digest_of_file,
    note_recipe,
    plot,
    read_result,
    table,
)
from mskd_plugin.errors import SettingError, check_output
from mskd_plugin.files import write_json, written_whole
from mskd_plugin.launch import (
    CONFIG_SUFFIXES,
    TRAINING,
    Count,
    add_common_options,
    add_switches,
    build_datasets,
    dry_run,
    is_distillation,
    load_config,
    newest_checkpoint,
    set_teacher,
)
from mskd_plugin.launch.config import MADE_FROM

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("amp", "fast", "in_memory")
TEACHER = "the teacher"  # no method's name
EPOCH_LINE = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (.+?)  ")


def train(
    arguments: list[str],
    work_dir: Path,
    seed: int,
    label: str,
    environment: dict[str, str],
    running: set[subprocess.Popen],
) -> Result:
    """Run one training, or reuse it if it has finished, and show its progress.

    Its process is in ``running`` while it runs; who takes it out and ends it gets no error of it.
    """
    finished = work_dir / "finished"
    if finished.exists():
        print(f"{label:>22}: reusing the finished training in {work_dir}", flush=True)
        return read_result(work_dir)
    command = [
        *[sys.executable, str(ROOT / "tools" / "train.py"), *arguments],
        *["--work-dir", str(work_dir), "--seed", str(seed), "--resume"],
    ]
    work_dir.mkdir(parents=True, exist_ok=True)
    tail: list[str] = []
    shown = 0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # file names and libraries need not write in this process's encoding
        env={**os.environ, **environment},
    ) as process:
        assert process.stdout is not None
        running.add(process)
        try:
            for line in process.stdout:
                tail = [*tail, line][-30:]
                match = EPOCH_LINE.search(line)
                if match and int(match[1]) > shown and int(match[2]) * 2 > int(match[3]):
                    shown = int(match[1])
                    print(f"{label:>22}: epoch {shown}, {match[4]} left", flush=True)
        except KeyboardInterrupt:
            process.terminate()  # a signal to this process alone
            raise
    if process not in running:
        raise KeyboardInterrupt
    running.discard(process)
    if process.returncode:
        errors = [line for line in tail if line.startswith("error: ")]
        sys.stderr.writelines(errors or tail)
        raise SystemExit(f"error: {label}: {' '.join(command)} ended with {process.returncode}")
    finished.touch()
    result = read_result(work_dir)
    print(f"{label:>22}: top-1 {result.top1:.2f}", flush=True)
    return result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train methods on one pair over several seeds with the same recipe, and "
        "compare their accuracies.",
        epilog="example: python tools/compare.py configs/_base_/pairs/resnet20_resnet8_digits.py "
        "--teacher configs/demo/teacher_resnet20_digits.py --methods student kd mskd mskd+kd",
    )
    parser.add_argument("config", help="config of a pair, configs/_base_/pairs/*.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["student", "kd", "mskd"],
        metavar="METHOD",
        help="as tools/train.py's --method takes them (default: student kd mskd)",
    )
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        help="the teacher's weights, or the config of a teacher to train first, with seed 0 "
        "(default: the pair's published weights, where it has any)",
    )
    parser.add_argument(
        "--seeds",
        action=Count,
        default=3,
        help="trainings per method, seeds 0 to SEEDS - 1 (default: 3)",
    )
    parser.add_argument(
        "--jobs",
        action=Count,
        default=min(os.cpu_count() or 1, 4),
        help="trainings side by side, on the GPUs in turn (default: one per core, at most 4)",
    )
    parser.add_argument(
        "--work-dir", type=Path, help="folder of all (default: work_dirs/compare_<config's name>)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier trainings first")
    add_switches(parser)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="passed to every training; pair.settings.METHOD.SETTING is a setting of a method",
    )
    return parser.parse_args(argv)


def shared_options(args: argparse.Namespace, config: str) -> list[str]:
    """Return the options of ``tools/train.py`` that all trainings have in common.

    What a pair states goes to the trainings of the pair alone: the config of a teacher has its
    model already.
    """
    switches = [f"--{name.replace('_', '-')}" for name in SWITCHES if getattr(args, name)]
    of_pair = config == args.config
    options = [o for o in args.cfg_options if of_pair or o.split(".")[0] not in MADE_FROM]
    return [*switches, *(["--cfg-options", *options] if options else [])]


def is_config(teacher: str | None) -> bool:
    """Whether ``--teacher`` names a teacher to train, not its weights."""
    return teacher is not None and teacher.endswith(CONFIG_SUFFIXES)


def check(args: argparse.Namespace) -> tuple[dict[str, object], dict[str, Config]]:
    """Read every config as the trainings will.

    Returns:
        What all trainings have in common, by the names of the settings; and the config of each
        training, the teacher's first if it is to be trained.

    Raises:
        SettingError: If a method is given twice, or a training would refuse a setting.
    """
    if len({*args.methods}) < len(args.methods):
        raise SettingError("--methods", "each method once", " ".join(args.methods))
    parser = argparse.ArgumentParser("compare.py")
    add_common_options(parser)
    add_switches(parser)

    def read(config: str, *arguments: str, **settings: bool) -> Config:
        given = parser.parse_args([config, *arguments, *shared_options(args, config)])
        cfg = load_config(argparse.Namespace(**{**vars(given), **settings}), TRAINING)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        return cfg

    pair = read(args.config, "--method", "student")
    weights = args.teacher
    if is_config(args.teacher):
        teacher = read(args.teacher)
        expected = read(args.config, "--method", "teacher").model
        if shapes(teacher.model) != shapes(expected):
            raise SettingError(
                "--teacher",
                f"a config of the pair's teacher, {args.config} with --method teacher",
                f"another network in {args.teacher}",
            )
    of_methods = {method: read(args.config, "--method", method) for method in args.methods}
    configs = {**({TEACHER: teacher} if is_config(args.teacher) else {}), **of_methods}
    settings = {f"{SETTINGS_OF}{name}": digest_of_config(cfg) for name, cfg in configs.items()}
    for method, cfg in of_methods.items():
        if is_distillation(cfg.model):
            if args.teacher is not None and not is_config(args.teacher):
                set_teacher(cfg, args.teacher)
            weights = weights or cfg.model.teacher_ckpt
            if weights is None:
                raise SettingError("--teacher", f"given, which {method} on this pair needs", None)
        check_settings(cfg)
        MODELS.build(cfg.model)  # with the teacher's weights, which may not fit
    # Of trainings side by side each would download them.
    build_datasets(read(args.config, "--method", "student", in_memory=False))
    switches = {f"--{name.replace('_', '-')}": getattr(args, name) for name in SWITCHES}
    recipe = {
        "config": args.config,
        "--teacher": weights,
        **switches,
        "--cfg-options": args.cfg_options,
        "the file of --teacher": digest_of_file(weights),
        f"{SETTINGS_OF}the config": digest_of_config(pair),
        **settings,
    }
    return recipe, configs


def try_first_steps(configs: dict[str, Config]) -> None:
    """Take the first step of each training, without the compilation that may come before it.

    A teacher that is to be trained has random weights until then.

    Raises:
        SettingError: Naming the training that would refuse a setting.
    """
    print(f"The first step of each: {', '.join(configs)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in configs.items():
            if name == TEACHER:
                weights = Path(folder) / "teacher.pth"
                torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, weights)
            elif TEACHER in configs and is_distillation(cfg.model):
                set_teacher(cfg, str(weights))
            cfg.log_level = "ERROR"
            if networks := (cfg.get("default_hooks") or {}).get("networks"):
                networks.update(compile=False, compile_losses=False)
            try:
                dry_run(cfg)
            except SettingError as error:
                raise SettingError(name, "a training that can begin", f"{error}") from error
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def shapes(model: dict) -> dict[str, torch.Size]:
    """Return the shapes of a network's weights."""
    return {name: value.shape for name, value in MODELS.build(model).state_dict().items()}


def environments(jobs: int) -> SimpleQueue[dict[str, str]]:
    """Return the environments of trainings side by side: one thread each, and the GPUs in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    queue: SimpleQueue[dict[str, str]] = SimpleQueue()
    for job in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {}
        queue.put({"OMP_NUM_THREADS": "1", **gpu})
    return queue


def train_all(args: argparse.Namespace, work_dir: Path) -> dict[str, list[Result]]:
    """Train the teacher, if it is to be trained, then every method over the seeds, side by side.

    Returns:
        From each method to its results, seed by seed.
    """
    running: set[subprocess.Popen] = set()
    teacher = args.teacher
    if is_config(teacher):
        print("The teacher")
        folder, environment = work_dir / "teacher", {"OMP_NUM_THREADS": str(args.jobs)}
        options = shared_options(args, teacher)
        train([teacher, *options], folder, 0, "teacher", environment, running)
        teacher = newest_checkpoint(folder)
    free = environments(args.jobs)

    def run(job: tuple[int, str]) -> Result:
        seed, method = job
        arguments = [args.config, "--method", method, *shared_options(args, args.config)]
        if teacher is not None and method not in ("student", "teacher"):
            arguments += ["--teacher", teacher]
        environment = free.get()
        try:
            folder = work_dir / f"{method}_seed{seed}"
            return train(arguments, folder, seed, f"{method}, seed {seed}", environment, running)
        finally:
            free.put(environment)

    jobs = [(seed, method) for seed in range(args.seeds) for method in args.methods]
    print(f"{len(jobs)} trainings, {args.jobs} at a time")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {job: pool.submit(run, job) for job in jobs}
        try:
            wait(futures.values())  # a training that fails lets the others finish
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures.values()):
                for process in tuple(running):
                    running.discard(process)
                    process.terminate()
                time.sleep(0.1)
            raise
        runs = {job: future.result() for job, future in futures.items()}
    return {name: [runs[seed, name] for seed in range(args.seeds)] for name in args.methods}


def main(argv: list[str] | None = None) -> None:
    """Train all, then print the table and draw the plot."""
    args = parse_args(argv)
    start = time.time()
    work_dir = args.work_dir or Path("work_dirs") / f"compare_{Path(args.config).stem}"
    check_output("--work-dir", work_dir, folder=True)
    recipe, configs = check(args)
    check_recipe(work_dir, recipe, args.fresh)
    try_first_steps(configs)
    if args.fresh and work_dir.exists():
        shutil.rmtree(work_dir)
    note_recipe(work_dir, recipe)
    results = train_all(args, work_dir)
    text = table(results)
    with written_whole(work_dir / "results.md") as file:
        file.write_text(text + "\n", encoding="utf-8")
    top1 = {name: [run.top1 for run in runs] for name, runs in results.items()}
    write_json(top1, work_dir / "results.json")
    plot(results, Path(args.config).stem, work_dir / "results.png")
    print(f"\n{text}\n\nAlso in {work_dir}: results.md, results.json, results.png")
    print(f"Took {time.time() - start:.0f} s.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the trainings, too
    run_tool(main)
