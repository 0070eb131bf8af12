"""What the command line tools share: a checked config with their options, and its runner."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.registry import DATASETS, HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, RUNNERS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from mskd_plugin.checkpoints.weights import check_source
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.preflight import check_data_roots
from mskd_plugin.recipes import METHODS, alone, distill, two_phases
from mskd_plugin.switches import (
    FAST,
    FROZEN_TEACHER,
    computes_fused,
    use_fast,
    use_in_memory,
)

#: What MMEngine's runner reads from a config without a parameter of its own for it.
RUNNER_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    "activation_checkpointing",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "sync_bn",
} - {"self", "cfg"}
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
#: What a model is made from: of the base of a pair, before the model is there.
MADE_FROM = ("pair", "num_train_images")
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")


class _Overrides(DictAction):
    """MMEngine's reader of ``KEY=VALUE``, with a usage error for what is not of that form."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if not re.match(r"[^=\s]+=", value) or not _balanced(value):
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, but got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in ("()", "[]"))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--method",
        help="with the config of a pair, configs/_base_/pairs/*.py: the method, several joined by "
        "+, or student or teacher alone (tools/list_configs.py lists them)",
    )
    parser.add_argument(
        "--work-dir",
        help="folder for logs and checkpoints (default: work_dirs/<config's name>, with --method "
        "work_dirs/<method>_<config's name>)",
    )
    add_overrides(parser)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="how the processes are started"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Overrides,
        default={},
        metavar="KEY=VALUE",
        help="settings to override, e.g. train_cfg.max_epochs=10 train_dataloader.batch_size=32",
    )


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the switches of training that change its speed, not its method."""
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision (bfloat16; float16 on GPUs without it)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="every switch of configs/_base_/fast.py: mixed precision, channels_last, compiled "
        "networks, fused optimizer, teacher in inference mode, log without waiting",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="hold the images in memory, on the GPU where there is one, and crop and flip them by "
        "the batch; for small images with RandomCrop and RandomFlip, as CIFAR's",
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_common_options`, and ``args.fast``
    and ``args.in_memory`` where there are any.

    Raises:
        SettingError: If the file is missing or no config, or an option begins with a key that the
            config does not have, goes into a setting that has no parts, or comes too late for the
            model that is made from it.
    """
    path = Path(args.config)
    if not path.is_file():
        raise SettingError("config", "a config file", f"{args.config!r}, which is not there")
    if path.suffix not in CONFIG_SUFFIXES:
        raise SettingError("config", f"a file in {', '.join(CONFIG_SUFFIXES)}", repr(args.config))
    cfg = Config.fromfile(path)
    stem = path.stem
    early = {key: value for key, value in args.cfg_options.items() if _top(key) in MADE_FROM}
    if getattr(args, "method", None):
        _merge(cfg, early, args.config)
        use_method(cfg, args.method)
        stem = f"{args.method}_{stem}"
    elif "model" not in cfg:
        raise SettingError("--method", f"given with {args.config}, which states a pair alone", None)
    elif early and "pair" in cfg:
        raise SettingError(
            "--cfg-options",
            f"no settings that the model of {args.config} is already made from",
            ", ".join(early),
            "They take effect with the config of a pair, configs/_base_/pairs/*.py, and --method.",
        )
    if getattr(args, "fast", False) and "fast" not in cfg:
        cfg.fast = Config.fromfile(FAST).fast
    if "fast" in cfg:
        use_fast(cfg, cfg.pop("fast"))
    options = dict(args.cfg_options)
    if cfg.model.get("data_preprocessor") is not None:  # the model holds a copy of the config's
        options |= {f"model.{k}": v for k, v in options.items() if _top(k) == "data_preprocessor"}
    _merge(cfg, options, args.config)
    # After the options, which name the data sets' own settings.
    if cfg.pop("in_memory", False) or getattr(args, "in_memory", False):
        use_in_memory(cfg)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{stem}"
    return cfg


def _merge(cfg: Config, options: dict[str, Any], name: str) -> None:
    """Merge ``--cfg-options`` into the config that ``name`` stands for."""
    known = {*cfg, *RUNNER_KEYS}
    for key in options:
        if _top(key) not in known:
            raise SettingError(
                "--cfg-options",
                f"keys of {name} or of MMEngine's runner",
                repr(key),
                _nearest(_top(key), known),
            )
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise SettingError("--cfg-options", f"settings of {name}", error) from error


def _top(key: str) -> str:
    return key.split(".")[0]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def is_distillation(model: ConfigDict) -> bool:
    """Whether a model config is that of a distillation algorithm with a student inside."""
    return "architecture" in model


def keep_student_only(cfg: Config) -> None:
    """Put the student in the algorithm's place, for tools that need no teacher."""
    if is_distillation(cfg.model):
        student = cfg.model.architecture
        if "cfg_path" in student:  # MMRazor's short form for a config of another package
            student = get_config(student.cfg_path).model
        # None would keep the runner from giving it the config's own.
        if cfg.model.get("data_preprocessor") is not None:
            student.setdefault("data_preprocessor", cfg.model.data_preprocessor)
        cfg.model = student


