"""Sample categorization: which of the teacher's regions agree with its global feature.

Shapes: N batch, D embedding, R_k regions of scale k, M classes.

Named in arXiv 2502.05835 ("in conjunction with sample categorization"); the rule is this project's
reconstruction, after the region categories of scale-decoupled distillation (SDD, CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mskd_plugin.errors import SettingError


def check_labels(labels: Tensor, size: int) -> None:
    """Check that ``labels`` are the class indices of a batch of ``size`` images.

    Args:
        labels: What stands for the classes; right is (N,), int64.
        size: N.

    Raises:
        SettingError: If they are anything else, the scores (N, M) of mixed images for one.
    """
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.shape != (size,) or labels.dtype != torch.int64:
        raise SettingError(
            "labels",
            f"class indices of shape ({size},), one per image, in torch.int64",
            f"{labels.dtype} of shape {tuple(labels.shape)}"
            if is_tensor
            else f"a {type(labels).__name__}",
            "Images mixed by batch augmentations (mixup, cutmix) have no class.",
        )


@torch.no_grad()
def consistent_regions(
    regions: Sequence[Tensor], labels: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Tell consistent regions from complementary ones.

    The classifier is applied to each region vector. A region is consistent when its prediction is
    right exactly where the prediction on the global feature is right, else it is complementary.

    Args:
        regions: The teacher's regions, (N, R_k, D) per scale, one of the scales with a single
            region.
        labels: (N,) class indices.
        weight: (M, D) of the teacher's classifier.
        bias: (M,) of the teacher's classifier.

    Returns:
        A boolean tensor (N, R_k) per scale, true where the region is consistent.

    Raises:
        SettingError: If no scale has a single region, the labels are not class indices, or the
            classifier does not read vectors of the regions' width.
    """
    check_labels(labels, regions[0].shape[0])
    width = regions[0].shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise SettingError(
            "classifier_weight",
            f"the weight (M, {width}) of a classifier that reads this stage's {width} channels",
            f"shape {tuple(weight.shape)}",
            "Only the stage that feeds the teacher's classifier can be categorized.",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise SettingError(
            "classifier_bias",
            f"of shape ({weight.shape[0]},), as the classifier's weight says",
            f"shape {tuple(bias.shape)}",
        )
    dtype = weight.dtype
    # Close logits tie when they are rounded to half precision: a region's category would turn on
    # the rounding.
    with torch.autocast(weight.device.type, enabled=False):
        right = [
            F.linear(scale.to(dtype), weight, bias).argmax(-1) == labels[:, None]
            for scale in regions
        ]
    globally = next((r for r in right if r.shape[1] == 1), None)
    if globally is None:
        raise SettingError(
            "scales",
            "scales that contain 1, the global feature that categorization compares with",
            f"regions per scale {tuple(r.shape[1] for r in right)}",
        )
    return tuple(r == globally for r in right)
