"""The checkpoint that a training continues from, and the weights that one starts from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mskd_plugin.checkpoints.newest import newest_checkpoint
from mskd_plugin.checkpoints.stated_config import stated_config
from mskd_plugin.checkpoints.weights import SAFETENSORS, differences, read_checkpoint, weights_of
from mskd_plugin.config_parts import last_name, type_name
from mskd_plugin.errors import SettingError
from mskd_plugin.schedule import stated_schedulers
from mskd_plugin.unwrapped import model_of

#: The parts of a distiller whose types tell a method from another.
METHOD_PARTS = ("distill_losses.", "connectors.")


class Resumed(NamedTuple):
    """What is told of the checkpoint that a training continues from.

    Attributes:
        changes: The settings of the distiller that differ, its weights and temperatures for
            example; empty where there are none.
        optimizer: What the optimizer wrapper saved.
        restored: The settings of optimizer and schedules that differ, and that the checkpoint's
            state replaces; empty where there are none.
        lacking: The parts that the config has and the checkpoint was saved without; empty where
            there are none.
    """

    changes: str
    optimizer: Mapping[str, Any]
    restored: str = ""
    lacking: str = ""


def check_resumed(cfg: Config) -> Resumed | None:
    """Check that the checkpoint that a training continues from, if any, is one of this training.

    That is: it holds the progress of a training, and the weights fit the config's networks; and
    the config inside it, where it states one, has the same losses, connectors and optimizer. The
    schedule, the switches, the data and the paths may change. Files that are not on this machine,
    and those of other runners than MMEngine's own, are not looked at: then nothing is returned.

    Raises:
        SettingError: Naming ``--resume``.
    """
    if not cfg.get("resume") or "runner_type" in cfg:
        return None
    source = cfg.get("load_from") or newest_checkpoint(cfg.work_dir)
    if source is None or "://" in source:
        return None
    checkpoint = read_checkpoint(source, setting="--resume")
    _check_progress(checkpoint, source)
    _check_optimizer(cfg, checkpoint, source)
    changes = _check_method(cfg, checkpoint, source)
    _check_weights(cfg, checkpoint["state_dict"], source)
    parts = {"optimizer": "optim_wrapper", "param_schedulers": "param_scheduler"}
    lacking = [part for part, of in parts.items() if cfg.get(of) and part not in checkpoint]
    return Resumed(
        changes,
        checkpoint.get("optimizer") or {},
        _restored(cfg, checkpoint),
        " and ".join(lacking),
    )


def check_groups(wrapper: OptimWrapper | OptimWrapperDict, resumed: Resumed | None) -> None:
    """Check that the optimizer groups its parameters as the one that was saved did.

    Raises:
        SettingError: Naming ``--resume``.
    """
    now = _group_sizes(wrapper.state_dict())
    before = _group_sizes(resumed.optimizer) if resumed and resumed.optimizer else now
    if before != now:
        raise SettingError(
            "--resume",
            f"a checkpoint with this config's groups of parameters, {now}",
            f"one with {before}",
            "Settings of optim_wrapper that choose parameters stay as they were.",
        )


def _group_sizes(state: Mapping[str, Any]) -> list[int] | None:
    """Return how many parameters each group has; None of several optimizers."""
    groups = state.get("param_groups")
    return [len(group["params"]) for group in groups] if groups else None


def check_initial_weights(runner: Runner) -> None:
    """Check that some of the weights that a training starts from have a place in the model.

    MMEngine would log what is missing, and start all the same.

    Raises:
        SettingError: Naming ``load_from``.
    """
    source = runner._load_from
    if runner._resume or not source or "://" in source:
        return
    if source.endswith(SAFETENSORS):
        raise SettingError(
            "load_from",
            "a file that MMEngine reads, in the format of torch.save",
            repr(source),
            "A teacher's weights may have this format: --teacher FILE.",
        )
    weights = weights_of(read_checkpoint(source, setting="load_from"), source, setting="load_from")
    model = model_of(runner)
    own = model.state_dict()
    if not any(key in own for key in weights):
        raise SettingError(
            "load_from",
            f"weights of the whole model, with keys like {next(iter(own))}",
            f"{source!r} with the keys {', '.join(list(weights)[:3])}, ...",
        )


def _check_progress(checkpoint: Mapping[str, Any], source: str) -> None:
    """Check that there is all that MMEngine resumes from, and nothing that it would run."""
    parts = ("state_dict", "meta", "message_hub")
    missing = [part for part in parts if not isinstance(checkpoint.get(part), Mapping)]
    if "meta" not in missing:
        missing += [f"meta.{key}" for key in ("epoch", "iter") if key not in checkpoint["meta"]]
    if missing:
        raise SettingError(
            "--resume",
            "a checkpoint that a training wrote, with its progress",
            f"{source!r}, which has no {', '.join(missing)}",
            "Weights alone begin a new training: those of the config's model by --cfg-options "
            "load_from=FILE, a teacher's by --teacher FILE.",
        )
    if "config" in checkpoint["meta"]:
        raise SettingError(
            "--resume",
            "a checkpoint without meta.config, whose text MMEngine would run",
            f"{source!r} with one",
        )


def _check_optimizer(cfg: Config, checkpoint: Mapping[str, Any], source: str) -> None:
    """Compare the optimizer's type with that of the config inside the checkpoint."""
    of = (stated_config(checkpoint), cfg)
    before, now = ((c.get("optim_wrapper") or {}).get("optimizer") for c in of)
    if before and now and type_name(before) != type_name(now):
        raise SettingError(
            "--resume",
            f"a checkpoint of this config's optimizer, {type_name(now)}",
            f"{source!r} of {type_name(before)}",
        )


