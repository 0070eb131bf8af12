"""Where the recipes of feature methods tap a pair of networks.

Recorders have one name for one thing in all recipes, so that methods can be joined: ``stage<k>`` is
the map of a stage, counted from 1 in the student; ``pooled`` the vector that enters the classifier.

The stages of transformers and MLPs are tokens. What compares maps reads them behind a
:class:`mskd_plugin.connectors.TokensToMapConnector`, ``<recorder>_<role>_map``; :func:`tapped` and
:func:`behind_layout` put it there, so that no recipe needs code for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mskd_plugin.errors import SettingError
from mskd_plugin.functional import tokens_to_map
from mskd_plugin.networks import Network, classifier, network
from mskd_plugin.recipes.assemble import PARTS

#: Side of the images that networks for ImageNet and for CIFAR are made for.
IMAGENET_SIDE, CIFAR_SIDE = 224, 32

#: Recorder of the vector that enters the classifier; mappings read ``data_idx`` 0 of it.
POOLED = {"pooled": {"type": "ModuleInputs", "source": "head.fc"}}


@dataclass(frozen=True)
class StagePair:
    """A stage of the student and the teacher's stage that it is compared with.

    Attributes:
        name: ``stage<k>``, counted from 1 in the student.
        index: The stage counted from the last one, which is -1.
        student_source: The student's module.
        student_channels: Channels of its map.
        teacher_source: The teacher's module.
        teacher_channels: Channels of its map.
        student_layout: Config of the connector that makes a map of the student's tokens. Default:
            None, its output is a map.
        teacher_layout: The teacher's.
    """

    name: str
    index: int
    student_source: str
    student_channels: int
    teacher_source: str
    teacher_channels: int
    student_layout: dict[str, Any] | None = None
    teacher_layout: dict[str, Any] | None = None


def stage_pairs(base: dict, stages: Sequence[int] | None = None) -> list[StagePair]:
    """Pair stages of both networks, counted from the last one, so that those of unlike depth fit.

    Args:
        base: Config with the ``pair``.
        stages: Which stages, -1 the last one. Default: all that both networks have, the first one
            first.

    Raises:
        SettingError: If there are no stages, or one is named twice or is not in both networks.
    """
    pair = base["pair"]
    student, teacher = network(pair["student"]), network(pair["teacher"])
    depth = min(len(student.stages), len(teacher.stages))
    pairs = []
    for index in check_stages(stages, depth, f"{pair['teacher']} and {pair['student']}"):
        name = f"stage{len(student.stages) + index + 1}"
        taps = (*student.stages[index], *teacher.stages[index])
        pairs.append(StagePair(name, index, *taps, layout(student), layout(teacher)))
    return pairs


def check_stages(
    stages: Sequence[int] | None, depth: int, networks: str, least: int = 1
) -> list[int]:
    """Return stages as a list, the first one first where none are named.

    Args:
        stages: Which stages, counted from the last one, which is -1. Default: None, all.
        depth: How many there are.
        networks: Whose stages, for the error.
        least: How many a method needs.

    Raises:
        SettingError: If one does not exist or is named twice, or there are too few.
    """
    chosen = list(range(-depth, 0)) if stages is None else list(stages)
    known = range(-depth, 0)
    if len(chosen) < least or len({*chosen}) < len(chosen) or {*chosen} - {*known}:
        expected = f"distinct numbers from -{depth} to -1 for {networks}"
        raise SettingError("stages", expected, tuple(chosen))
    return chosen


def layout(net: Network) -> dict[str, Any] | None:
    """Return the config of the connector that makes maps of a network's stages; None if they are
    maps.
    """
    if not net.tokens:
        return None
    return {"type": "TokensToMapConnector", "class_tokens": net.class_tokens}


def tapped(
    recorder: str, role: str, through: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mapping of a recorder's map, and the connectors that the mapping names.

    Args:
        recorder: Name of the recorder.
        role: ``"student"`` or ``"teacher"``.
        through: What :func:`layout` returns for the network.
    """
    mapping = {"recorder": recorder, "from_student": role == "student"}
    if through is None:
        return mapping, {}
    name = f"{recorder}_{role}_map"
    return {**mapping, "connector": name}, {name: dict(through)}


