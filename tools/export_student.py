r"""Export a distilled student as a model that mmpretrain loads by itself.

    python tools/export_student.py configs/mskd_r34_r18_imagenet.py \
        work_dirs/mskd_r34_r18_imagenet/epoch_100.pth r18.pth

writes the student's weights to ``r18.pth`` and its config to ``r18.py``, for

    mmpretrain.get_model("r18.py", pretrained="r18.pth")
    mmpretrain.ImageClassificationInferencer("r18.py", pretrained="r18.pth")("image.jpg")

Images are files, or arrays in BGR as ``mmcv.imread`` returns them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, METRICS, MODELS, TRANSFORMS

import mskd_plugin
from mskd_plugin.checkpoints.weights import STUDENT_PREFIX, fit_weights, read_checkpoint, weights_of
from mskd_plugin.checks.data import trained_classes
from mskd_plugin.cli import run_tool
from mskd_plugin.config_parts import inner_dataset
from mskd_plugin.errors import SettingError, check_output
from mskd_plugin.files import written_whole
from mskd_plugin.launch import Count, image_side, is_distillation, keep_student_only, read_config

REGISTRIES = (MODELS, DATASETS, TRANSFORMS, METRICS)
HOST_SCOPES = ("mmpretrain", "mmcls", "mmcv", "mmengine")
LOADING = "LoadImageFromFile"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Export the student of a distillation, or a network trained alone, as weights "
        "and config that mmpretrain's get_model and ImageClassificationInferencer load.",
        epilog="example: python tools/export_student.py configs/mskd_r34_r18_imagenet.py "
        "work_dirs/mskd_r34_r18_imagenet/epoch_100.pth r18.pth",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config of the training")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint of the training")
    parser.add_argument(
        "out",
        metavar="OUT.pth",
        type=Path,
        help="file for the weights; the config goes to OUT.py beside it",
    )
    parser.add_argument(
        "--image-size",
        action=Count,
        metavar="PIXELS",
        help="side to which images are resized where the test pipeline of CONFIG does not resize "
        "(default: that of the training's crops)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT.pth and OUT.py")
    return parser.parse_args(argv)


def walk(node: Any) -> Iterator[dict]:
    """Yield every dict inside a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)


