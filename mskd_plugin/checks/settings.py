"""Settings that MMEngine would stumble over late, or name badly, checked on the config alone."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import Runner
from mmrazor.models.algorithms import BaseAlgorithm, SingleTeacherDistill
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from mskd_plugin.checkpoints.weights import check_source
from mskd_plugin.config_parts import type_name
from mskd_plugin.errors import SettingError, check_count, check_file, check_output, nearest
from mskd_plugin.schedule import schedule_with_own_rate
from mskd_plugin.switches import computes_fused, find_optimizer, has_frozen_teacher

#: Whole numbers, each with the least that works.
COUNTS = {
    "train_cfg.max_epochs": 1,
    "train_cfg.max_iters": 1,
    "train_cfg.val_interval": 1,
    "optim_wrapper.accumulative_counts": 1,
    "randomness.seed": 0,
    "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": -1,
    "default_hooks.checkpoint.max_keep_ckpts": -1,
    **{f"{stage}_dataloader.batch_size": 1 for stage in ("train", "val", "test")},
    **{f"{stage}_dataloader.num_workers": 0 for stage in ("train", "val", "test")},
}
#: What each launcher tells the processes that it starts.
RANKS = {"pytorch": "RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}
#: What a distiller has by name, each with a type.
ENTRIES = ("student_recorders", "teacher_recorders", "connectors", "distill_losses")
MAX_SEED = 2**32 - 1
CLIPPING: dict[str, Callable[..., Any]] = {"norm": clip_grad_norm_, "value": clip_grad_value_}


def check_settings(cfg: Config) -> None:
    """Check a config before anything is built or written.

    Raises:
        SettingError: With the first setting that cannot work.
    """
    _check_launcher(cfg)
    check_output("--work-dir", Path(cfg.work_dir), folder=True)
    for setting, least in COUNTS.items():
        value = _value(cfg, setting)
        if value is not None:
            check_count(setting, value, least)
    seed = _value(cfg, "randomness.seed")
    if seed is not None and seed > MAX_SEED:
        raise SettingError("randomness.seed", f"a whole number of at most {MAX_SEED}", seed)
    start = cfg.get("load_from")
    if start and not isinstance(start, str):
        raise SettingError("load_from", "the path of a checkpoint", start)
    if start and "://" not in start:
        check_file("load_from", start, "a checkpoint")
    if (cfg.get("auto_scale_lr") or {}).get("enable") and (own := schedule_with_own_rate(cfg)):
        raise SettingError(
            "auto_scale_lr.enable",
            "False with a scheduler that states the learning rate by itself",
            f"True with a {own['type']} of eta_max={own['eta_max']}",
        )
    _check_algorithm(cfg)
    _check_optimizer(cfg)
    _check_hooks(cfg)


def _check_algorithm(cfg: Config) -> None:
    """Name what a distillation would not find, before the config is printed."""
    _check_distiller(cfg.model.get("distiller"))
    scope, kind = cfg.model.get("_scope_", cfg.get("default_scope")), cfg.model.get("type")
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    if not isinstance(kind, type) or not issubclass(kind, BaseAlgorithm):
        return
    preprocessor = cfg.model.get("data_preprocessor")
    if isinstance(preprocessor, dict) and "type" not in preprocessor:
        raise SettingError(
            "data_preprocessor.type",
            "stated for MMRazor's algorithms, 'mmpretrain.ClsDataPreprocessor' for one",
            None,
            "mmpretrain's classifiers alone have a default.",
        )
    source = cfg.model.get("teacher_ckpt")
    if not source or not issubclass(kind, SingleTeacherDistill):
        return
    if not isinstance(source, str):
        raise SettingError("model.teacher_ckpt", "the path of a checkpoint", source)
    # MMRazor's own algorithms read more addresses than those with a frozen teacher.
    if has_frozen_teacher(cfg.model) or "://" not in source:
        check_source(source, "model.teacher_ckpt")


def _check_distiller(distiller: Any) -> None:
    """Name entries without a type, and losses that MMRazor would never compute."""
    if not isinstance(distiller, dict):
        return
    for part in ENTRIES:
        _check_typed(f"model.distiller.{part}", distiller.get(part), "one")
    mapped = distiller.get("loss_forward_mappings") or {}
    for name in distiller.get("distill_losses") or {}:
        if name not in mapped:
            raise SettingError(
                f"model.distiller.loss_forward_mappings.{name}",
                "what the loss is computed from, since one without is left out",
                None,
            )


def _check_typed(place: str, entries: Any, kind: str) -> None:
    """Name an entry without a type, which an option makes whose name is none of the config's."""
    if not isinstance(entries, dict):
        return
    untyped = [n for n, e in entries.items() if isinstance(e, dict) and "type" not in e]
    for name in untyped:
        others = entries.keys() - {*untyped}
        raise SettingError(
            f"{place}.{name}",
            f"{kind} with a type",
            dict(entries[name]),
            nearest(name, others) or f"The config has {', '.join(sorted(others)) or 'none'}.",
        )


