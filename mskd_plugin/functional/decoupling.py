"""Multi-scale decoupling: one feature map becomes the region vectors of several scales.

Shapes: N batch, C channels, H x W map, L tokens, R_k regions of scale k.

The method is arXiv 2502.05835 ("multi-scale sliding-window pooling"); its text states no window
sizes, so the window rule below is this project's reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mskd_plugin.errors import SettingError, is_number
from mskd_plugin.functional.constants import kept

#: Scales used when none are given.
DEFAULT_SCALES = (1, 2, 4)


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Return ``scales`` as a tuple, or say what is wrong with them.

    Raises:
        SettingError: If ``scales`` is empty, repeats a scale, or holds anything but positive
            integers.
    """
    if (
        not isinstance(scales, Sequence)
        or not scales
        or not all(type(scale) is int and scale > 0 for scale in scales)
        or len(set(scales)) < len(scales)
    ):
        raise SettingError("scales", "distinct positive integers such as (1, 2, 4)", repr(scales))
    return tuple(scales)


def check_overlap(overlap: float) -> float:
    """Return ``overlap``, or say that it is outside [0, 1).

    Raises:
        SettingError: If ``overlap`` is no number in [0, 1).
    """
    if not is_number(overlap) or not 0 <= overlap < 1:
        raise SettingError("overlap", "a number in [0, 1)", repr(overlap))
    return float(overlap)