def _check_method(cfg: Config, checkpoint: Mapping[str, Any], source: str) -> str:
    """Compare the distiller with that of the config inside the checkpoint."""
    model = stated_config(checkpoint).get("model")
    if not isinstance(model, dict):
        return ""
    changed = _changed(*(of.get("distiller") for of in (model, cfg.model)))
    of_method = [
        text
        for key, text in changed.items()
        if key.startswith(METHOD_PARTS) and key.endswith(".type")
    ]
    if of_method:
        raise SettingError(
            "--resume",
            "a checkpoint of this config's method",
            f"{source!r}, whose distiller had other parts: {'; '.join(of_method)}",
            "Without --resume and with a --work-dir of its own the method trains from the start.",
        )
    return "; ".join(changed.values())


def _restored(cfg: Config, checkpoint: Mapping[str, Any]) -> str:
    """Compare the settings that MMEngine restores, those of the config being without effect."""
    stated = stated_config(checkpoint)
    if not stated:
        return ""

    def schedules_of(of: Mapping[str, Any]) -> list[Any]:
        loop = of.get("train_cfg") or {}
        end = loop.get("max_epochs", loop.get("max_iters"))  # where MMEngine lets them end
        return [{"end": end, **one} for one in stated_schedulers(of)]

    def optimizer_of(of: Mapping[str, Any]) -> dict[str, Any]:
        optimizer = (of.get("optim_wrapper") or {}).get("optimizer") or {}
        # Kernels follow the config (speed.keep_kernels).
        return {k: v for k, v in optimizer.items() if k not in ("fused", "foreach")}

    pairs = list(zip(schedules_of(stated), schedules_of(cfg)))  # as MMEngine restores them
    before, now = (
        {
            "optim_wrapper.optimizer": optimizer_of(of) if "optimizer" in checkpoint else {},
            "param_scheduler": [p[i] for p in pairs] if "param_schedulers" in checkpoint else [],
        }
        for i, of in enumerate((stated, cfg))
    )
    return "; ".join(_changed(before, now).values())


def _changed(before: Any, now: Any) -> dict[str, str]:
    """Tell what nested settings differ, by their dotted names."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return {
        key: f"{key} is {new.get(key, 'absent')} and was {old.get(key, 'absent')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    }


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by their dotted names, types without their scopes and modules."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(part, f"{path}.{key}" if path else str(key))
    elif f".{path}".endswith(".type"):
        yield path, last_name(value)
    else:
        yield path, value


def _check_weights(cfg: Config, weights: Mapping[str, Any], source: str) -> None:
    """Compare the weights with those of the config's model, which MMEngine would not."""
    model = copy.deepcopy(cfg.model)
    if model.get("teacher_ckpt"):
        model.teacher_ckpt = None  # not to read, or download, the file for its shapes
    if scope := cfg.get("default_scope", "mmengine"):  # none in configs that import their types
        init_default_scope(scope)
    network = MODELS.build(model)
    # Checkpoints need not hold a frozen teacher, whose weights are read from their own file.
    left_out = "teacher." if not getattr(network, "teacher_trainable", True) else ()
    own, found = (
        {key: value for key, value in part.items() if not key.startswith(left_out)}
        for part in (network.state_dict(), weights)
    )
    if told := differences(own, found):
        raise SettingError(
            "--resume", "a checkpoint of this config's networks", f"{source!r}, with {told}"
        )
