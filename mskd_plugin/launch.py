"""What the command line tools share: a checked config with their options, and its runner."""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.preflight import check_data_roots
from mskd_plugin.recipes import METHODS, alone, distill, two_phases

#: What MMEngine's runner reads from a config without a parameter of its own for it.
RUNNER_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    "activation_checkpointing",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "sync_bn",
} - {"self", "cfg"}
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
#: What ``--fast`` sets.
FAST = Path(__file__).resolve().parents[1] / "configs" / "_base_" / "fast.py"
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
        "--work-dir", help="folder for logs and checkpoints (default: work_dirs/<config's name>)"
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


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_common_options`, and ``args.fast``
    and ``args.in_memory`` where there are any.

    Raises:
        SettingError: If the file is missing or no config, or an option begins with a key that the
            config does not have, or goes into a setting that has no parts.
    """
    path = Path(args.config)
    if not path.is_file():
        raise SettingError("config", "a config file", f"{args.config!r}, which is not there")
    if path.suffix not in CONFIG_SUFFIXES:
        raise SettingError("config", f"a file in {', '.join(CONFIG_SUFFIXES)}", repr(args.config))
    cfg = Config.fromfile(path)
    stem = path.stem
    if getattr(args, "method", None):
        use_method(cfg, args.method)
        stem = f"{args.method}_{stem}"
    elif "model" not in cfg:
        raise SettingError("--method", f"given with {args.config}, which states a pair alone", None)
    if getattr(args, "fast", False) and "fast" not in cfg:
        cfg.fast = Config.fromfile(FAST).fast
    if "fast" in cfg:
        use_fast(cfg, cfg.pop("fast"))
    known = {*cfg, *RUNNER_KEYS}
    for key in args.cfg_options:
        top = key.split(".")[0]
        if top not in known:
            raise SettingError(
                "--cfg-options",
                f"keys of {args.config} or of MMEngine's runner",
                repr(key),
                _nearest(top, known),
            )
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (KeyError, TypeError) as error:
        raise SettingError("--cfg-options", f"settings of {args.config}", error) from error
    # After the options, which name the data sets' own settings.
    if cfg.pop("in_memory", False) or getattr(args, "in_memory", False):
        use_in_memory(cfg)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{stem}"
    return cfg


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
        SettingError: If the config has no teacher, or ``teacher`` is a path to no file.
    """
    if "teacher" not in cfg.model:
        raise SettingError("--teacher", "no value for a config without a teacher", repr(teacher))
    if "://" not in teacher and not Path(teacher).expanduser().is_file():
        raise SettingError(
            "--teacher", "a file, a URL or torchvision://NAME", f"{teacher!r}, which is not there"
        )
    cfg.model.teacher_ckpt = teacher


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue a training.

    Args:
        cfg: The config.
        checkpoint: A checkpoint file, or ``"auto"`` for the newest in the work folder; without any
            there, training starts at the beginning.

    Raises:
        SettingError: If there is no such file.
    """
    cfg.resume = True
    if checkpoint == "auto":
        return
    if not Path(checkpoint).is_file():
        raise SettingError("--resume", "a checkpoint", f"{checkpoint!r}, which is not there")
    cfg.load_from = checkpoint


def scale_learning_rate(cfg: Config) -> None:
    """Let the runner scale the learning rate linearly from the base batch size to the real one.

    Raises:
        SettingError: If the config does not state its base batch size.
    """
    if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
        raise SettingError(
            "auto_scale_lr.base_batch_size",
            "the batch size that the learning rate is meant for, with --auto-scale-lr",
            None,
        )
    cfg.auto_scale_lr.enable = True


def use_mixed_precision(cfg: Config) -> None:
    """Train under autocast: bfloat16 where the device has it, else float16 with loss scaling.

    Raises:
        SettingError: If the config's optimizer wrapper is not the plain ``OptimWrapper``.
    """
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind in ("BFloat16OptimWrapper", "AmpOptimWrapper"):
        return
    if kind != "OptimWrapper":
        raise SettingError("optim_wrapper.type", "'OptimWrapper' with --amp or --fast", repr(kind))
    if torch.cuda.is_available() and not _computes_bfloat16():
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    else:
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"


def _computes_bfloat16() -> bool:
    """Whether the current GPU has bfloat16 in hardware.

    ``torch.cuda.is_bf16_supported`` counts emulation, too, and cannot be asked not to before torch
    2.4.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


def use_fast(cfg: Config, settings: dict[str, Any]) -> None:
    """Set the switches of the fast loop, those of them that the config has a use for.

    Args:
        cfg: The config.
        settings: Parts of a config to merge, as ``configs/_base_/fast.py`` states them. Mixed
            precision is chosen as by ``--amp``. ``fused`` is left out where torch has no fused
            kernels for the optimizer on this device, ``model`` where no frozen teacher is distilled
            or its outputs are delivered to the student, and ``train_dataloader`` and
            ``data_preprocessor`` where those of the config do more than the usual.

    Raises:
        SettingError: See :func:`use_mixed_precision`.
    """
    settings = copy.deepcopy(dict(settings))
    wrapper = settings.get("optim_wrapper", {})
    if wrapper.pop("type", None) is not None:
        use_mixed_precision(cfg)
    if wrapper.get("optimizer", {}).get("fused") and not _computes_fused(
        cfg.optim_wrapper.optimizer
    ):
        del wrapper["optimizer"]["fused"]
    if not _distils_frozen_teacher(cfg.model):
        settings.pop("model", None)
    preprocessor = settings.pop("data_preprocessor", {}).get("type")
    if preprocessor and _labels_are_classes(cfg):
        _set_preprocessor(cfg, preprocessor)
    else:
        settings.pop("train_dataloader", None)
    cfg.merge_from_dict(settings)


def _labels_are_classes(cfg: Config) -> bool:
    """Whether training images only get normalised and collated, each with its class."""
    preprocessor = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
    usual = {"type", "mean", "std", "to_rgb", "num_classes"}
    kind = str(preprocessor.get("type", "")).split(".")[-1]
    collate = cfg.get("train_dataloader", {}).get("collate_fn", {}).get("type")
    return (
        kind == "ClsDataPreprocessor"
        and preprocessor.keys() <= usual
        and (collate == "default_collate")
    )


def _set_preprocessor(cfg: Config, kind: str) -> None:
    """Put another type in the place of ``ClsDataPreprocessor``, its scope unchanged."""
    for preprocessor in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")):
        old = (preprocessor or {}).get("type", "")
        if isinstance(old, str) and old.split(".")[-1] == "ClsDataPreprocessor":
            preprocessor.type = old.replace("ClsDataPreprocessor", kind)


def _distils_frozen_teacher(model: ConfigDict) -> bool:
    return (
        model.get("type") in ("FrozenTeacherDistill", "TwoPhaseDistill")
        and not model.get("teacher_trainable", False)
        and not model.distiller.get("distill_deliveries")
    )


def _computes_fused(optimizer: ConfigDict) -> bool:
    """Whether torch has fused kernels for an optimizer on the device that trains.

    On a GPU every optimizer with the argument has them, SGD since torch 2.3. CPUs are asked; they
    have them since 2.4.
    """
    kind = optimizer.get("type")
    found = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    if found is None or "fused" not in inspect.signature(found).parameters:
        return False
    if get_device() == "cuda":  # not asked: the process has not chosen its own GPU yet
        return True
    parameter = nn.Parameter(torch.zeros(1, device=get_device()))
    try:
        OPTIMIZERS.build({**optimizer, "params": [parameter], "fused": True})
    except RuntimeError:
        return False
    return True


def use_in_memory(cfg: Config) -> None:
    """Hold small images in memory on the training device, and crop and flip them by the batch.

    ``RandomCrop`` and ``RandomFlip`` of the training pipeline become settings of
    :class:`~mskd_plugin.datasets.InMemoryImages` around each data set. What is left of the
    pipelines runs once for each image.

    Args:
        cfg: The config. Its data loaders and data preprocessors are changed; loaders whose images
            are in memory already stay.

    Raises:
        SettingError: If crops and flips are not the last random transforms of the training pipeline
            or have other settings than ``crop_size``, ``padding`` and ``prob``, or the data
            preprocessor mixes images.
    """
    for stage in ("train", "val", "test"):
        loader = cfg.get(f"{stage}_dataloader")
        if not loader or loader.dataset.type == "InMemoryImages":
            continue
        training = stage == "train"
        settings = _take_crop_and_flip(loader.dataset) if training else {"batch_labels": False}
        loader.dataset = {"type": "InMemoryImages", "dataset": loader.dataset, **settings}
        loader.update(num_workers=0, persistent_workers=False, pin_memory=False)
        loader.collate_fn = {"type": "collate_batch"}
        loader.pop("prefetch_factor", None)
    for preprocessor in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")):
        if not preprocessor:
            continue
        for key in ("batch_augments", "to_onehot"):
            if preprocessor.get(key):
                raise SettingError(
                    f"data_preprocessor.{key}",
                    "off with images in memory, whose labels come as one tensor",
                    preprocessor[key],
                )
    _set_preprocessor(cfg, "BatchDataPreprocessor")


def _take_crop_and_flip(dataset: ConfigDict) -> dict[str, Any]:
    """Take the crop and the flip out of a training pipeline, as settings of ``InMemoryImages``."""
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset.dataset  # inside a wrapper
    pipeline, settings = list(dataset.get("pipeline", [])), {}
    packing = pipeline.pop() if pipeline else {}
    expected = {"RandomCrop", "RandomFlip"}
    while pipeline and (kind := str(pipeline[-1]["type"]).split(".")[-1]) in expected:
        expected.remove(kind)  # a second one stays, and InMemoryImages refuses it
        transform = pipeline.pop()
        given = {"direction": "horizontal", **transform}
        known = {"type", "direction", "crop_size", "padding"}
        if kind == "RandomCrop":
            settings["crop_size"] = given["crop_size"]
            settings["padding"] = given.get("padding") or 0
        else:
            settings["flip_prob"] = given.get("prob")
            known = {"type", "direction", "prob"}
        if given.keys() - known or given["direction"] != "horizontal" or None in settings.values():
            raise SettingError(
                "train_dataloader.dataset.pipeline",
                "one whose RandomCrop has crop_size and padding alone, and whose RandomFlip a prob "
                "and no direction but horizontal, to be held in memory",
                dict(transform),
            )
    dataset.pipeline = [*pipeline, packing]
    return settings


def check_work_dir(cfg: Config) -> None:
    """Refuse to train into a folder that holds another run's checkpoints.

    Raises:
        SettingError: If there are checkpoints and the run neither resumes nor starts elsewhere.
    """
    if not cfg.get("resume") and (Path(cfg.work_dir) / "last_checkpoint").exists():
        raise SettingError(
            "--work-dir",
            "a folder without checkpoints, or --resume to continue",
            f"{cfg.work_dir!r}, whose checkpoints would be overwritten",
        )


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a checked config, with its loops and its optimizer.

    Raises:
        SettingError: If data are missing, or a type of the config does not take its settings.
    """
    check_data_roots(cfg)
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


def _with_data(runner: Runner, stage: str) -> BaseLoop | None:
    """Build a stage's loop, and with it the data set, which may find its files wanting."""
    try:
        return getattr(runner, f"{stage}_loop")
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
    if optimizer.get("fused") and not _computes_fused(optimizer):
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