def window_bounds(size: int, scale: int, overlap: float = 0.0) -> list[tuple[int, int]]:
    """Place the windows of one scale along one axis.

    Without overlap these are the bins of adaptive average pooling, ``floor(i size / scale)`` to
    ``ceil((i + 1) size / scale)``. With overlap rho a window of ``ceil(size / scale)`` positions
    slides by ``max(1, round(side (1 - rho)))``, and a last window stands at the border so that
    every position is covered.

    Args:
        size: Positions along the axis.
        scale: Windows have the relative side ``1 / scale``.
        overlap: Share of a window that the next one covers again, in [0, 1).

    Returns:
        ``(start, stop)`` of each window, in order.

    Raises:
        SettingError: If ``scale`` is larger than ``size``.

    Example:
        >>> window_bounds(8, 2)
        [(0, 4), (4, 8)]
        >>> window_bounds(8, 2, overlap=0.5)
        [(0, 4), (2, 6), (4, 8)]
    """
    if scale > size:
        raise SettingError(
            "scales",
            "scales no larger than the side of the feature map",
            f"scale {scale} for a side of {size}",
        )
    if overlap == 0:
        return [
            (i * size // scale, -((-(i + 1) * size) // scale))  # -(-a // b) is ceil(a / b)
            for i in range(scale)
        ]
    side = math.ceil(size / scale)
    stride = max(1, round(side * (1 - overlap)))
    starts = list(range(0, size - side + 1, stride))
    if starts[-1] + side < size:
        starts.append(size - side)
    return [(start, start + side) for start in starts]


@kept
def _pooling_matrix(
    height: int,
    width: int,
    scales: tuple[int, ...],
    overlap: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[int, ...]]:
    """Build the (sum R_k, H W) matrix of window means, exact in float64 first, and the counts
    R_k.
    """
    rows, counts = [], []
    for scale in scales:
        vertical = window_bounds(height, scale, overlap)
        horizontal = window_bounds(width, scale, overlap)
        counts.append(len(vertical) * len(horizontal))
        for top, bottom in vertical:
            for left, right in horizontal:
                window = torch.zeros(height, width, dtype=torch.float64, device="cpu")
                window[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
                rows.append(window.flatten())
    return torch.stack(rows).to(device=device, dtype=dtype), tuple(counts)


def check_map_size(map_size: Sequence[int] | None) -> tuple[int, int] | None:
    """Return the size of a patch grid as a tuple, or None.

    Raises:
        SettingError: If it is neither None nor two positive integers.
    """
    if map_size is None:
        return None
    if (
        not isinstance(map_size, Sequence)
        or len(map_size) != 2
        or not all(type(side) is int and side > 0 for side in map_size)
    ):
        raise SettingError("map_size", "two positive integers (H, W)", repr(map_size))
    return map_size[0], map_size[1]


def tokens_to_map(
    tokens: Tensor, class_tokens: int = 0, map_size: tuple[int, int] | None = None
) -> Tensor:
    """Lay a token sequence (N, L, C) out as a feature map (N, C, H, W).

    Args:
        tokens: The sequence, row by row, behind any class tokens.
        class_tokens: Leading tokens that stand for no position; they are left out.
        map_size: ``(H, W)`` of the patch grid. Default: a square.

    Raises:
        SettingError: If the remaining tokens do not fill the grid.
    """
    length = tokens.shape[1] - class_tokens
    if map_size is None:
        side = math.isqrt(max(length, 0))
        if length < 1 or side * side != length:
            raise SettingError(
                "class_tokens",
                "a count that leaves a square number of patch tokens (or give `map_size`)",
                f"{class_tokens} of {tokens.shape[1]} tokens",
            )
        map_size = (side, side)
    height, width = map_size
    if height * width != length:
        raise SettingError(
            "map_size", f"(H, W) with H W = {length} patch tokens", f"{(height, width)}"
        )
    return tokens[:, class_tokens:].transpose(1, 2).unflatten(2, (height, width))


def pool_windows(
    feature_map: Tensor, scales: Sequence[int] = DEFAULT_SCALES, overlap: float = 0.0
) -> tuple[Tensor, tuple[int, ...]]:
    """Pool a feature map over the windows of all scales, in one product with their means.

    Args and errors are those of :func:`decouple`.

    Returns:
        The regions (N, sum R_k, C), scale by scale, and the counts R_k.
    """
    if feature_map.dim() == 2:
        feature_map = feature_map[:, :, None, None]
    if feature_map.dim() != 4:
        raise SettingError(
            "feature_map",
            "a tensor (N, C, H, W) or (N, C)",
            f"shape {tuple(feature_map.shape)}",
        )
    if not feature_map.is_floating_point():  # whose means would be cut to whole numbers
        raise SettingError("feature_map", "a tensor of a floating dtype", feature_map.dtype)
    height, width = feature_map.shape[-2:]
    matrix, counts = _pooling_matrix(
        height,
        width,
        check_scales(scales),
        check_overlap(overlap),
        feature_map.device,
        feature_map.dtype,
    )
    positions, size = feature_map.flatten(2), len(feature_map)  # (N, C, H W)
    # As bmm: matmul would copy the matrix for each image.
    if feature_map.requires_grad and feature_map.is_contiguous():
        # The other product's gradient would have the channels last, a layout that the rest of the
        # backward pass would have to convert.
        return torch.bmm(positions, matrix.t().expand(size, -1, -1)).transpose(1, 2), counts
    return torch.bmm(matrix.expand(size, -1, -1), positions.transpose(1, 2)), counts


def decouple(
    feature_map: Tensor, scales: Sequence[int] = DEFAULT_SCALES, overlap: float = 0.0
) -> tuple[Tensor, ...]:
    """Pool a feature map over the windows of each scale.

    Args:
        feature_map: (N, C, H, W), or (N, C) pooled vectors, which count as a map of one position.
        scales: Scale k cuts the map into windows of relative side 1/k; 1 is the global feature.
        overlap: Overlap of neighbouring windows in [0, 1); 0 is the k x k grid of adaptive average
            pooling.

    Returns:
        One tensor (N, R_k, C) per scale, regions row by row.

    Raises:
        SettingError: If a scale is larger than the map, the map is of whole numbers, or a setting
            is malformed.

    Example:
        >>> feature_map = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> global_feature, quarters = decouple(feature_map, scales=(1, 2))
        >>> global_feature.squeeze().item()
        7.5
        >>> quarters.squeeze().tolist()
        [2.5, 4.5, 10.5, 12.5]
    """
    regions, counts = pool_windows(feature_map, scales, overlap)
    return regions.split(counts, dim=1)
