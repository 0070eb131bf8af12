"""Naive float64 loops over the equations of the method, the oracles of the tests.

Plain Python numbers and lists, nothing shared with the package. Shapes, as nested lists: a map
[N][C][H][W], regions [K][N][R_k][D], region weights [K][N][R_k].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def windows(size: int, scale: int, overlap: float) -> list[tuple[int, int]]:
    """Bounds of the windows along one axis."""
    if overlap == 0:
        return [
            (math.floor(Fraction(i * size, scale)), math.ceil(Fraction((i + 1) * size, scale)))
            for i in range(scale)
        ]
    side = math.ceil(Fraction(size, scale))
    stride = max(1, round(side * (1 - overlap)))
    found = [(0, side)]
    while found[-1][1] < size:
        stop = min(found[-1][0] + stride + side, size)  # the last window is moved to the border
        found.append((stop - side, stop))
    return found


def decouple(feature_map: list, scales: Sequence[int], overlap: float = 0.0) -> list:
    """Mean of each channel over each window."""
    height, width = len(feature_map[0][0]), len(feature_map[0][0][0])
    regions = []
    for scale in scales:
        of_scale = []
        for image in feature_map:
            of_image = []
            for top, bottom in windows(height, scale, overlap):
                for left, right in windows(width, scale, overlap):
                    vector = []
                    for channel in image:
                        values = [
                            channel[i][j] for i in range(top, bottom) for j in range(left, right)
                        ]
                        vector.append(math.fsum(values) / len(values))
                    of_image.append(vector)
            of_scale.append(of_image)
        regions.append(of_scale)
    return regions


def _centred(scale: list) -> list:
    """Take the mean over images and regions off each region vector of a scale."""
    vectors = [vector for image in scale for vector in image]
    mean = [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]
    return [
        [[v - m for v, m in zip(vector, mean, strict=True)] for vector in image] for image in scale
    ]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    inner = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return inner / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))


def info_nce(anchor: list, positive: list, negatives: list, temperature: float) -> float:
    """-log of the positive's share among the positive and the negatives."""
    of_positive = math.exp(_cosine(anchor, positive) / temperature)
    of_negatives = [math.exp(_cosine(anchor, negative) / temperature) for negative in negatives]
    return -math.log(of_positive / math.fsum([of_positive, *of_negatives]))


def sample_wise(
    anchors: list, keys: list, n: int, r: int, temperature: float, labels: list | None
) -> float:
    """l_sam(n, k, r) of one scale: against the same region of the other images."""
    others = [
        keys[m][r]
        for m in range(len(keys))
        if m != n and (labels is None or labels[m] != labels[n])
    ]
    return info_nce(anchors[n][r], keys[n][r], others, temperature)


def feature_wise(anchors: list, keys: list, n: int, r: int, temperature: float) -> float:
    """l_fea(n, k, r) of one scale: against the other regions of the image."""
    others = [keys[n][u] for u in range(len(keys[n])) if u != r]
    return info_nce(anchors[n][r], keys[n][r], others, temperature)


def contrastive_terms(
    student: list,
    teacher: list,
    temperature: float = 0.1,
    scale_weights: Sequence[float] | None = None,
    symmetric: bool = False,
    center: bool = False,
    region_weights: list | None = None,
    excluded_labels: list | None = None,
) -> tuple[float, float]:
    """The sample-wise and the feature-wise term of a stage, averaged over scales by weight."""
    lambdas = [1.0] * len(student) if scale_weights is None else scale_weights
    sums = [0.0, 0.0]
    for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if center:
            s, t = _centred(s), _centred(t)
        directions = [(s, t), (t, s)] if symmetric else [(s, t)]
        of_samples, of_features = [], []
        for n in range(len(s)):
            for r in range(len(s[n])):
                weight = 1.0 if region_weights is None else region_weights[k][n][r]
                for anchors, keys in directions:
                    l_sample = sample_wise(anchors, keys, n, r, temperature, excluded_labels)
                    l_feature = feature_wise(anchors, keys, n, r, temperature)
                    of_samples.append(weight * l_sample)
                    of_features.append(weight * l_feature)
        sums[0] += lambdas[k] * math.fsum(of_samples) / len(of_samples)
        if len(s[0]) > 1:
            sums[1] += lambdas[k] * math.fsum(of_features) / len(of_features)
    return sums[0] / math.fsum(lambdas), sums[1] / math.fsum(lambdas)


def _predicted(vector: list, weight: list, bias: list | None) -> int:
    """Class of the largest logit, the first of equals."""
    logits = [
        math.fsum(w * v for w, v in zip(row, vector, strict=True))
        + (0.0 if bias is None else bias[c])
        for c, row in enumerate(weight)
    ]
    return logits.index(max(logits))


def consistent(teacher: list, labels: list, weight: list, bias: list | None) -> list:
    """True where a region is right exactly when the scale of one region is."""
    global_scale = next(scale for scale in teacher if len(scale[0]) == 1)
    return [
        [
            [
                (_predicted(vector, weight, bias) == labels[n])
                == (_predicted(global_scale[n][0], weight, bias) == labels[n])
                for vector in scale[n]
            ]
            for n in range(len(labels))
        ]
        for scale in teacher
    ]


def stage_loss(
    student: list,
    teacher: list,
    labels: list,
    classifier_weight: list,
    classifier_bias: list | None,
    *,
    loss_weight: float = 1.0,
    feature_weight: float = 1.0,
    complementary_weight: float = 1.0,
    keep: str = "all",
    exclude_same_class: bool = False,
    **settings,
) -> float:
    """alpha L_stage, with the weights that the categories of the teacher's regions give."""
    of_consistent = 0.0 if keep == "complementary" else 1.0
    of_complementary = 0.0 if keep == "consistent" else complementary_weight
    categories = consistent(teacher, labels, classifier_weight, classifier_bias)
    region_weights = [
        [[of_consistent if c else of_complementary for c in image] for image in scale]
        for scale in categories
    ]
    sample, feature = contrastive_terms(
        student,
        teacher,
        region_weights=region_weights,
        excluded_labels=labels if exclude_same_class else None,
        **settings,
    )
    return loss_weight * (sample + feature_weight * feature)