def behind_layout(
    through: dict[str, Any] | None, connector: dict[str, Any]
) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the config of a connector that reads maps, behind what :func:`layout` returns."""
    return connector if through is None else [dict(through), connector]


def stage_sides(base: dict) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the sizes of the stages' maps of student and teacher, for images of the pair.

    The images have the side ``image_side`` of the pair; without it, 224 if one of the networks is
    made for ImageNet, else 32.

    Returns:
        For both networks (H, W) of each stage, of tokens that of their grid.
    """
    pair = base["pair"]
    roles = ("student", "teacher")
    for_imagenet = any(network(pair[role]).num_classes == 1000 for role in roles)
    side = pair.get("image_side", IMAGENET_SIDE if for_imagenet else CIFAR_SIDE)
    student, teacher = (list(_stage_sides(pair[role], side)) for role in roles)
    return student, teacher


@lru_cache(maxsize=64)
def _stage_sides(name: str, side: int) -> tuple[tuple[int, int], ...]:
    """Run a network without numbers and note its stages' shapes."""
    # Here, not above: configs that need no sizes load without the host's models.
    from mmengine.registry import MODELS

    with torch.random.fork_rng(devices=[]):  # building draws weights
        model = MODELS.build({**classifier(name, 2), "_scope_": "mmpretrain"})
    model = model.to("meta").eval()
    net = network(name)
    sizes: dict[str, tuple[int, int]] = {}

    def note(source: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            feature: Tensor = output if isinstance(output, Tensor) else output[0]
            if net.tokens:
                feature = tokens_to_map(feature, net.class_tokens)
            sizes[source] = (feature.shape[2], feature.shape[3])

        return hook

    for source, _ in net.stages:
        model.get_submodule(source).register_forward_hook(note(source))
    with torch.no_grad():
        model.backbone(torch.empty(1, 3, side, side, device="meta"))
    return tuple(sizes[source] for source, _ in net.stages)


def compare_stages(
    pairs: Sequence[StagePair],
    method: str,
    loss: dict[str, Any],
    regressor: Callable[[StagePair], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the parts of a method that gives each pair of stages a loss of its own.

    Args:
        pairs: The stages.
        method: Name of the method; the losses are ``loss_<method>_<stage>``.
        loss: Config of the loss, whose forward takes ``student_feature`` and ``teacher_feature``.
        regressor: Gives the config of the connector that a student's map passes first,
            ``<method>_<stage>_student``. Default: None, it passes none.
    """
    parts: dict[str, Any] = {part: {} for part in PARTS}
    for pair in pairs:
        name = f"loss_{method}_{pair.name}"
        parts["distill_losses"][name] = dict(loss)
        parts["loss_forward_mappings"][name] = mappings = {}
        for role in ("student", "teacher"):
            source, through = getattr(pair, f"{role}_source"), getattr(pair, f"{role}_layout")
            parts[f"{role}_recorders"][pair.name] = {"type": "ModuleOutputs", "source": source}
            mapping, connectors = tapped(pair.name, role, through)
            if role == "student" and regressor is not None:
                mapping["connector"] = f"{method}_{pair.name}_student"
                connectors = {mapping["connector"]: behind_layout(through, regressor(pair))}
            mappings[f"{role}_feature"] = mapping
            parts["connectors"].update(connectors)
    return parts


def compare_pooled(name: str, loss: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a method with one loss between both networks' pooled vectors.

    Args:
        name: Name of the loss, ``loss_<method>``.
        loss: Config of the loss, whose forward takes ``student_feature`` and ``teacher_feature``.
    """
    return {
        "student_recorders": dict(POOLED),
        "teacher_recorders": dict(POOLED),
        "distill_losses": {name: loss},
        "loss_forward_mappings": {
            name: {
                "student_feature": {"recorder": "pooled", "from_student": True, "data_idx": 0},
                "teacher_feature": {"recorder": "pooled", "from_student": False, "data_idx": 0},
            }
        },
    }


def linear_connectors(base: dict, method: str, out_channels: int) -> dict[str, Any]:
    """Return learned linear maps of both pooled vectors, ``<method>_student`` and ``_teacher``.

    Args:
        base: Config with the ``pair``.
        method: Name of the method.
        out_channels: Width of both embeddings.
    """
    return {
        f"{method}_{role}": {
            "type": "TorchNNConnector",
            "module_name": "Linear",
            "module_args": {
                "in_features": network(base["pair"][role]).width,
                "out_features": out_channels,
            },
        }
        for role in ("student", "teacher")
    }