def use_method(cfg: Config, names: str) -> None:
    """Put a method, or several joined by ``+``, into the config of a pair.

    Args:
        cfg: Config with ``pair`` and ``data_preprocessor``; its ``model`` is replaced, and for
            methods in two phases its schedule.
        names: Names of :data:`mskd_plugin.recipes.METHODS`; or ``student`` or ``teacher``, which
            train alone.

    Raises:
        SettingError: If the config states no pair, there is no such method, or it cannot work for
            the pair.
    """
    if "pair" not in cfg:
        raise SettingError("--method", "given with a config that states a pair", repr(names))
    if names in ("student", "teacher"):
        cfg.model = alone(cfg, names)
        if names == "teacher" and "teacher_lr" in cfg.pair:
            cfg.optim_wrapper.optimizer.lr = cfg.pair.teacher_lr
        return
    parts = []
    for name in names.split("+"):
        if name not in METHODS:
            raise SettingError(
                "--method",
                f"student, teacher, or one or several (joined by +) of {', '.join(METHODS)}",
                repr(name),
                _nearest(name, METHODS),
            )
        parts.append(METHODS[name](cfg))
    for key, value in two_phases(cfg, *parts).items():
        cfg[key] = value
    cfg.model = distill(cfg, *parts)


def set_teacher(cfg: Config, teacher: str) -> None:
    """Set the teacher's weights.

    Raises:
        SettingError: If the config has no teacher, or ``teacher`` cannot be read.
    """
    if "teacher" not in cfg.model:
        raise SettingError("--teacher", "no value for a config without a teacher", repr(teacher))
    check_source(teacher, "--teacher")
    cfg.model.teacher_ckpt = teacher


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue a training.

    Args:
        cfg: The config.
        checkpoint: A checkpoint file, or ``"auto"`` for the newest in the work folder; without any
            there, training starts at the beginning, from the config's ``load_from`` if it has one.

    Raises:
        SettingError: If there is no such file.
    """
    cfg.resume = True
    if checkpoint == "auto":
        if cfg.get("load_from"):  # which the runner would resume from, whatever is in the folder
            newest = find_latest_checkpoint(cfg.work_dir)
            cfg.resume, cfg.load_from = newest is not None, newest or cfg.load_from
        return
    if not Path(checkpoint).is_file():
        raise SettingError("--resume", "a checkpoint", f"{checkpoint!r}, which is not there")
    cfg.load_from = checkpoint


def check_work_dir(cfg: Config) -> None:
    """Refuse to train into a folder that holds another run's checkpoints.

    Raises:
        SettingError: If there are checkpoints and the run does not resume from one of them.
    """
    folder, start = Path(cfg.work_dir), cfg.get("load_from")
    elsewhere = start and Path(start).resolve().parent != folder.resolve()
    if (not cfg.get("resume") or elsewhere) and (folder / "last_checkpoint").exists():
        raise SettingError(
            "--work-dir",
            "a folder without checkpoints, or --resume to continue from its own",
            f"{cfg.work_dir!r}, whose checkpoints would be overwritten",
        )


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a checked config, with its loops and its optimizer.

    Raises:
        SettingError: If data are missing, or a type of the config does not take its settings.
    """
    check_data_roots(cfg)
    if cfg.model.get("type") in FROZEN_TEACHER and cfg.model.get("teacher_ckpt"):
        check_source(cfg.model.teacher_ckpt, "model.teacher_ckpt")  # before the config is printed
    _check_optimizer(cfg)
    _check_hooks(cfg)
    try:
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
        # The runner would build these when it starts, in the same order.
        if _with_data(runner, "train") is not None:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        for stage in ("val", "test"):
            _with_data(runner, stage)
    except (KeyError, TypeError) as error:
        raise SettingError(
            "the config",
            "types that are registered, with settings that they take",
            f"{type(error).__name__}: {error}",
        ) from error
    return runner


def build_datasets(cfg: Config) -> None:
    """Build the data sets of training and validation once, which download what they can.

    Raises:
        SettingError: If data are missing.
    """
    check_data_roots(cfg)
    for stage in ("train", "val"):
        if loader := cfg.get(f"{stage}_dataloader"):
            with _data_of(stage):
                DATASETS.build(loader.dataset)


def _with_data(runner: Runner, stage: str) -> BaseLoop | None:
    """Build a stage's loop, and with it the data set."""
    with _data_of(stage):
        return getattr(runner, f"{stage}_loop")


@contextmanager
def _data_of(stage: str) -> Iterator[None]:
    """Name the setting of a data set that finds its files wanting."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError) as error:
        raise SettingError(
            f"{stage}_dataloader.dataset",
            "data that its type can read",
            f"{type(error).__name__}: {error}",
        ) from error


def _check_optimizer(cfg: Config) -> None:
    """Name an unknown optimizer; MMEngine's own error is that None is not callable."""
    wrapper = (cfg.get("optim_wrapper") or {}).get("type")
    if isinstance(wrapper, str) and OPTIM_WRAPPERS.get(wrapper) is None:
        raise SettingError(
            "optim_wrapper.type",
            "a registered optimizer wrapper",
            repr(wrapper),
            _nearest(wrapper, OPTIM_WRAPPERS.module_dict),
        )
    optimizer = (cfg.get("optim_wrapper") or {}).get("optimizer") or {}
    kind = optimizer.get("type")
    if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
        raise SettingError(
            "optim_wrapper.optimizer.type",
            "a registered optimizer",
            repr(kind),
            _nearest(kind, OPTIMIZERS.module_dict),
        )
    if optimizer.get("fused") and not computes_fused(optimizer):
        raise SettingError(
            "optim_wrapper.optimizer.fused",
            f"False, since this torch has no fused {kind} on {get_device()}",
            True,
        )


def _check_hooks(cfg: Config) -> None:
    """Name a mistyped default hook or switch before the runner makes its work folder."""
    hooks = cfg.get("default_hooks") or {}
    for name, hook in hooks.items():
        if isinstance(hook, dict) and "type" not in hook:
            raise SettingError(
                f"default_hooks.{name}",
                "a hook with a type",
                dict(hook),
                _nearest(name, {*hooks} - {name}),
            )
        if isinstance(hook, dict) and hook["type"] == "FastNetworksHook":
            HOOKS.build(hook)
