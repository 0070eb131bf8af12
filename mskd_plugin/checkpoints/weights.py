"""Read a classifier's weights from the layouts that are in use, strictly."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner.checkpoint import get_torchvision_models
from torch import Tensor, nn

from mskd_plugin.checkpoints.normalization import check_normalization
from mskd_plugin.checkpoints.plain_pickle import load_plain
from mskd_plugin.errors import SettingError, check_file

Weights = dict[str, Tensor]

#: What a student's weights are called inside a checkpoint of a distillation.
STUDENT_PREFIX = "architecture."
#: Where checkpoints keep the weights: mmengine and torchvision's references; the CRD benchmark;
#: others.
WRAPPERS = ("state_dict", "model", "net")
#: How files of Hugging Face's format, which holds tensors alone, end; timm's weights come so.
SAFETENSORS = ".safetensors"

_CLASSIFIER = re.compile(r"^(fc|classifier|linear)\.(\d+\.)?(?=(weight|bias)$)")
_TIMM_CLASSIFIER = re.compile(
    r"^(fc|classifier|head|head\.fc|last_linear|classif)\.(?=(weight|bias)$)"
)
_SHORTCUT = re.compile(r"^(layer\d+\.\d+)\.shortcut\.")
# The classifier of mmpretrain's own head for vision transformers, and what its older Swin
# transformers called their last normalisation; the tables that those also saved are computed today.
_TOKEN_CLASSIFIER = re.compile(r"^head\.layers\.head\.(?=(weight|bias)$)")
_SWIN_NORM = re.compile(r"^backbone\.norm\.(?=(weight|bias)$)")
_SWIN_TABLE = re.compile(r"^backbone\.stages\.\d+\.blocks\.\d+\.attn\.attn_mask$")
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
_REFUSED_OBJECT = re.compile(r"GLOBAL ([\w.]+)")


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    setting: str = "teacher_ckpt",
    data_preprocessor: nn.Module | None = None,
) -> str:
    """Load a classifier's weights: every key found, none left over, all shapes equal.

    Read are checkpoints of mmpretrain, with its heads of vision transformers and its names for Swin
    transformers of all versions; of MMRazor's distillation, whose student is taken; of torchvision;
    of timm; and of the CRD benchmark; each with or without the prefix ``module.``. Only
    ``num_batches_tracked`` may be absent from a file, and only the tables ``attn_mask`` of older
    Swin transformers may be left over. A file whose name ends in ``.safetensors`` is read with the
    package of that name.

    Args:
        model: Classifier of mmpretrain with the parts ``backbone`` and ``head.fc``. Left as it is
            if loading fails.
        source: A path, an ``http(s)://`` address, or ``torchvision://<name>``,
            ``torchvision://resnet34`` for one.
        setting: Name of the setting that ``source`` comes from, for errors.
        data_preprocessor: What normalises the model's images, to be compared with what a checkpoint
            of OpenMMLab's says of its own training. Default: None, not compared.

    Returns:
        The layout found, a key of :data:`LAYOUTS`.

    Raises:
        SettingError: If there is no such file, it holds more than plain data, the weights do not
            fit, or they want images of another mean and std; what does not fit is told by missing
            keys, unexpected keys and differing shapes.
    """
    checkpoint = read_checkpoint(source, setting=setting)
    weights = weights_of(checkpoint, source, setting=setting)
    layout, fitted = fit_weights(model, weights, source, setting=setting)
    if data_preprocessor is not None:
        check_normalization(checkpoint, data_preprocessor, source, setting=setting)
    # Not strict: Swin Transformer V2 leaves out the tables that it computes.
    left = model.load_state_dict(fitted, strict=False).missing_keys
    if lost := [name for name, _ in model.named_parameters() if name in left]:
        raise SettingError(setting, "parameters that the network takes", f"{_some(lost)}, left out")
    return layout


def read_checkpoint(source: str | Path, *, setting: str) -> Mapping[str, Any]:
    """Read a checkpoint file onto the CPU, with torch's check for plain data left on.

    Args:
        source: See :func:`load_weights`. Files from the network are kept in torch's cache.
        setting: Name of the setting, for errors.

    Raises:
        SettingError: If there is no such file, or it is no checkpoint, or holds more than plain
            data, or is a ``.safetensors`` file where that package is missing.
    """
    path = _local_file(str(source), setting)
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path, source, setting)
    try:
        checkpoint = load_plain(path)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        refused = _REFUSED_OBJECT.search(str(error))
        if refused:
            raise SettingError(
                setting,
                "a file of tensors and plain data",
                f"{str(source)!r}, which holds an object of type {refused[1]}; loading that could "
                f"run code",
                "Where you trust the file, let the program that wrote it save the weights alone: "
                "torch.save(model.state_dict(), FILE).",
            ) from error
        raise SettingError(
            setting,
            "a checkpoint that torch can read",
            f"{str(source)!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'empty'})",
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise SettingError(
            setting,
            "a file with a dict of weights",
            f"{str(source)!r} with a {type(checkpoint).__name__}",
        )
    return checkpoint


def _read_safetensors(path: Path, source: str | Path, setting: str) -> Weights:
    try:
        refused = import_module("safetensors").SafetensorError
        load_file = import_module("safetensors.torch").load_file
    except ImportError as error:
        raise SettingError(
            setting,
            "a file of a format whose package is installed",
            f"{str(source)!r} without safetensors",
            "pip install safetensors gives it.",
        ) from error
    try:
        weights: Weights = load_file(path)
    except (OSError, refused) as error:
        raise SettingError(
            setting,
            "a file that safetensors can read",
            f"{str(source)!r} ({type(error).__name__}: {error})",
        ) from error
    return weights


def weights_of(checkpoint: Mapping[str, Any], source: str | Path, *, setting: str) -> Weights:
    """Take the weights out of a checkpoint, without ``module.`` in front.

    Args:
        checkpoint: Weights, or a dict that holds them under one of :data:`WRAPPERS`.
        source: Where it comes from, for errors.
        setting: Name of the setting, for errors.

    Raises:
        SettingError: If there are no weights.
    """
    held = next(
        (checkpoint[k] for k in WRAPPERS if isinstance(checkpoint.get(k), Mapping)), checkpoint
    )
    if not held or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise SettingError(
            setting,
            f"a file with weights, plain or under one of {', '.join(map(repr, WRAPPERS))}",
            f"{str(source)!r} with the keys {_some(list(map(str, held)))}",
        )
    wrapped = all(key.startswith("module.") for key in held)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in held.items()}


def fit_weights(
    model: nn.Module, weights: Weights, source: str | Path, *, setting: str
) -> tuple[str, Weights]:
    """Bring weights into a model's own names.

    Args:
        model: See :func:`load_weights`; not changed.
        weights: Weights in any of :data:`LAYOUTS`.
        source: Where they come from, for errors.
        setting: Name of the setting, for errors.

    Returns:
        The layout, and the model's complete ``state_dict`` with these weights.

    Raises:
        SettingError: If they do not fit in any layout; tells the differences from the nearest one.
    """
    own = model.state_dict()
    renamed = {name: rename(weights) for name, rename in LAYOUTS.items()}
    fits = {name: _compare(own, part) for name, part in renamed.items() if part}
    layout = min(fits, key=lambda name: fits[name].differences)
    fit = fits[layout]
    if fit.differences:
        raise SettingError(
            setting,
            f"weights of {_describe(model)}",
            f"{str(source)!r}, which read in the layout of {layout} has {fit}",
        )
    return layout, {**own, **renamed[layout]}


def differences(own: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """Tell how weights differ from a model's own: missing and unexpected keys, differing shapes.

    Args:
        own: The model's ``state_dict``.
        weights: A ``state_dict`` in its names. What is no tensor in either is not compared.

    Returns:
        The differences; empty where there are none.
    """
    tensors = [{k: v for k, v in part.items() if isinstance(v, Tensor)} for part in (own, weights)]
    return str(_compare(*tensors))


def class_count(weights: Weights) -> int | None:
    """Return the number of classes of the classifier among the weights, None if there is no
    classifier.
    """
    for rename in LAYOUTS.values():
        head = rename(weights).get("head.fc.weight")
        if head is not None:
            return head.shape[0]
    return None


def _renamed(weights: Weights, name: Callable[[str], str]) -> Weights:
    """Rename the keys, but not two to one: a classifier of several layers must not collapse."""
    renamed: Weights = {}
    for key, value in weights.items():
        new = name(key)
        taken = new in renamed or (new != key and new in weights)
        renamed[key if taken else new] = value
    return renamed


def _from_transformer(weights: Weights) -> Weights:
    kept = {key: value for key, value in weights.items() if not _SWIN_TABLE.match(key)}
    return _renamed(
        kept,
        lambda key: _SWIN_NORM.sub("backbone.norm3.", _TOKEN_CLASSIFIER.sub("head.fc.", key)),
    )


def _student_part(weights: Weights) -> Weights:
    return {
        key.removeprefix(STUDENT_PREFIX): value
        for key, value in weights.items()
        if key.startswith(STUDENT_PREFIX)
    }


def _from_plain_network(weights: Weights) -> Weights:
    def name(key: str) -> str:
        new = _CLASSIFIER.sub("head.fc.", key)
        return new if new != key else "backbone." + _SHORTCUT.sub(r"\1.downsample.", key)

    return _renamed(weights, name)


def _from_timm(weights: Weights) -> Weights:
    def name(key: str) -> str:
        end = _TIMM_CLASSIFIER.match(key)
        return f"head.fc.{key[end.end() :]}" if end else f"backbone.timm_model.{key}"

    return _renamed(weights, name)


#: How weights are named, and how each layout becomes that of our classifiers. mmpretrain's
#: transformers have a layout of their own, since a model with mmpretrain's head for them keeps its
#: names. The CRD benchmark's own names for a classifier and a shortcut are read with torchvision's.
LAYOUTS: dict[str, Callable[[Weights], Weights]] = {
    "mmpretrain": dict,
    "mmpretrain's transformers": _from_transformer,
    "mmrazor": _student_part,
    "torchvision": _from_plain_network,
    "timm": _from_timm,
}


@dataclass(frozen=True)
class _Fit:
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @property
    def differences(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def __str__(self) -> str:
        parts = {
            "missing keys": self.missing,
            "unexpected keys": self.unexpected,
            "differing shapes": self.reshaped,
        }
        return "; ".join(
            f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in parts.items() if keys
        )


def _compare(own: Mapping[str, Tensor], weights: Weights) -> _Fit:
    return _Fit(
        missing=[k for k in own if k not in weights and not k.endswith("num_batches_tracked")],
        unexpected=[k for k in weights if k not in own],
        reshaped=[
            f"{key} is {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in weights.items()
            if key in own and value.shape != own[key].shape
        ],
    )


def _some(keys: list[str], limit: int = 10) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _describe(model: nn.Module) -> str:
    part = getattr(model, "backbone", model)
    facts = {
        "depth": getattr(part, "depth", None),
        "width": getattr(part, "widen_factor", None),
        "classes": getattr(getattr(model, "head", None), "num_classes", None),
    }
    told = [f"{name} {value}" for name, value in facts.items() if isinstance(value, int)]
    return type(part).__name__ + (f" ({', '.join(told)})" if told else "")


def check_source(source: str, setting: str) -> tuple[str, str]:
    """Check what can be checked of a checkpoint's source without its content.

    Args:
        source: A path, a URL or ``torchvision://<name>``.
        setting: The setting that names it.

    Returns:
        Its scheme, empty for a path, and its path or URL.

    Raises:
        SettingError: If there is no such file, torchvision has no such model, or the scheme is not
            read.
    """
    if "://" not in source:
        return "", str(check_file(setting, source, "a file, a URL or torchvision://NAME"))
    scheme, _, name = source.partition("://")
    if scheme in ("http", "https"):
        return scheme, source
    if scheme != "torchvision":
        raise SettingError(
            setting, "a path, an http(s):// address or torchvision://NAME", repr(source)
        )
    urls = get_torchvision_models()
    if name not in urls:
        raise SettingError(setting, "the name of a torchvision model", repr(source))
    return scheme, urls[name]


def _local_file(source: str, setting: str) -> Path:
    """Return the file that ``source`` names, after a download if it is not in torch's cache."""
    scheme, url = check_source(source, setting)
    if not scheme:
        return Path(url)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if scheme != "torchvision":
        # Other sites name the files of several networks alike.
        folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / Path(urlparse(url).path).name
    digest = _HASH_IN_NAME.search(path.name) if scheme == "torchvision" else None
    try:
        if is_main_process():
            _download(url, path, digest)
        barrier()
        _download(url, path, digest)  # on machines other than the first
    except (OSError, RuntimeError) as error:
        raise SettingError(
            setting,
            "an address that can be downloaded",
            f"{source!r} ({type(error).__name__}: {error})",
            f"A file put at {path} is used instead.",
        ) from error
    return path


def _download(url: str, path: Path, digest: re.Match[str] | None) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest[1] if digest else None)
