"""Scale-decoupled distillation (SDD) of logits: KD, DKD or NKD on regions of the last map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_above_zero, check_at_least_zero
from mskd_plugin.functional import consistent_regions, decouple
from mskd_plugin.functional.decoupling import check_scales
from mskd_plugin.losses.dkd import dkd_of_samples
from mskd_plugin.losses.feature_loss import at_least_float32
from mskd_plugin.losses.logits import kd_of_samples, prepare_logits
from mskd_plugin.losses.nkd import nkd_of_samples

#: Side of the grid that all regions are pooled from.
GRID = 4
SCALES = (1, 2, 4)

#: The settings of each term, with their defaults: those of the published CIFAR-100 runs.
TERMS: dict[str, dict[str, float]] = {
    "kd": {"temperature": 4.0},
    "dkd": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0},
    "nkd": {"temperature": 4.0, "gamma": 8.0},
}


def check_sdd_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Return the scales of SDD, or say what is wrong with them.

    Raises:
        SettingError: If they are not out of 1, 2 and 4, with 1 among them.
    """
    checked = check_scales(scales)
    if 1 not in checked or not set(checked) <= set(SCALES):
        raise SettingError("scales", f"out of {SCALES}, with 1 among them", checked)
    return checked


def regions_of_grid(feature: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Pool a map (N, C, H, W) to a 4 x 4 grid, and the regions of all scales from the grid.

    Returns:
        (N, R_k, C) per scale.

    Raises:
        SettingError: If the map is smaller than the largest scale: its regions would be repeated
            values.
    """
    if feature.dim() != 4:
        raise SettingError("feature", "a map (N, C, H, W)", f"shape {tuple(feature.shape)}")
    if min(feature.shape[-2:]) < max(scales):
        raise SettingError(
            "scales",
            "no larger than the side of either network's last map",
            f"{tuple(scales)} for a map of {tuple(feature.shape[-2:])}",
        )
    return decouple(F.adaptive_avg_pool2d(feature, GRID), scales)


@MODELS.register_module()
class ScaleDecoupledKDLoss(nn.Module):
    r"""SDD (Wei et al., CVPR 2024, arXiv 2403.13512) on KD, DKD or NKD.

    .. math::
        L = w \frac{1}{N R} \sum_{nr} c_{nr}\, l(W_s s_{nr} + b_s, W_t t_{nr} + b_t, y_n)

    over the regions :math:`s_{nr}, t_{nr}` of the maps that feed the classifiers, with l the term
    of one sample, :math:`\tau^2` included. :math:`c` is ``complementary_weight`` where the teacher
    is right on the region and wrong on the whole map, or the reverse, else 1. The maps are pooled
    to 4 x 4, and the coarser regions from those 16. Summed over classes; the mean over samples and
    regions does not divide by the sum of the :math:`c`. The gradient reaches the student's
    classifier through every region.

    Args:
        term: ``"kd"``, ``"dkd"`` or ``"nkd"``.
        scales: Out of 1, 2 and 4, with 1 among them.
        complementary_weight: :math:`c` of complementary regions, at least 0.
        loss_weight: :math:`w`.
        **settings: Of the term, see :data:`TERMS`: ``temperature``; for DKD ``alpha`` and ``beta``,
            for NKD ``gamma``.

    Shapes:
        Maps (N, C, H, W) of any two widths and sizes, labels (N,), classifiers (M, C) and (M,). The
        result is a scalar, in float32 or wider.

    Raises:
        SettingError: When built, if a setting is unknown or out of range; when called, if shapes do
            not fit together, a map is smaller than the largest scale, or labels are no class
            indices.

    Defaults from: shicaiwei123/SDD-CVPR2024, which inherits KD's and DKD's settings.

    Not carried over from that code: sixteen regions of a 2 x 2 map, which are four values repeated;
    a NaN or infinite loss replaced by zero.
    """

    def __init__(
        self,
        term: str = "kd",
        scales: Sequence[int] = SCALES,
        complementary_weight: float = 2.0,
        loss_weight: float = 1.0,
        **settings: float,
    ) -> None:
        super().__init__()
        if term not in TERMS:
            raise SettingError("term", f"one of {tuple(TERMS)}", repr(term))
        unknown = sorted(set(settings) - set(TERMS[term]))
        if unknown:
            raise SettingError(
                "settings", f"among {', '.join(TERMS[term])} for the term {term!r}", unknown
            )
        self.term = term
        self.scales = check_sdd_scales(scales)
        self.complementary_weight = check_at_least_zero(
            "complementary_weight", complementary_weight
        )
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.settings = {**TERMS[term], **settings}
        for name, value in self.settings.items():
            (check_above_zero if name == "temperature" else check_at_least_zero)(name, value)

    def forward(
        self,
        student_feature: Tensor,
        teacher_feature: Tensor,
        labels: Tensor,
        student_weight: Tensor,
        teacher_weight: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted loss."""
        with torch.autocast(student_feature.device.type, enabled=False):
            of_student = regions_of_grid(at_least_float32(student_feature), self.scales)
            of_teacher = regions_of_grid(at_least_float32(teacher_feature.detach()), self.scales)
            consistent = consistent_regions(of_teacher, labels, teacher_weight, teacher_bias)
            student = _classified("student_weight", of_student, student_weight, student_bias)
            teacher = _classified("teacher_weight", of_teacher, teacher_weight, teacher_bias)
            per_image = student.shape[1]
            logits = prepare_logits(student.flatten(0, 1), teacher.flatten(0, 1))
            losses = self._of_samples(*logits, labels.repeat_interleave(per_image))
            weights = torch.where(torch.cat(consistent, dim=1), 1.0, self.complementary_weight)
            weighted = losses * weights.flatten().to(losses.dtype)
            return self.loss_weight * weighted.sum() / max(len(losses), 1)

    def _of_samples(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if self.term == "kd":
            return kd_of_samples(student, teacher, **self.settings)
        function: Callable[..., Tensor] = dkd_of_samples if self.term == "dkd" else nkd_of_samples
        return function(student, teacher, labels, **self.settings)


def _classified(
    setting: str, regions: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Apply a classifier to all regions: (N, R, M) logits."""
    joined = torch.cat(list(regions), dim=1)
    if weight.dim() != 2 or weight.shape[1] != joined.shape[-1]:
        raise SettingError(
            setting,
            f"the weight (M, {joined.shape[-1]}) of the classifier that reads this map",
            f"shape {tuple(weight.shape)}",
        )
    dtype = torch.promote_types(joined.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(joined.to(dtype), weight.to(dtype), bias)