def _value(cfg: Config, setting: str) -> Any:
    """Return a setting, or None where the config does not state it."""
    value: Any = cfg
    for key in setting.split("."):
        value = value.get(key) if isinstance(value, (Config, ConfigDict)) else None
    return value


def _check_launcher(cfg: Config) -> None:
    """Name a launcher that has not started this process."""
    rank = RANKS.get(cfg.get("launcher", "none"))
    if rank is not None and rank not in os.environ:
        raise SettingError(
            "--launcher",
            "'none', or what has started this process (tools/dist_train.sh, tools/slurm_train.sh)",
            f"{cfg.launcher!r} without {rank} in the environment",
        )


def _check_optimizer(cfg: Config) -> None:
    """Name an unknown optimizer; MMEngine's own error is that None is not callable."""
    wrapper = cfg.get("optim_wrapper") or {}
    scope, kind = cfg.get("default_scope"), wrapper.get("type")
    with OPTIM_WRAPPERS.switch_scope_and_registry(scope) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            raise SettingError(
                "optim_wrapper.type",
                "a registered optimizer wrapper",
                repr(kind),
                nearest(kind, OPTIM_WRAPPERS.module_dict),
            )
    optimizer = wrapper.get("optimizer") or {}
    if not isinstance(optimizer, dict):
        raise SettingError("optim_wrapper.optimizer", "a dict with a type", repr(optimizer))
    kind = optimizer.get("type")
    if isinstance(kind, str) and find_optimizer(kind, scope) is None:
        raise SettingError(
            "optim_wrapper.optimizer.type",
            "a registered optimizer",
            repr(kind),
            nearest(kind, OPTIMIZERS.module_dict),
        )
    rate = optimizer.get("lr")
    if isinstance(rate, float) and not math.isfinite(rate):  # which torch takes
        raise SettingError("optim_wrapper.optimizer.lr", "a finite number", rate)
    clip = dict(wrapper.get("clip_grad") or {})
    known = inspect.signature(CLIPPING.get(clip.pop("type", "norm"), clip_grad_norm_)).parameters
    for key in clip.keys() - known.keys():  # which would be handed on in the first step
        raise SettingError(
            f"optim_wrapper.clip_grad.{key}",
            "an argument of torch's clipping",
            repr(clip[key]),
            nearest(key, known),
        )
    if optimizer.get("fused") and not computes_fused(optimizer, scope):
        raise SettingError(
            "optim_wrapper.optimizer.fused",
            f"False, since this torch has no fused {type_name(optimizer)} on {get_device()}",
            True,
        )


def _check_hooks(cfg: Config) -> None:
    """Name a mistyped default hook or switch before the runner makes its work folder."""
    hooks = cfg.get("default_hooks") or {}
    _check_typed("default_hooks", hooks, "a hook")
    for name, hook in hooks.items():
        if not isinstance(hook, dict):
            continue
        if type_name(hook) == "FastNetworksHook":
            HOOKS.build(hook)
        if type_name(hook) == "CheckpointHook":
            _check_checkpoint_hook(f"default_hooks.{name}", hook)


def _check_checkpoint_hook(setting: str, hook: ConfigDict) -> None:
    """Name what MMEngine's hook would hand on until the first checkpoint is written."""
    known = {"type", "priority", "_scope_"}  # the last from a base of another package
    for function in (CheckpointHook.__init__, Runner.save_checkpoint):
        known |= inspect.signature(function).parameters.keys()
    for key in hook.keys() - known:
        raise SettingError(
            f"{setting}.{key}", "a setting of CheckpointHook", repr(hook[key]), nearest(key, known)
        )
