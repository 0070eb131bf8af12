"""Knowledge review (Chen et al., arXiv 2104.09044)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.networks import network
from mskd_plugin.recipes.logits import warmed_up
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.preact import preact, preact_pairs, preact_recorders
from mskd_plugin.recipes.taps import POOLED, stage_pairs


@method
def reviewkd(
    base: dict,
    *,
    loss_weight: float = 5.0,
    warmup: float = 20,
    max_mid_channels: int = 512,
    student_preact: bool = False,
) -> dict[str, Any]:
    """Let each stage of the student, fused with the deeper ones, match the teacher's stage.

    One :class:`mskd_plugin.losses.ReviewKDLoss` over all stages that both networks have, counted
    from the last one, and the pooled vectors. The teacher's maps are those before the ReLU.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the method. The published code takes 5 for most CIFAR-100 pairs (8
            for ResNet32x4 to ShuffleNetV2, 0.6 for ResNet20, 1 for ResNet32 students); on ImageNet
            1 for ResNet-34 to ResNet-18, 8 for ResNet-50 to MobileNetV1.
        warmup: Epochs over which the weight grows from 0: 20 on CIFAR-100, 1 on ImageNet. 0 leaves
            it out.
        max_mid_channels: Largest width in which maps are fused. 512; 256 for ResNet-50 to
            MobileNetV1.
        student_preact: Take the student's maps before the ReLU too, as on ImageNet.

    Raises:
        SettingError: If a network has no known maps before the ReLU where they are needed.
    """
    pairs = preact_pairs(base, "ReviewKD")
    recorders = preact_recorders(pairs)
    if not student_preact:
        after = stage_pairs(base, [pair.index for pair in pairs])
        recorders["student_recorders"] = {
            pair.name: {"type": "ModuleOutputs", "source": pair.student_source} for pair in after
        }
    mappings: dict[str, Any] = {}
    for index, pair in enumerate(pairs, start=1):
        mappings[f"student_stage{index}"] = (
            preact(pair, from_student=True)
            if student_preact
            else {"recorder": pair.name, "from_student": True}
        )
        mappings[f"teacher_stage{index}"] = preact(pair, from_student=False)
    for role in ("student", "teacher"):
        recorders[f"{role}_recorders"].update(POOLED)
        mappings[f"{role}_pooled"] = {
            "recorder": "pooled",
            "from_student": role == "student",
            "data_idx": 0,
        }
    student, teacher = (network(base["pair"][role]).width for role in ("student", "teacher"))
    parts = {
        **recorders,
        "distill_losses": {
            "loss_reviewkd": {
                "type": "ReviewKDLoss",
                "in_channels": (*(pair.student_channels for pair in pairs), student),
                "out_channels": (*(pair.teacher_channels for pair in pairs), teacher),
                "loss_weight": loss_weight,
                "max_mid_channels": max_mid_channels,
            }
        },
        "loss_forward_mappings": {"loss_reviewkd": mappings},
    }
    return warmed_up(parts, warmup)
