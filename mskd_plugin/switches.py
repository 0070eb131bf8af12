"""The switches of a training: each changes a config that states none of it."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import OPTIMIZERS
from torch import nn

from mskd_plugin.config_parts import inner_dataset, type_name
from mskd_plugin.errors import SettingError
from mskd_plugin.schedule import schedule_with_own_rate
from mskd_plugin.speed import COMPILES_BACKBONES, COMPILES_LOSSES

#: What ``--fast`` sets.
FAST = Path(__file__).resolve().parents[1] / "configs" / "_base_" / "fast.py"
#: Algorithms whose teacher is not trained.
FROZEN_TEACHER = ("FrozenTeacherDistill", "TwoPhaseDistill")


def scale_learning_rate(cfg: Config) -> None:
    """Let the runner scale the learning rate linearly from the base batch size to the real one.

    MMEngine's ratio leaves accumulated batches out; the base batch size is divided by their number.

    Raises:
        SettingError: If the config does not state its base batch size, or a scheduler states the
            learning rate by itself.
    """
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise SettingError(
            "auto_scale_lr.base_batch_size",
            "the batch size that the learning rate is meant for, with --auto-scale-lr",
            None,
        )
    if found := schedule_with_own_rate(cfg):
        raise SettingError(
            "--auto-scale-lr",
            "given with schedulers that follow the optimizer's learning rate",
            f"a {found['type']}, whose own eta_max={found['eta_max']} is the rate",
        )
    cfg.auto_scale_lr.enable = True
    accumulated = cfg.optim_wrapper.get("accumulative_counts", 1)
    if accumulated > 1:
        cfg.auto_scale_lr.base_batch_size /= accumulated


def use_mixed_precision(cfg: Config) -> None:
    """Train under autocast: bfloat16 where the device has it, else float16 with loss scaling.

    Raises:
        SettingError: If the config's optimizer wrapper is not the plain ``OptimWrapper``.
    """
    kind = type_name(cfg.optim_wrapper, default="OptimWrapper")
    if kind in ("BFloat16OptimWrapper", "AmpOptimWrapper"):
        return
    if kind != "OptimWrapper":
        raise SettingError("optim_wrapper.type", "'OptimWrapper' with --amp or --fast", repr(kind))
    if "optimizer" not in cfg.optim_wrapper:
        raise SettingError(
            "optim_wrapper",
            "a wrapper of one optimizer with --amp or --fast",
            f"one with the keys {', '.join(cfg.optim_wrapper)}",
        )
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


def fast_settings() -> ConfigDict:
    """Return the parts of a config that ``--fast`` merges.

    Raises:
        SettingError: If the package is installed without its configs.
    """
    if not FAST.is_file():
        raise SettingError(
            "--fast",
            "given with an mskd_plugin that has its configs beside it (pip install -e .)",
            f"one without {FAST}",
        )
    return Config.fromfile(FAST).fast


def use_fast(cfg: Config, settings: dict[str, Any]) -> None:
    """Set the switches of the fast loop, those of them that the config has a use for.

    Args:
        cfg: The config, the data preprocessor in its model.
        settings: Parts of a config to merge, as ``configs/_base_/fast.py`` states them. Mixed
            precision is chosen as by ``--amp``. ``fused`` is left out where torch has no fused
            kernels for the optimizer on this device, ``model`` where no frozen teacher is distilled
            or its outputs are delivered to the student, ``compile`` before torch 2.4,
            ``compile_losses`` before torch 2.9, and ``train_dataloader`` and ``data_preprocessor``
            where those of the config do more than the usual.

    Raises:
        SettingError: See :func:`use_mixed_precision`.
    """
    settings = copy.deepcopy(dict(settings))
    wrapper = settings.get("optim_wrapper", {})
    if wrapper.pop("type", None) is not None:
        use_mixed_precision(cfg)
    if wrapper.get("optimizer", {}).get("fused") and not computes_fused(
        cfg.optim_wrapper.optimizer, cfg.get("default_scope")
    ):
        del wrapper["optimizer"]["fused"]
    if not _distils_frozen_teacher(cfg.model):
        settings.pop("model", None)
    networks = settings.get("default_hooks", {}).get("networks", {})
    if not COMPILES_BACKBONES:
        networks.pop("compile", None)
    if not COMPILES_LOSSES:
        networks.pop("compile_losses", None)
    preprocessor = settings.pop("data_preprocessor", {}).get("type")
    if preprocessor and _labels_are_classes(cfg):
        cfg.model.data_preprocessor.type = preprocessor
    else:
        settings.pop("train_dataloader", None)
    _make_way(cfg, settings)
    cfg.merge_from_dict(settings)


def _make_way(cfg: Config | ConfigDict, settings: dict[str, Any]) -> None:
    """Drop what a dict cannot be merged into, ``compile=True`` for one."""
    for key in settings.keys() & cfg.keys():
        if isinstance(settings[key], dict) and isinstance(cfg[key], dict):
            _make_way(cfg[key], settings[key])
        elif isinstance(settings[key], dict):
            cfg.pop(key)


def _labels_are_classes(cfg: Config) -> bool:
    """Whether training images only get normalised and collated, each with its class."""
    preprocessor = cfg.model.get("data_preprocessor") or {}
    usual = {"type", "mean", "std", "to_rgb", "num_classes"}
    collate = type_name(cfg.get("train_dataloader", {}).get("collate_fn", {}))
    return (
        type_name(preprocessor) == "ClsDataPreprocessor"
        and preprocessor.keys() <= usual
        and collate == "default_collate"
    )


def has_frozen_teacher(model: ConfigDict) -> bool:
    """Whether a model config is of one of :data:`FROZEN_TEACHER`, by name or as a class."""
    return type_name(model) in FROZEN_TEACHER


def _distils_frozen_teacher(model: ConfigDict) -> bool:
    return (
        has_frozen_teacher(model)
        and not model.get("teacher_trainable", False)
        and not model.distiller.get("distill_deliveries")
    )


def find_optimizer(kind: str | type, scope: str | None = None) -> type | None:
    """Return the class of an optimizer of MMEngine, or of the package that ``scope`` names."""
    if not isinstance(kind, str):
        return kind
    with OPTIMIZERS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind)


def computes_fused(optimizer: ConfigDict, scope: str | None = None) -> bool:
    """Whether torch has fused kernels for an optimizer on the device that trains.

    On a GPU every optimizer with the argument has them, SGD since torch 2.3. CPUs are asked; they
    have them since 2.4.

    Args:
        optimizer: Its settings.
        scope: The config's ``default_scope``.
    """
    found = find_optimizer(optimizer.get("type"), scope)
    if found is None or "fused" not in inspect.signature(found).parameters:
        return False
    if get_device() == "cuda":  # not asked: the process has not chosen its own GPU yet
        return True
    parameter = nn.Parameter(torch.zeros(1, device=get_device()))
    settings = {key: value for key, value in optimizer.items() if key not in ("type", "_scope_")}
    try:
        found([parameter], **{**settings, "fused": True})
    except RuntimeError:
        return False
    return True


def use_in_memory(cfg: Config) -> None:
    """Hold small images in memory on the training device, and crop and flip them by the batch.

    ``RandomCrop`` and ``RandomFlip`` of the training pipeline become settings of
    :class:`~mskd_plugin.datasets.InMemoryImages` around each data set. What is left of the
    pipelines runs once for each image. Without an ``EpochSeedHook`` the config gets one.

    Args:
        cfg: The config, the data preprocessor in its model. Its data loaders and that are changed;
            loaders whose images are in memory already stay.

    Raises:
        SettingError: If crops and flips are not the last random transforms of the training pipeline
            or have other settings than ``crop_size``, ``padding`` and ``prob``, or the data
            preprocessor mixes images.
    """
    for stage in ("train", "val", "test"):
        loader = cfg.get(f"{stage}_dataloader")
        if not loader or type_name(loader.dataset) == "InMemoryImages":
            continue
        training = stage == "train"
        settings = _take_crop_and_flip(loader.dataset) if training else {"batch_labels": False}
        loader.dataset = {"type": "InMemoryImages", "dataset": loader.dataset, **settings}
        loader.update(num_workers=0, persistent_workers=False, pin_memory=False)
        loader.collate_fn = {"type": "collate_batch"}
        loader.pop("prefetch_factor", None)
    preprocessor = cfg.model.get("data_preprocessor") or {}
    for key in ("batch_augments", "to_onehot"):
        if preprocessor.get(key):
            raise SettingError(
                f"data_preprocessor.{key}",
                "off with images in memory, whose labels come as one tensor",
                preprocessor[key],
            )
    if type_name(preprocessor) == "ClsDataPreprocessor":
        preprocessor["type"] = "mmpretrain.BatchDataPreprocessor"
    # Without it all processes draw the same crops.
    hooks = cfg.get("custom_hooks") or []
    if not any(type_name(hook) == "EpochSeedHook" for hook in hooks if isinstance(hook, dict)):
        cfg.custom_hooks = [*hooks, {"type": "EpochSeedHook"}]


def _take_crop_and_flip(dataset: ConfigDict) -> dict[str, Any]:
    """Take the crop and the flip out of a training pipeline, as settings of ``InMemoryImages``."""
    dataset = inner_dataset(dataset)
    if "pipeline" not in dataset:  # several data sets, whose random ones InMemoryImages refuses
        return {}
    stated = list(dataset.pipeline)
    pipeline, packing, settings = stated[:-1], stated[-1:], {}
    expected = {"RandomCrop", "RandomFlip"}
    while pipeline and (kind := type_name(pipeline[-1])) in expected:
        expected.remove(kind)  # a second one stays, and InMemoryImages refuses it
        transform = pipeline.pop()
        given = {"direction": "horizontal", **transform}
        known = {"type", "direction", "crop_size", "padding"}
        if kind == "RandomCrop":
            settings["crop_size"] = given.get("crop_size")
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
    dataset.pipeline = [*pipeline, *packing]
    return settings
