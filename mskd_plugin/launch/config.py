"""From a config file and the options of the command line to the config that runs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.runner import Runner

from mskd_plugin.checkpoints.weights import check_source
from mskd_plugin.config_parts import type_name
from mskd_plugin.errors import SettingError, check_file, check_flag, nearest
from mskd_plugin.recipes import METHODS, alone, distill, two_phases
from mskd_plugin.recipes.assemble import ALONE
from mskd_plugin.switches import (
    FROZEN_TEACHER,
    fast_settings,
    has_frozen_teacher,
    use_fast,
    use_in_memory,
)

#: What a model is made from: of the base of a pair, before the model is there.
MADE_FROM = ("pair", "num_train_images")
#: What MMEngine's runner reads from a config, without a parameter of its own for some of it, and
#: what this plugin does.
READ = {
    *inspect.signature(Runner.__init__).parameters,
    "activation_checkpointing",
    "compile",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "in_memory",
    "model_wrapper_cfg",
    "runner_type",
    "sync_bn",
    *MADE_FROM,
} - {"self", "cfg", "launcher"}
TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper")
TESTING = ("test_dataloader", "test_cfg", "test_evaluator")
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")


def read_config(path: str | Path, setting: str = "config") -> Config:
    """Read a config file.

    Args:
        path: The file.
        setting: Name of the setting that it comes from, for errors.

    Raises:
        SettingError: If the file is missing or no config, or it or one of its bases cannot be read.
    """
    name = repr(str(path))
    if check_file(setting, path, "a config file").suffix not in CONFIG_SUFFIXES:
        raise SettingError(setting, f"a file in {', '.join(CONFIG_SUFFIXES)}", name)
    try:
        return Config.fromfile(path)
    except SettingError:  # of a recipe in the config
        raise
    except Exception as error:  # a config in Python may raise anything
        where = ""  # the config or a base of it, and the line if it ran
        for frame, line in walk_tb(error.__traceback__):
            if frame.f_code.co_name == "_file2dict":
                where = f"{frame.f_locals.get('filename')}: "
            elif frame.f_code.co_name == "<module>":
                where = f"{frame.f_code.co_filename}, line {line}: "
                break
        cause: BaseException = error
        while isinstance(cause, ImportError) and cause.__context__:  # of what is imported inside
            cause = cause.__context__
        message = " ".join(str(cause).split())  # YAML's has several lines
        raise SettingError(
            setting,
            "a config that can be read",
            f"{name} ({where}{type(cause).__name__}: {message})",
        ) from error


def load_config(args: argparse.Namespace, parts: Sequence[str] = ()) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_common_options`, and ``args.fast``
    and ``args.in_memory`` where there are any.

    Args:
        args: The command line.
        parts: What the config must have for what the tool does, :data:`TRAINING` or
            :data:`TESTING`.

    Raises:
        SettingError: If the file is missing or no config or lacks a part, or an option begins with
            a key that nobody reads, goes into a setting that has no parts, or comes too late for
            the model that is made from it.
    """
    cfg = read_config(args.config)
    stem = Path(args.config).stem
    early = {key: value for key, value in args.cfg_options.items() if _top(key) in MADE_FROM}
    if getattr(args, "method", None):
        _merge(cfg, early, args.config)
        use_method(cfg, args.method)
        stem = f"{args.method}_{stem}"
    elif cfg.get("model") is None:
        raise SettingError("--method", f"given with {args.config}, which states a pair alone", None)
    elif early:
        raise SettingError(
            "--cfg-options",
            f"no settings that the model of {args.config} is already made from",
            ", ".join(early),
            "They take effect with the config of a pair, configs/_base_/pairs/*.py, and --method.",
        )
    for part in parts:
        if cfg.get(part) is None:
            raise SettingError(part, f"a part of {args.config}", None)
    _check_model(cfg)
    state_preprocessor_once(cfg)
    if getattr(args, "fast", False) and "fast" not in cfg:
        cfg.fast = fast_settings()
    if "fast" in cfg:
        use_fast(cfg, cfg.pop("fast"))
    options = dict(args.cfg_options)
    moved = [key for key in options if _top(key) == "data_preprocessor"]  # it is in the model
    _merge(cfg, {**{f"model.{key}": options.pop(key) for key in moved}, **options}, args.config)
    _check_model(cfg)  # again: an option may have replaced it
    # After the options, which name the data sets' own settings.
    in_memory = check_flag("in_memory", cfg.pop("in_memory", False))
    if in_memory or getattr(args, "in_memory", False):
        use_in_memory(cfg)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{stem}"
    return cfg


def _merge(cfg: Config, options: dict[str, Any], name: str) -> None:
    """Merge ``--cfg-options`` into the config that ``name`` stands for."""
    for key in options:
        top = _top(key)
        if top in READ:
            continue
        if top == "launcher":
            hint = "--launcher sets it."
        elif top in cfg:  # epochs=20, say, which the file itself puts into other settings
            hint = "Variables of the config's own are changed in the file, which is read before."
        else:
            hint = nearest(top, READ)
        raise SettingError(
            "--cfg-options", "settings that MMEngine's runner or mskd_plugin reads", repr(key), hint
        )
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise SettingError("--cfg-options", f"settings of {name}", error) from error


