"""Naive float64 loops over the equations of the logit baselines: lists of numbers, one sample at a
time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities at a temperature."""
    powers = [math.exp(z / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def mean(values: Sequence[float]) -> float:
    """Mean of a list."""
    return math.fsum(values) / len(values)


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q)."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def others(row: Sequence[float], label: int) -> list[float]:
    """A row without its label."""
    return [value for c, value in enumerate(row) if c != label]


def kd_of_sample(s, t, label, temperature):
    """KD of one sample."""
    return temperature**2 * divergence(softmax(t, temperature), softmax(s, temperature))


def dkd_of_sample(s, t, label, temperature, alpha, beta):
    """DKD of one sample."""
    p_s, p_t = softmax(s, temperature), softmax(t, temperature)
    two_way = [[p[label], math.fsum(others(p, label))] for p in (p_t, p_s)]
    rest = [softmax(others(z, label), temperature) for z in (t, s)]
    return temperature**2 * (alpha * divergence(*two_way) + beta * divergence(*rest))


def nkd_of_sample(s, t, label, temperature, gamma):
    """NKD of one sample."""
    target = -softmax(t)[label] * math.log(softmax(s)[label])
    rest = [softmax(others(z, label), temperature) for z in (t, s)]
    return target - gamma * temperature**2 * math.fsum(
        a * math.log(b) for a, b in zip(*rest, strict=True)
    )


def ofa_of_sample(s, t, label, temperature, exponent):
    """OFA of one sample."""
    total = 0.0
    for c, (p_s, p_t) in enumerate(
        zip(softmax(s, temperature), softmax(t, temperature), strict=True)
    ):
        hit = 1.0 if c == label else 0.0
        total -= ((p_t + hit) ** exponent - hit) * math.log(p_s)
    return total


def wsld_of_sample(s, t, label, temperature):
    """WSLD of one sample."""
    behind = -math.log(softmax(s)[label]) / (-math.log(softmax(t)[label]) + 1e-7)
    soft = -math.fsum(
        a * math.log(b)
        for a, b in zip(softmax(t, temperature), softmax(s, temperature), strict=True)
    )
    return temperature**2 * (1 - math.exp(-behind)) * soft


def over_batch(of_sample, student, teacher, labels=None, **settings) -> float:
    """Mean of a sample's term over a batch."""
    labels = [None] * len(student) if labels is None else labels
    return mean(
        [of_sample(s, t, y, **settings) for s, t, y in zip(student, teacher, labels, strict=True)]
    )


def standardized(logits: Sequence[float]) -> list[float]:
    """Logits of one sample, standardised."""
    centre = mean(logits)
    variance = math.fsum((z - centre) ** 2 for z in logits) / (len(logits) - 1)
    return [(z - centre) / (1e-7 + math.sqrt(variance)) for z in logits]


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation with DIST's denominator."""
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norms + 1e-8)


def dist(student, teacher, temperature, beta, gamma) -> float:
    """DIST of a batch."""
    p_s = [softmax(row, temperature) for row in student]
    p_t = [softmax(row, temperature) for row in teacher]
    columns = (list(zip(*p_s, strict=True)), list(zip(*p_t, strict=True)))
    inter = 1 - mean([pearson(a, b) for a, b in zip(p_s, p_t, strict=True)])
    intra = 1 - mean([pearson(a, b) for a, b in zip(*columns, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def _gram(rows: list) -> list:
    return [[math.fsum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]


def _squared_difference(a: list, b: list) -> float:
    return math.fsum(
        (x - y) ** 2
        for row, other in zip(a, b, strict=True)
        for x, y in zip(row, other, strict=True)
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else mean(ordered[middle - 1 : middle + 1])


def _mask_mean(values: Sequence[float]) -> float:
    return mean([1.0 if value <= _median(values) else 0.0 for value in values])


def mlkd(weak: tuple, strong: tuple, temperatures: Sequence[float]) -> float:
    """The published sum over two views, each (student, teacher); the last two temperatures' strong
    KD is on weak."""
    student, teacher = weak
    p_t = [softmax(row) for row in teacher]
    of_samples = _mask_mean([max(row) for row in p_t])
    of_classes = _mask_mean([math.fsum(column) for column in zip(*p_t, strict=True)])
    total = 0.0
    for index, temperature in enumerate(temperatures):
        view = strong if index < 3 else weak
        total += over_batch(kd_of_sample, *weak, temperature=temperature) * of_samples
        total += over_batch(kd_of_sample, *view, temperature=temperature)
        rows = [[softmax(row, temperature) for row in side] for side in (student, teacher)]
        columns = [[list(column) for column in zip(*side, strict=True)] for side in rows]
        by_class = _squared_difference(*(_gram(side) for side in columns)) / len(columns[0])
        by_batch = _squared_difference(*(_gram(side) for side in rows)) / len(rows[0])
        total += by_class * of_classes + by_batch * of_samples
    return total


def adaptive_pool(channel: list, size: int) -> list:
    """One channel (H, W) averaged over the windows of adaptive pooling to (size, size)."""
    height, width = len(channel), len(channel[0])

    def bounds(length, i):
        return math.floor(i * length / size), math.ceil((i + 1) * length / size)

    return [
        [
            mean(
                [channel[y][x] for y in range(*bounds(height, i)) for x in range(*bounds(width, j))]
            )
            for j in range(size)
        ]
        for i in range(size)
    ]


def sdd_regions(feature: list, scales: Sequence[int]) -> list:
    """Vectors of one image's regions [R][C]: from 4 x 4, the coarse scales first, row by row."""
    grid = [adaptive_pool(channel, 4) for channel in feature]
    regions = []
    for scale in sorted(scales):
        pooled = [adaptive_pool(channel, scale) for channel in grid]
        for i in range(scale):
            for j in range(scale):
                regions.append([channel[i][j] for channel in pooled])
    return regions


def classify(vector: Sequence[float], weight: list, bias: list) -> list[float]:
    """Logits of a linear classifier."""
    return [
        math.fsum(w * v for w, v in zip(row, vector, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def sdd(of_sample, student, teacher, labels, scales, complementary_weight=2.0, **settings) -> float:
    """SDD of a batch; a side is (maps [N][C][H][W], weight, bias)."""
    losses = []
    for n, label in enumerate(labels):
        sides = []
        for maps, weight, bias in (student, teacher):
            regions = sdd_regions(maps[n], scales)
            sides.append([classify(region, weight, bias) for region in regions])
        right = [logits.index(max(logits)) == label for logits in sides[1]]
        for r, (s, t) in enumerate(zip(*sides, strict=True)):
            weight = 1.0 if right[r] == right[0] else complementary_weight
            losses.append(weight * of_sample(s, t, label, **settings))
    return mean(losses)
