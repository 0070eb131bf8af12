"""Where the recipes of feature methods tap a pair of networks.

Recorders have one name for one thing in all recipes, so that methods can be joined: ``stage<k>`` is
the map of a stage, counted from 1 in the student; ``pooled`` the vector that enters the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import classifier, network

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
    """

    name: str
    index: int
    student_source: str
    student_channels: int
    teacher_source: str
    teacher_channels: int


def stage_pairs(base: dict, stages: Sequence[int] | None = None) -> list[StagePair]:
    """Pair stages of both networks, counted from the last one, so that those of unlike depth fit.

    Args:
        base: Config with the ``pair``.
        stages: Which stages, -1 the last one. Default: all that both networks have, the first one
            first.

    Raises:
        SettingError: If a stage does not exist in both networks, or is no map in one of them.
    """
    check_maps(base)
    pair = base["pair"]
    student, teacher = network(pair["student"]), network(pair["teacher"])
    depth = min(len(student.stages), len(teacher.stages))
    pairs = []
    for index in range(-depth, 0) if stages is None else stages:
        if index not in range(-depth, 0):
            raise SettingError(
                "stages",
                f"numbers from -{depth} to -1 for {pair['teacher']} and {pair['student']}",
                index,
            )
        name = f"stage{len(student.stages) + index + 1}"
        pairs.append(StagePair(name, index, *student.stages[index], *teacher.stages[index]))
    return pairs


def check_maps(base: dict) -> None:
    """Check that the stages of both networks are maps, for methods that cannot read tokens.

    Args:
        base: Config with the ``pair``.

    Raises:
        SettingError: If those of one are token sequences.
    """
    pair = base["pair"]
    kinds = {
        role: f"{'tokens' if network(pair[role]).tokens else 'maps'} of {pair[role]}"
        for role in ("teacher", "student")
    }
    if any(kind.startswith("tokens") for kind in kinds.values()):
        raise SettingError(
            "pair",
            "of networks whose stages are maps (N, C, H, W), which this method compares",
            f"{kinds['teacher']} (teacher) and {kinds['student']} (student)",
        )


def stage_sides(base: dict) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the sizes of the stages' outputs of student and teacher, for images of the pair.

    The images have the side ``image_side`` of the pair; without it, 224 if one of the networks is
    made for ImageNet, else 32.

    Returns:
        For both networks what follows N and C (for token sequences, N) in each stage's shape.
    """
    pair = base["pair"]
    roles = ("student", "teacher")
    for_imagenet = any(network(pair[role]).num_classes == 1000 for role in roles)
    side = pair.get("image_side", IMAGENET_SIDE if for_imagenet else CIFAR_SIDE)
    student, teacher = (list(_stage_sides(pair[role], side)) for role in roles)
    return student, teacher


@lru_cache(maxsize=64)
def _stage_sides(name: str, side: int) -> tuple[tuple[int, ...], ...]:
    """Run a network without numbers and note its stages' shapes."""
    # Here, not above: configs that need no sizes load without the host's models.
    from mmengine.registry import MODELS

    with torch.random.fork_rng(devices=[]):  # building draws weights
        model = MODELS.build({**classifier(name, 2), "_scope_": "mmpretrain"})
    model = model.to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(source: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor: Tensor = output if isinstance(output, Tensor) else output[0]
            shapes[source] = tuple(tensor.shape)

        return hook

    sources = [source for source, _ in network(name).stages]
    for source in sources:
        model.get_submodule(source).register_forward_hook(note(source))
    with torch.no_grad():
        model.backbone(torch.empty(1, 3, side, side, device="meta"))
    return tuple(
        shapes[source][2:] if len(shapes[source]) == 4 else shapes[source][1:2]
        for source in sources
    )


def compare_stages(pairs: Sequence[StagePair], method: str, loss: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a method that gives each pair of stages a loss of its own.

    Args:
        pairs: The stages.
        method: Name of the method; the losses are ``loss_<method>_<stage>``.
        loss: Config of the loss, whose forward takes ``student_feature`` and ``teacher_feature``.
    """
    losses = {f"loss_{method}_{pair.name}": pair for pair in pairs}
    return {
        "student_recorders": {
            pair.name: {"type": "ModuleOutputs", "source": pair.student_source} for pair in pairs
        },
        "teacher_recorders": {
            pair.name: {"type": "ModuleOutputs", "source": pair.teacher_source} for pair in pairs
        },
        "distill_losses": {name: dict(loss) for name in losses},
        "loss_forward_mappings": {
            name: {
                "student_feature": {"recorder": pair.name, "from_student": True},
                "teacher_feature": {"recorder": pair.name, "from_student": False},
            }
            for name, pair in losses.items()
        },
    }


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
