"""Convert a published checkpoint into mmpretrain's layout, after a strict check.

python tools/convert_teacher.py ckpt_epoch_240.pth resnet32x4.pth --net resnet32x4
python tools/convert_teacher.py torchvision://resnet34 resnet34.pth --net resnet34
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmpretrain.registry import MODELS

import mskd_plugin
from mskd_plugin.checkpoints.weights import (
    Weights,
    class_count,
    fit_weights,
    read_checkpoint,
    weights_of,
)
from mskd_plugin.cli import run_tool
from mskd_plugin.errors import SettingError, check_output
from mskd_plugin.files import written_whole
from mskd_plugin.launch import Count
from mskd_plugin.networks import NETWORKS, classifier, network


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of the CRD benchmark, of torchvision, or of a "
        "distillation (its student) into mmpretrain's layout, after a strict check that it fits.",
        epilog="example: python tools/convert_teacher.py resnet32x4_vanilla/ckpt_epoch_240.pth "
        "resnet32x4.pth --net resnet32x4",
    )
    parser.add_argument("src", metavar="SRC", help="a file, a URL or torchvision://NAME")
    parser.add_argument("dst", metavar="DST", type=Path, help="file to write")
    parser.add_argument("--net", required=True, help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument(
        "--num-classes",
        action=Count,
        metavar="N",
        help="classes that the classifier must have (default: 100, for ImageNet networks 1000)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    return parser.parse_args(argv)


def fitting_networks(weights: Weights, num_classes: int) -> list[str]:
    """Return the names of the networks that the weights fit."""
    names = []
    for name in NETWORKS:
        try:
            fit_weights(MODELS.build(classifier(name, num_classes)), weights, "", setting="SRC")
        except SettingError:
            continue
        names.append(name)
    return names


def main(argv: list[str] | None = None) -> None:
    """Convert."""
    args = parse_args(argv)
    expected_classes = args.num_classes or network(args.net).num_classes
    check_output("DST", args.dst, inputs={"SRC": args.src}, force=args.force)
    weights = weights_of(read_checkpoint(args.src, setting="SRC"), args.src, setting="SRC")
    classes = class_count(weights) or expected_classes
    try:
        layout, state_dict = fit_weights(
            MODELS.build(classifier(args.net, classes)), weights, args.src, setting="SRC"
        )
    except SettingError as error:
        others = fitting_networks(weights, classes)
        if not others:
            raise
        raise SettingError(
            "--net",
            f"the network of the file, {' or '.join(others)}",
            repr(args.net),
            f"With that: {error}",
        ) from error
    if classes != expected_classes:
        raise SettingError(
            "--num-classes", f"{classes}, as the classifier in {args.src!r} has", expected_classes
        )
    meta = {
        "net": args.net,
        "num_classes": classes,
        "source": Path(args.src).name,
        "source_layout": layout,
        "mskd_plugin_version": mskd_plugin.__version__,
    }
    with written_whole(args.dst) as file:
        torch.save({"meta": meta, "state_dict": state_dict}, file)
    print(f"Wrote {args.dst}: {args.net} with {classes} classes, from the layout of {layout}.")


if __name__ == "__main__":
    run_tool(main)