def plain(node: Any) -> Any:
    """Copy a config into plain containers, with types named as mmpretrain's scope knows them."""
    if isinstance(node, Mapping):
        return {k: type_name(v) if k == "type" else plain(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(plain(value) for value in node)
    return copy.deepcopy(node)


def type_name(kind: str | Callable[..., Any]) -> str:
    """Name a type without the scope of a host package; a type may be given as a class or a
    function, or as MMEngine dumps those, with its module.
    """
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    in_registry = name.split(".")[0] in (*HOST_SCOPES, "mskd_plugin")
    return name.rpartition(".")[2] if in_registry else name


def student_config(cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs of the student and of the preprocessing it was trained with, empty where
    images reach it as they are.

    The student is put in the place of ``cfg.model``.
    """
    keep_student_only(cfg)
    student = plain(cfg.model)
    preprocessor = student.pop("data_preprocessor", None) or {}
    # Of use in training alone, with names of files that others do not have.
    for key in ("train_cfg", "pretrained", "_scope_"):
        student.pop(key, None)
    for part in walk(student):
        if isinstance(part.get("init_cfg"), dict) and part["init_cfg"].get("type") == "Pretrained":
            del part["init_cfg"]
    preprocessor.pop("batch_augments", None)
    if preprocessor.get("type") == "BatchDataPreprocessor":  # to rounding, mmpretrain's own
        preprocessor["type"] = "ClsDataPreprocessor"
    return student, preprocessor


def read_student(
    student: dict[str, Any], checkpoint: Mapping[str, Any], path: str, distilled: bool
) -> dict[str, torch.Tensor]:
    """Return the student's weights in mmpretrain's names.

    Raises:
        SettingError: If they are not in the checkpoint, or do not fit.
    """
    weights = weights_of(checkpoint, path, setting="CHECKPOINT")
    if distilled and not any(key.startswith(STUDENT_PREFIX) for key in weights):
        raise SettingError(
            "CHECKPOINT",
            f"a checkpoint of the distillation in CONFIG, with keys {STUDENT_PREFIX}*",
            f"{path!r} with the keys {', '.join(list(weights)[:5])}, ...",
        )
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(copy.deepcopy(student))
    return fit_weights(model, weights, path, setting="CHECKPOINT")[1]


def class_names(checkpoint: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes: as trained with, else as the data set's type has them."""
    names = trained_classes(checkpoint)
    if names is None and "type" in dataset:
        names = getattr(DATASETS.get(dataset["type"]), "METAINFO", {}).get("classes")
    return None if names is None else list(names)


def testing_part(
    cfg: Config,
    loader: dict[str, Any],
    preprocessor: dict[str, Any],
    classes: list[str] | None,
    image_size: int | None,
) -> dict[str, Any]:
    """Return the test part of the config, which reads image files; the inferencer takes its
    pipeline from there.

    Data sets that hold their images in memory have a pipeline without reading, and images in RGB
    where files are read as BGR: they are replaced by a folder of images, and the pipeline's
    ``Normalize`` flips the channels, or else the preprocessing (in place).
    """
    dataset = inner_dataset(loader.get("dataset", {}))
    pipeline = dataset.get("pipeline") or [{"type": "PackInputs"}]
    kinds = [transform["type"] for transform in pipeline]
    if LOADING not in kinds:
        pipeline, kinds = [{"type": LOADING}, *pipeline], [LOADING, *kinds]
        names = {"metainfo": {"classes": classes}} if classes else {}
        dataset = {"type": "CustomDataset", "data_root": "data/images", **names}
        # The first that knows of an order: its mean and std are those of the order in memory.
        transform = next((t for t in pipeline if t["type"] == "Normalize"), None)
        flips, default = (preprocessor, False) if transform is None else (transform, True)
        flips["to_rgb"] = not flips.get("to_rgb", default)
    if not any("Resize" in kind or "Crop" in kind for kind in kinds):
        side = image_size or image_side(cfg.get("train_dataloader") or {})
        if side is None:
            sys.stderr.write(
                "warning: images are not resized, since CONFIG does not tell their size; "
                "--image-size sets it\n"
            )
        else:
            after = kinds.index(LOADING) + 1
            resize = {"type": "Resize", "scale": (side, side)}
            pipeline = [*pipeline[:after], resize, *pipeline[after:]]
    dataset["pipeline"] = pipeline
    loader["dataset"] = dataset  # without its wrappers, the inferencer does not look inside them
    if loader.get("collate_fn") == {"type": "collate_batch"}:
        del loader["collate_fn"]  # the wrapper's
    defaults = {
        "batch_size": 32,
        "num_workers": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    }
    evaluator = cfg.get("test_evaluator") or cfg.get("val_evaluator") or {"type": "Accuracy"}
    return {
        "test_dataloader": {**defaults, **loader},
        "test_evaluator": plain(evaluator),
        "test_cfg": {},
    }


def imports_of(parts: dict[str, Any], cfg: Config) -> list[str]:
    """Return the modules that must be imported for every type to be known: none, where mmpretrain
    has them all.
    """
    needed: list[str] = []
    for part in walk(parts):
        name = part.get("type")
        found = next(
            (c for registry in REGISTRIES if (c := registry.get(str(name))) is not None), None
        )
        package = "" if name is None or found is None else found.__module__.split(".")[0]
        if package in ("mskd_plugin", "mmrazor"):
            needed.append("mskd_plugin")
        elif package not in ("", *HOST_SCOPES, "torch", "torchvision"):
            needed += cfg.get("custom_imports", {}).get("imports", [])
    return list(dict.fromkeys(needed))


def main(argv: list[str] | None = None) -> None:
    """Export."""
    args = parse_args(argv)
    out_config = args.out.with_suffix(".py")
    if args.out.suffix != ".pth":
        raise SettingError("OUT.pth", "a file name that ends with .pth", repr(str(args.out)))
    inputs = {"CONFIG": args.config, "CHECKPOINT": args.checkpoint}
    for path in (args.out, out_config):
        check_output("OUT.pth", path, inputs=inputs, force=args.force)
    cfg = read_config(args.config, setting="CONFIG")
    if "model" not in cfg:
        raise SettingError("CONFIG", "a config with a model", repr(str(args.config)))
    checkpoint = read_checkpoint(args.checkpoint, setting="CHECKPOINT")
    distilled = is_distillation(cfg.model)
    student, preprocessor = student_config(cfg)
    state_dict = read_student(student, checkpoint, args.checkpoint, distilled)
    loader = plain(cfg.get("test_dataloader") or cfg.get("val_dataloader") or {})
    classes = class_names(checkpoint, inner_dataset(loader.get("dataset", {})))

    testing = testing_part(cfg, loader, preprocessor, classes, args.image_size)
    parts = {"model": student, **testing}
    if preprocessor:
        parts["data_preprocessor"] = preprocessor
    imports = imports_of(parts, cfg)
    header: dict[str, Any] = {"default_scope": "mmpretrain"}
    if imports:
        header["custom_imports"] = {"imports": imports, "allow_failed_imports": False}

    meta: dict[str, Any] = {
        "source": args.config.name,
        "mskd_plugin_version": mskd_plugin.__version__,
    }
    if classes is not None:
        meta["dataset_meta"] = {"classes": classes}
    with written_whole(args.out) as weights, written_whole(out_config) as config:
        torch.save({"meta": meta, "state_dict": state_dict}, weights)
        Config({**header, **parts}).dump(config)
    print(
        f"Wrote {args.out} and {out_config}: mmpretrain.get_model({str(out_config)!r}, "
        f"{str(args.out)!r})"
    )


if __name__ == "__main__":
    run_tool(main)
