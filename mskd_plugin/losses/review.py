"""Knowledge review (ReviewKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_at_least_zero, check_count
from mskd_plugin.losses.attention_fusion import AttentionFusionChain
from mskd_plugin.losses.feature_loss import at_least_float32
from mskd_plugin.losses.maps import check_channels, check_counts, check_maps

#: Side lengths to which maps are pooled, beside their own.
LEVELS = (4, 2, 1)
#: Stages that :meth:`ReviewKDLoss.forward` has arguments for.
MAX_STAGES = 6


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ReviewKD's distance of two maps of one shape (HCL).

    The mean squared errors of the maps and of their poolings to 4 x 4, 2 x 2 and 1 x 1, as far as
    those are lower than the map, averaged with the weights 1, 1/2, 1/4 and 1/8, in the order of the
    levels that are used.

    Args:
        student: (N, C, H, W).
        teacher: The same shape.

    Returns:
        A scalar in float32 or wider.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        if not student.numel():
            return 0 * student.sum()
        loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for level in LEVELS:
            if level < student.shape[2]:
                weight /= 2
                total += weight
                pooled = [F.adaptive_avg_pool2d(value, level) for value in (student, teacher)]
                loss = loss + weight * F.mse_loss(pooled[0], pooled[1])
        return loss / total


@MODELS.register_module()
class ReviewKDLoss(nn.Module):
    r"""Let each stage of the student, fused with all deeper ones, match the teacher's stage.

    .. math::
        L = w \sum_{i=1}^{n+1} HCL(F_i(s_i, ..., s_{n+1}), t_i)

    the sum over the n stages and, as the last, the pooled vector, a map of one position. HCL is
    :func:`hierarchical_context_loss`, which averages over all elements; F is
    :class:`mskd_plugin.losses.attention_fusion.AttentionFusionChain`, whose parameters are this
    loss's.

    Args:
        in_channels: Channels of the student's stages and of its pooled vector, the first stage
            first: 2 to 7 numbers.
        out_channels: The teacher's, as many.
        loss_weight: :math:`w`, at least 0. By pair, 0.6 to 8 in the published code. Over the first
            20 epochs (1 on ImageNet) it grows linearly from 0, which is a schedule's part.
        max_mid_channels: The fused maps have as many channels as the student's pooled vector, and
            at most this many. Default 512, as published; ResNet-50 to MobileNetV1 takes 256.

    Shapes:
        Stages (N, C_i, H_i, W_i), of any sizes in both networks; pooled vectors (N, C). The result
        is a scalar, in float32 or wider. In train mode N must be above 1, as the pooled vector is
        normalised over the batch.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if there are other stages
            than the channels say, or a stage has other channels.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044,
    as dvlab-research/ReviewKD computes it: the teacher's maps are those before the ReLU, the
    student's those after it on CIFAR-100 and those before it on ImageNet. Not carried over:
    channels and sizes in a table by the networks' names, which fails for other pairs.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        loss_weight: float = 1.0,
        max_mid_channels: int = 512,
    ) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.in_channels = check_counts("in_channels", in_channels)
        self.out_channels = check_counts("out_channels", out_channels)
        if not 2 <= len(self.in_channels) <= MAX_STAGES + 1:
            raise SettingError(
                "in_channels",
                f"2 to {MAX_STAGES + 1} numbers, the pooled vector's last",
                in_channels,
            )
        if len(self.out_channels) != len(self.in_channels):
            raise SettingError(
                "out_channels", f"{len(self.in_channels)} numbers, as `in_channels`", out_channels
            )
        check_count("max_mid_channels", max_mid_channels)
        mid_channels = min(max_mid_channels, self.in_channels[-1])
        self.chain = AttentionFusionChain(self.in_channels, self.out_channels, mid_channels)

    def forward(
        self,
        student_pooled: Tensor,
        teacher_pooled: Tensor,
        student_stage1: Tensor,
        teacher_stage1: Tensor,
        student_stage2: Tensor | None = None,
        teacher_stage2: Tensor | None = None,
        student_stage3: Tensor | None = None,
        teacher_stage3: Tensor | None = None,
        student_stage4: Tensor | None = None,
        teacher_stage4: Tensor | None = None,
        student_stage5: Tensor | None = None,
        teacher_stage5: Tensor | None = None,
        student_stage6: Tensor | None = None,
        teacher_stage6: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted loss; stages that the networks do not have are left out."""
        student = self._features(
            "student",
            self.in_channels,
            (student_stage1, student_stage2, student_stage3),
            (student_stage4, student_stage5, student_stage6),
            student_pooled,
        )
        teacher = self._features(
            "teacher",
            self.out_channels,
            (teacher_stage1, teacher_stage2, teacher_stage3),
            (teacher_stage4, teacher_stage5, teacher_stage6),
            teacher_pooled,
        )
        check_maps(student_pooled=student[-1], teacher_pooled=teacher[-1])
        outputs = self.chain(student, [(value.shape[2], value.shape[3]) for value in teacher])
        distances = [
            hierarchical_context_loss(output, value) for output, value in zip(outputs, teacher)
        ]
        return self.loss_weight * torch.stack(distances).sum()

    @staticmethod
    def _features(
        side: str,
        channels: tuple[int, ...],
        first: tuple[Tensor | None, ...],
        last: tuple[Tensor | None, ...],
        pooled: Tensor,
    ) -> list[Tensor]:
        """Return the maps of one network, the pooled vector as the last."""
        given = {f"{side}_stage{i}": value for i, value in enumerate((*first, *last), start=1)}
        stages = {name: value for name, value in given.items() if value is not None}
        if list(stages) != list(given)[: len(channels) - 1]:
            raise SettingError(
                f"{side}_stage<i>",
                f"given for the stages 1 to {len(channels) - 1}, as the channels are",
                ", ".join(stages) or "none",
            )
        if pooled.dim() != 2:
            raise SettingError(f"{side}_pooled", "vectors (N, C)", f"shape {tuple(pooled.shape)}")
        features = {**stages, f"{side}_pooled": pooled[:, :, None, None]}
        check_maps(**features)
        for (name, value), count in zip(features.items(), channels):
            check_channels(name, value, count, f"as {side} channel list says")
        return list(features.values())