def _check_model(cfg: Config) -> None:
    if not isinstance(cfg.model, dict):
        raise SettingError("model", "a dict with a type", cfg.model)


def _top(key: str) -> str:
    return key.split(".")[0]


def is_distillation(model: ConfigDict) -> bool:
    """Whether a model config is that of a distillation algorithm with a student inside."""
    return "architecture" in model


def image_side(dataloader: Mapping[str, Any]) -> int | None:
    """Return the side of the square crops of a training's images; None where there are none."""
    dataset = dataloader.get("dataset") or {}
    crops = [dataset]  # InMemoryImages crops by itself
    while dataset:
        pipeline = dataset.get("pipeline") or []
        crops += [step for step in reversed(pipeline) if "Crop" in type_name(step)]
        dataset = dataset.get("dataset")  # inside a wrapper
    for crop in crops:
        side = crop.get("crop_size", crop.get("scale"))
        if side is not None:
            return side if isinstance(side, int) else side[0]
    return None


def state_preprocessor_once(cfg: Config) -> None:
    """Move the config's data preprocessor into a model without one, as the runner would.

    Beside a model's own, even one that is None, the config's has no effect, and goes.
    """
    stated = cfg.pop("data_preprocessor", None)
    if stated is not None:
        cfg.model.setdefault("data_preprocessor", stated)


def keep_student_only(cfg: Config) -> None:
    """Put the student in the algorithm's place, for tools that need no teacher.

    It gets the images as in training: by the algorithm's data preprocessor, and by its own where
    the algorithm's is None.
    """
    state_preprocessor_once(cfg)
    if is_distillation(cfg.model):
        student = cfg.model.architecture
        if "cfg_path" in student:  # MMRazor's short form for a config of another package
            student = get_config(student.cfg_path).model
        if cfg.model.get("data_preprocessor") is not None:
            student.data_preprocessor = cfg.model.data_preprocessor
        cfg.model = student
    if cfg.model.get("data_preprocessor"):
        cfg.model.data_preprocessor = for_classifier(cfg.model.data_preprocessor)


def for_classifier(preprocessor: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the data preprocessor of a distillation as one that mmpretrain's classifiers take.

    MMRazor's own configs normalise by MMEngine's ``ImgDataPreprocessor``, to which a classifier
    would hand batch augmentations.
    """
    if type_name(preprocessor) != "ImgDataPreprocessor":
        return preprocessor
    settings = dict(preprocessor)
    flips = [settings.pop(key, False) for key in ("bgr_to_rgb", "rgb_to_bgr")]
    settings.pop("non_blocking", None)
    return {**settings, "type": "mmpretrain.ClsDataPreprocessor", "to_rgb": any(flips)}


def use_method(cfg: Config, names: str) -> None:
    """Put a method, or several joined by ``+``, into the config of a pair.

    Args:
        cfg: Config with ``pair`` and ``data_preprocessor``; its ``model`` is replaced, and for
            methods in two phases its schedule.
        names: Names of :data:`mskd_plugin.recipes.METHODS`; or ``student`` or ``teacher``, which
            train alone.

    Raises:
        SettingError: If the config states no pair or has a model already, there is no such method,
            one is named twice, or it cannot work for the pair.
    """
    if "pair" not in cfg:
        raise SettingError("--method", "given with a config that states a pair", repr(names))
    if "model" in cfg:  # whose method may have changed the schedule, too
        raise SettingError(
            "--method",
            "given with the config of a pair alone, configs/_base_/pairs/*.py",
            f"{names!r} with a config that has a model already",
        )
    if names in ALONE:
        cfg.model = alone(cfg, names)
        if names == "teacher" and "teacher_lr" in cfg.pair:
            cfg.optim_wrapper.optimizer.lr = cfg.pair.teacher_lr
        return
    parts, listed = [], names.split("+")
    if len(set(listed)) < len(listed):
        raise SettingError("--method", "different methods joined by +", repr(names))
    for name in listed:
        if name not in METHODS:
            raise SettingError(
                "--method",
                f"{', '.join(ALONE)}, or one or several (joined by +) of "
                + ", ".join(sorted(METHODS)),
                repr(name),
                nearest(name, METHODS),
            )
        parts.append(METHODS[name](cfg))
    for key, value in two_phases(cfg, *parts).items():
        cfg[key] = value
    cfg.model = distill(cfg, *parts)


def set_teacher(cfg: Config, teacher: str) -> None:
    """Set the teacher's weights.

    Raises:
        SettingError: If the config has no teacher or an algorithm that would not notice weights
            which do not fit, or ``teacher`` cannot be read.
    """
    if "teacher" not in cfg.model:
        raise SettingError("--teacher", "no value for a config without a teacher", repr(teacher))
    if not has_frozen_teacher(cfg.model):
        raise SettingError(
            "--teacher",
            f"given with a model of {' or '.join(FROZEN_TEACHER)}, which load weights strictly",
            f"a {cfg.model.get('type')}",
            "--cfg-options model.type=FrozenTeacherDistill takes the place of SingleTeacherDistill "
            "with the same settings.",
        )
    check_source(teacher, "--teacher")
    cfg.model.teacher_ckpt = teacher
