"""What the losses between a student's and a teacher's feature share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.errors import SettingError, check_at_least_zero


def at_least_float32(feature: Tensor) -> Tensor:
    """Return float16 and bfloat16 features in float32, wider ones as they are."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def shape_or_type(record: object) -> str:
    """Return what an error tells of a record that does not fit: a backbone's is a tuple."""
    return f"shape {tuple(record.shape)}" if isinstance(record, Tensor) else str(type(record))


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two maps down to the size of the smaller one.

    Args:
        student: (N, C_s, H_s, W_s).
        teacher: (N, C_t, H_t, W_t).

    Returns:
        Both maps, each side as long as the shorter of the two, by adaptive average pooling.
    """
    size = (
        min(student.shape[-2], teacher.shape[-2]),
        min(student.shape[-1], teacher.shape[-1]),
    )
    student, teacher = (
        feature if feature.shape[-2:] == size else functional.adaptive_avg_pool2d(feature, size)
        for feature in (student, teacher)
    )
    return student, teacher


class FeatureLoss(nn.Module, ABC):
    """``loss_weight`` times a term between a student's and a teacher's feature.

    The term is computed in float32, or in float64 where the features have it, also under autocast.
    A batch without images gives a zero that keeps the graph.

    Args:
        loss_weight: Weight of the term, at least 0.

    Shapes:
        Two tensors of N rows and as many dimensions as ``dimensions`` allows; a scalar comes out.

    Attributes:
        dimensions: Numbers of dimensions that a feature may have: 2 for pooled vectors (N, C), 4
            for maps (N, C, H, W).
        detaches_teacher: Whether the teacher's side gets no gradient. Only losses that learn an
            embedding of the teacher's feature let it pass.

    Raises:
        SettingError: When built, if the weight is malformed; when called, if a feature is no tensor
            or has another number of dimensions, or the two differ in N.
    """

    dimensions: Sequence[int] = (2, 3, 4)
    detaches_teacher = True

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Return the weighted term."""
        for name, feature in (
            ("student_feature", student_feature),
            ("teacher_feature", teacher_feature),
        ):
            if not isinstance(feature, Tensor) or feature.dim() not in self.dimensions:
                raise SettingError(
                    name,
                    f"a tensor of {' or '.join(map(str, self.dimensions))} dimensions",
                    shape_or_type(feature),
                )
        if len(student_feature) != len(teacher_feature):
            raise SettingError(
                "teacher_feature",
                f"of the student's batch, {len(student_feature)} images",
                f"{len(teacher_feature)} images",
            )
        with torch.autocast(student_feature.device.type, enabled=False):
            student = at_least_float32(student_feature)
            teacher = at_least_float32(teacher_feature)
            if self.detaches_teacher:
                teacher = teacher.detach()
            if not len(student):
                return 0 * student.sum()
            return self.loss_weight * self.term(student, teacher)

    @abstractmethod
    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the term of at least one image, in float32 or wider."""
