"""Networks by the names that papers use, as mmpretrain classifiers.

A further network is one entry in :data:`NETWORKS`, and a backbone in :mod:`mskd_plugin.backbones`
where mmpretrain has none.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from typing import Any

from mskd_plugin.backbones.cifar_vgg import CONVOLUTIONS
from mskd_plugin.errors import SettingError, check_count
from mskd_plugin.networks.description import Network
from mskd_plugin.networks.timm import PREFIX, timm_network
from mskd_plugin.networks.tokens import mixer, swin, vision_transformer


def _residual(
    backbone: dict[str, Any],
    stem: int,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    norm: str,
    num_classes: int = 100,
) -> Network:
    """A network of stages ``layer1``, ``layer2``, ...; ``norm`` is the last one in a block."""
    stages = tuple((f"backbone.layer{i}", width) for i, width in enumerate(widths, start=1))
    ends = [f"{name}.{count - 1}" for (name, _), count in zip(stages, blocks)]
    return Network(
        backbone=backbone,
        width=widths[-1],
        stages=stages,
        preact_stages=tuple((f"{end}.preact", width) for end, width in zip(ends, widths)),
        preact_norms=tuple(f"{end}.{norm}" for end in ends),
        stem=("backbone.relu", stem),
        final=stages[-1],
        num_classes=num_classes,
    )


def _cifar_resnet(depth: int, widths: tuple[int, ...]) -> Network:
    backbone = {"type": "CIFARResNet", "depth": depth, "widths": widths}
    return _residual(backbone, widths[0], widths[1:], ((depth - 2) // 6,) * 3, "bn2")


def _resnet(kind: str, depth: int, num_classes: int) -> Network:
    # As torchvision and the CRD benchmark train them: mmpretrain's default starts the last
    # normalisation of each block from 0.
    backbone = {"type": kind, "depth": depth, "zero_init_residual": False}
    factor, norm = (4, "bn3") if depth >= 50 else (1, "bn2")
    widths = tuple(factor * width for width in (64, 128, 256, 512))
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    return _residual(backbone, 64, widths, blocks, norm, num_classes)


def _wide_resnet(depth: int, factor: int) -> Network:
    widths = (16 * factor, 32 * factor, 64 * factor)
    norms = ("backbone.block2.layer.0.bn1", "backbone.block3.layer.0.bn1", "backbone.bn1")
    return Network(
        backbone={"type": "CIFARWideResNet", "depth": depth, "widen_factor": factor},
        width=widths[-1],
        stages=tuple((f"backbone.block{i}", width) for i, width in enumerate(widths, start=1)),
        preact_stages=tuple(zip(norms, widths)),
        preact_norms=norms,
        stem=("backbone.conv1", 16),
        final=("backbone.relu", widths[-1]),
        num_classes=100,
        # The weight as torch does it, the bias 0.
        head_init={
            "type": "Kaiming",
            "layer": "Linear",
            "a": 5**0.5,
            "mode": "fan_in",
            "nonlinearity": "leaky_relu",
            "distribution": "uniform",
        },
    )


def _vgg(depth: int) -> Network:
    widths = (128, 256, 512, 512)
    # The normalisation ends its block: 3 layers a convolution, but for the last one's ReLU.
    counts = CONVOLUTIONS[depth][1:]
    blocks = [f"backbone.block{i}" for i in range(1, 5)]
    stages = tuple((f"backbone.relu{i}", width) for i, width in enumerate(widths, start=1))
    return Network(
        backbone={"type": "CIFARVGG", "depth": depth},
        width=512,
        stages=stages,
        preact_stages=tuple(zip(blocks, widths)),
        preact_norms=tuple(f"{b}.{3 * count - 2}" for b, count in zip(blocks, counts)),
        stem=("backbone.relu0", 64),
        final=stages[-1],
        num_classes=100,
        head_init=_SMALL,
    )


def _mobilenet_v2() -> Network:
    blocks = {"backbone.blocks.1": 12, "backbone.blocks.2": 16, "backbone.blocks.4": 48,
              "backbone.blocks.6": 160}  # fmt: skip
    ends = (1, 2, 2, 0)
    return Network(
        backbone={"type": "CIFARMobileNetV2", "expand_ratio": 6, "widen_factor": 0.5},
        width=1280,
        stages=tuple(blocks.items()),
        preact_stages=tuple(blocks.items()),
        preact_norms=tuple(f"{name}.{end}.conv.7" for name, end in zip(blocks, ends)),
        stem=("backbone.conv1", 16),
        final=("backbone.conv2", 1280),
        num_classes=100,
        head_init=_SMALL,
    )


def _imagenet_mobilenet_v2() -> Network:
    # The last map of each side from 56 to 7, sums or outputs of linear layers.
    blocks = {"backbone.layer2": 24, "backbone.layer3": 32, "backbone.layer5": 96,
              "backbone.layer7": 320}  # fmt: skip
    ends = ("1.conv.2", "2.conv.2", "2.conv.2", "0.conv.2")
    return Network(
        backbone={"type": "MobileNetV2"},
        width=1280,
        stages=tuple(blocks.items()),
        preact_stages=tuple(blocks.items()),
        preact_norms=tuple(f"{name}.{end}.bn" for name, end in zip(blocks, ends)),
        stem=("backbone.conv1", 32),
        final=("backbone.conv2", 1280),
        num_classes=1000,
        head_init=_SMALL,
    )


def _shufflenet_v1() -> Network:
    return _residual({"type": "CIFARShuffleNetV1"}, 24, (240, 480, 960), (4, 8, 4), "bn3")


def _shufflenet_v2() -> Network:
    plain = _residual({"type": "CIFARShuffleNetV2"}, 24, (116, 232, 464), (4, 8, 4), "bn3")
    return dataclasses.replace(
        plain,
        width=1024,
        preact_norms=(),
        stem=("backbone.relu1", 24),
        final=("backbone.relu2", 1024),
    )


def _mobilenet_v1() -> Network:
    ends = {"backbone.model.3": 128, "backbone.model.5": 256, "backbone.model.11": 512,
            "backbone.model.13": 1024}  # fmt: skip
    return Network(
        backbone={"type": "MobileNetV1"},
        width=1024,
        stages=tuple(ends.items()),
        preact_stages=tuple((f"{name}.4", width) for name, width in ends.items()),
        preact_norms=tuple(f"{name}.4" for name in ends),
        stem=("backbone.model.0", 32),
        final=("backbone.model.13", 1024),
        num_classes=1000,
    )


def _convnext(arch: str, widths: tuple[int, ...]) -> Network:
    stages = tuple((f"backbone.stages.{i}", width) for i, width in enumerate(widths))
    return Network(
        backbone={"type": "ConvNeXt", "arch": arch, "drop_path_rate": 0.1},
        width=widths[-1],
        stages=stages,
        stem=("backbone.downsample_layers.0", widths[0]),
        final=stages[-1],
        num_classes=1000,
        init_cfg=[{"type": "TruncNormal", "layer": ["Conv2d", "Linear"], "std": 0.02, "bias": 0.0}],
        # Its backbone pools, then normalises.
        neck=None,
        final_is_pooled=False,
    )


_PLAIN, _TIMES_4 = (16, 16, 32, 64), (32, 64, 128, 256)
_SMALL = {"type": "Normal", "layer": "Linear", "std": 0.01}

#: Networks by name, as the CRD benchmark and mdistiller spell them: ``resnet18`` is ImageNet's,
#: ``ResNet18`` CIFAR's.
NETWORKS: dict[str, Network] = {
    **{f"resnet{depth}": _cifar_resnet(depth, _PLAIN) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _cifar_resnet(depth, _TIMES_4) for depth in (8, 32)},
    **{f"ResNet{depth}": _resnet("ResNet_CIFAR", depth, 100) for depth in (18, 50)},
    **{f"wrn_{d}_{factor}": _wide_resnet(d, factor) for d in (16, 40) for factor in (1, 2)},
    **{f"vgg{depth}": _vgg(depth) for depth in CONVOLUTIONS},
    "MobileNetV2": _mobilenet_v2(),
    "ShuffleV1": _shufflenet_v1(),
    "ShuffleV2": _shufflenet_v2(),
    **{f"resnet{depth}": _resnet("ResNet", depth, 1000) for depth in (18, 34, 50)},
    "mobilenet_v1": _mobilenet_v1(),
    "mobilenet_v2": _imagenet_mobilenet_v2(),
    "swin_t": swin("tiny", 96),
    "deit_t": vision_transformer("deit-tiny", 192),
    "vit_s": vision_transformer("deit-small", 384),
    "mixer_s16": mixer("s", 512, 8),
    "mixer_b16": mixer("b", 768, 12),
    "convnext_t": _convnext("tiny", (96, 192, 384, 768)),
}
#: The names that papers' tables have for some of them.
ALIASES = {
    "ShuffleNetV1": "ShuffleV1",
    "ShuffleNetV2": "ShuffleV2",
    "MobileNetV1": "mobilenet_v1",
}


def network(name: str) -> Network:
    """Return a network of :data:`NETWORKS`, also by one of :data:`ALIASES`, or of timm where
    ``timm:`` stands before its name.

    Raises:
        SettingError: If there is none of that name; lists the names. See also
            :func:`mskd_plugin.networks.timm.timm_network`.
    """
    if str(name).startswith(PREFIX):
        return timm_network(name)
    name = ALIASES.get(name, name)
    if name not in NETWORKS:
        folded = {known: _fold(known) for known in NETWORKS}
        near = difflib.get_close_matches(_fold(str(name)), folded.values(), n=1)
        meant = [repr(known) for known, fold in folded.items() if fold in near]
        raise SettingError(
            "network",
            f"one of {', '.join(NETWORKS)}",
            repr(name),
            f"Did you mean {' or '.join(meant)}?" if meant else "",
        )
    return NETWORKS[name]


def _fold(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def classifier(
    name: str, num_classes: int, *, loss_weight: float = 1.0, **head_settings: Any
) -> dict[str, Any]:
    """Return the config of a network with its pooling, a linear classifier and cross-entropy.

    Args:
        name: A name of :data:`NETWORKS`, or ``timm:`` and one of timm.
        num_classes: Number of classes.
        loss_weight: Weight of the cross-entropy.
        **head_settings: Settings of mmpretrain's ``LinearClsHead`` that replace the defaults.

    Returns:
        A new config of mmpretrain's ``ImageClassifier``. Its ``_scope_`` lets it stand inside a
        config of MMRazor.

    Raises:
        SettingError: If there is no network of that name, or ``num_classes`` is not a positive
            whole number.
    """
    net = network(name)
    check_count("num_classes", num_classes)
    head = {
        "type": "LinearClsHead",
        "num_classes": num_classes,
        "in_channels": net.width,
        "loss": {"type": "CrossEntropyLoss", "loss_weight": loss_weight},
        "topk": (1, 5) if num_classes >= 5 else (1,),
        "init_cfg": copy.deepcopy(net.head_init),
        **head_settings,
    }
    config: dict[str, Any] = {
        "_scope_": "mmpretrain",
        "type": "ImageClassifier",
        "backbone": copy.deepcopy(net.backbone),
        "neck": copy.deepcopy(net.neck),
        "head": head,
    }
    if net.init_cfg is not None:
        config["init_cfg"] = copy.deepcopy(net.init_cfg)
    return config
