"""Naive float64 loops over the terms of the feature baselines, as their published code has them.

Plain Python numbers and lists, nothing shared with the package. Shapes, as nested lists: a map
[N][C][H][W], vectors [N][C].
"""

from __future__ import annotations

import math

from oracles import windows


def _sum(values) -> float:
    return math.fsum(values)


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def dot(a: list, b: list) -> float:
    return _sum(x * y for x, y in zip(a, b, strict=True))


def _unit(vector: list, eps: float = 1e-12) -> list:
    norm = max(math.sqrt(dot(vector, vector)), eps)
    return [x / norm for x in vector]


def _flat(value) -> list:
    return [x for item in value for x in _flat(item)] if isinstance(value, list) else [value]


def pooled_to(feature_map: list, height: int, width: int) -> list:
    """Adaptive average pooling, where the map is larger."""
    rows = windows(len(feature_map[0][0]), height, 0)
    columns = windows(len(feature_map[0][0][0]), width, 0)
    return [
        [
            [
                [
                    _mean(channel[i][j] for i in range(*row) for j in range(*column))
                    for column in columns
                ]
                for row in rows
            ]
            for channel in image
        ]
        for image in feature_map
    ]


def _same_size(student: list, teacher: list) -> tuple[list, list]:
    height = min(len(student[0][0]), len(teacher[0][0]))
    width = min(len(student[0][0][0]), len(teacher[0][0][0]))
    return pooled_to(student, height, width), pooled_to(teacher, height, width)


def mean_squared(student: list, teacher: list) -> float:
    return _mean((s - t) ** 2 for s, t in zip(_flat(student), _flat(teacher), strict=True))


def attention_transfer(student: list, teacher: list, power: int = 2) -> float:
    student, teacher = _same_size(student, teacher)

    def attention(image):
        flat = [_flat(channel) for channel in image]
        return _unit([_mean(c[i] ** power for c in flat) for i in range(len(flat[0]))])

    return _mean(
        (s - t) ** 2
        for image_s, image_t in zip(student, teacher, strict=True)
        for s, t in zip(attention(image_s), attention(image_t), strict=True)
    )


def neuron_selectivity(student: list, teacher: list) -> float:
    student, teacher = _same_size(student, teacher)

    def channels(image):
        return [_unit(_flat(channel)) for channel in image]

    def mean_kernel(first, second):
        return _mean(
            dot(a, b) ** 2
            for image_a, image_b in zip(first, second, strict=True)
            for a in channels(image_a)
            for b in channels(image_b)
        )

    return (
        mean_kernel(teacher, teacher)
        + mean_kernel(student, student)
        - 2 * mean_kernel(student, teacher)
    )


def similarity_preserving(student: list, teacher: list) -> float:
    def similarities(feature):
        flat = [_flat(image) for image in feature]
        return [_unit([dot(a, b) for b in flat]) for a in flat]

    s, t, size = similarities(student), similarities(teacher), len(student)
    return _sum((t[i][j] - s[i][j]) ** 2 for i in range(size) for j in range(size)) / size**2


def correlation_congruence(student: list, teacher: list) -> float:
    d = [[abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student, teacher)]
    return _mean(_sum(x * y for x, y in zip(d[i], d[i + 1])) for i in range(len(d) - 1))


def variational_information(
    student: list, teacher: list, log_scale: list, eps: float = 1e-5
) -> float:
    student, teacher = _same_size(student, teacher)
    values = []
    for image_s, image_t in zip(student, teacher, strict=True):
        for s, t, a in zip(image_s, image_t, log_scale, strict=True):
            variance = math.log(1 + math.exp(a)) + eps
            for mu, f in zip(_flat(s), _flat(t), strict=True):
                values.append(0.5 * ((mu - f) ** 2 / variance + math.log(variance)))
    return _mean(values)


def _smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def relational_distance(student: list, teacher: list) -> float:
    def distances(vectors):
        d = [
            [math.sqrt(max(_sum((x - y) ** 2 for x, y in zip(a, b)), 1e-12)) for b in vectors]
            for a in vectors
        ]
        for i in range(len(d)):
            d[i][i] = 0.0
        mean = _mean(x for row in d for x in row if x > 0)
        return [x / mean for row in d for x in row]

    return _mean(_smooth_l1(s - t) for s, t in zip(distances(student), distances(teacher)))


def relational_angle(student: list, teacher: list) -> float:
    def cosines(vectors):
        found = []
        for i in vectors:
            for j in vectors:
                for k in vectors:
                    to_j = _unit([a - b for a, b in zip(j, i)])
                    to_k = _unit([a - b for a, b in zip(k, i)])
                    found.append(dot(to_j, to_k))
        return found

    return _mean(_smooth_l1(s - t) for s, t in zip(cosines(student), cosines(teacher)))


def probabilistic_transfer(student: list, teacher: list, eps: float = 1e-7) -> float:
    def probabilities(vectors):
        units = [[x / (math.sqrt(dot(v, v)) + eps) for x in v] for v in vectors]
        rows = [[(dot(a, b) + 1) / 2 for b in units] for a in units]
        return [[x / _sum(row) for x in row] for row in rows]

    s, t = _flat(probabilities(student)), _flat(probabilities(teacher))
    return _mean(q * math.log((q + eps) / (p + eps)) for p, q in zip(s, t, strict=True))


def _view(embeddings: list, memory: list, rows: list, temperature: float) -> list:
    return [
        [math.exp(dot(memory[row], e) / temperature) for row in of_image]
        for e, of_image in zip(embeddings, rows, strict=True)
    ]


def _noise_contrastive(out: list, z: float, images: int, eps: float = 1e-7) -> float:
    total = 0.0
    for scores in out:
        noise = (len(scores) - 1) / images
        p = [score / z for score in scores]
        total += math.log(p[0] / (p[0] + noise + eps))
        total += _sum(math.log(noise / (x + noise + eps)) for x in p[1:])
    return -total / len(out)


class CRD:
    """The memory and the loss of CRD, step by step."""

    def __init__(self, student_memory: list, teacher_memory: list, temperature, momentum) -> None:
        self.memories = {"student": student_memory, "teacher": teacher_memory}
        self.temperature, self.momentum = temperature, momentum
        self.z: dict[str, float] = {}

    def step(self, student: list, teacher: list, index: list, negatives: list) -> float:
        images = len(self.memories["student"])
        embeddings = {
            "student": [_unit(e) for e in student],
            "teacher": [_unit(e) for e in teacher],
        }
        rows = [[i, *others] for i, others in zip(index, negatives, strict=True)]
        loss = 0.0
        for side, other in (("student", "teacher"), ("teacher", "student")):
            out = _view(embeddings[side], self.memories[other], rows, self.temperature)
            self.z.setdefault(side, _mean(_flat(out)) * images)
            loss += _noise_contrastive(out, self.z[side], images)
        for side, memory in self.memories.items():
            old = {i: memory[i] for i in index}
            for i, e in zip(index, embeddings[side], strict=True):
                memory[i] = _unit(
                    [self.momentum * a + (1 - self.momentum) * b for a, b in zip(old[i], e)]
                )
        return loss
