"""Naive float64 loops over the terms of AB, FSP, FT, OFD and ReviewKD and over their layers.

Plain Python numbers and lists, nothing shared with the package. Shapes, as nested lists: a map
[N][C][H][W]. Layers' parameters come as dicts of lists, named as in a state dict.
"""

from __future__ import annotations

import math

from oracles import windows


def indices(maps):
    """All (n, c, i, j) of a map."""
    for n, image in enumerate(maps):
        for c, channel in enumerate(image):
            for i, row in enumerate(channel):
                for j, _ in enumerate(row):
                    yield n, c, i, j


def at(maps, index):
    n, c, i, j = index
    return maps[n][c][i][j]


def build(n, c, h, w, value):
    """A map of value(n, c, i, j)."""
    return [
        [[[value(a, b, i, j) for j in range(w)] for i in range(h)] for b in range(c)]
        for a in range(n)
    ]


def shape(maps):
    return len(maps), len(maps[0]), len(maps[0][0]), len(maps[0][0][0])


def pooled(maps, height, width):
    """Adaptive average pooling."""
    n, c, h, w = shape(maps)
    rows, columns = windows(h, height, 0), windows(w, width, 0)

    def value(a, b, i, j):
        values = [maps[a][b][y][x] for y in range(*rows[i]) for x in range(*columns[j])]
        return math.fsum(values) / len(values)

    return build(n, c, height, width, value)


def smaller_of(first, second):
    height, width = (min(shape(first)[d], shape(second)[d]) for d in (2, 3))
    return pooled(first, height, width), pooled(second, height, width)


# --- the terms ---------------------------------------------------------------------------------


def activation_boundary(student, teacher, margin=1.0):
    """One stage of AB, without the factor of the stage."""
    total = []
    for index in indices(student):
        s, t = at(student, index), at(teacher, index)
        if s > -margin and t <= 0:
            total.append((s + margin) ** 2)
        if s <= margin and t > 0:
            total.append((s - margin) ** 2)
    return math.fsum(total) / len(student) * 3 / 1000


def fsp(student_bottom, student_top, teacher_bottom, teacher_top):
    """One pair of stages of FSP."""
    errors = []
    sides = [smaller_of(student_bottom, student_top), smaller_of(teacher_bottom, teacher_top)]
    for n in range(len(student_top)):
        for i in range(len(student_top[0])):
            for j in range(len(student_bottom[0])):
                entries = []
                for bottom, top in sides:
                    _, _, h, w = shape(top)
                    values = [
                        top[n][i][y][x] * bottom[n][j][y][x] for y in range(h) for x in range(w)
                    ]
                    entries.append(math.fsum(values) / (h * w))
                errors.append((entries[0] - entries[1]) ** 2)
    return math.fsum(errors) / len(errors)


def factor_transfer(student, teacher, factor_power=2, error_power=1):
    student, teacher = smaller_of(student, teacher)
    _, _, h, w = shape(student)
    errors = []
    for n in range(len(student)):
        factors = []
        for image in (student[n], teacher[n]):
            means = [
                math.fsum(channel[i][j] ** factor_power for channel in image) / len(image)
                for i in range(h)
                for j in range(w)
            ]
            norm = max(math.sqrt(math.fsum(m * m for m in means)), 1e-12)
            factors.append([m / norm for m in means])
        errors += [abs(s - t) ** error_power for s, t in zip(*factors, strict=True)]
    return math.fsum(errors) / len(errors)


def mean_squared(first, second):
    errors = [(at(first, index) - at(second, index)) ** 2 for index in indices(first)]
    return math.fsum(errors) / len(errors)


def margins(weights, biases):
    """Mean of the negative half of a normal distribution, per channel."""
    found = []
    for weight, bias in zip(weights, biases, strict=True):
        s = abs(weight)
        share = 0.5 * math.erfc(bias / s / math.sqrt(2))
        if share > 0.001:
            density = math.exp(-((bias / s) ** 2) / 2) / math.sqrt(2 * math.pi)
            found.append(bias - s * density / share)
        else:
            found.append(-3 * s)
    return found


def overhaul(student, teacher, weights, biases):
    """One stage of OFD, without the factor of the stage."""
    margin = margins(weights, biases)
    teacher = pooled(teacher, *shape(student)[2:])
    total = []
    for index in indices(student):
        s, t, m = at(student, index), at(teacher, index), margin[index[1]]
        if s > m and t <= m:
            total.append((s - m) ** 2)
        if s > t and m < t <= 0:
            total.append((s - t) ** 2)
        if t > 0:
            total.append((s - t) ** 2)
    return math.fsum(total) / len(student)


def hierarchical_context(student, teacher):
    """HCL of one stage."""
    terms, weight, weights = [mean_squared(student, teacher)], 1.0, [1.0]
    for level in (4, 2, 1):
        if level < shape(student)[2]:
            weight /= 2
            weights.append(weight)
            terms.append(mean_squared(pooled(student, level, level), pooled(teacher, level, level)))
    return sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)


# --- the layers --------------------------------------------------------------------------------


def convolved(maps, weight, bias=None, padding=0, stride=1):
    """Cross-correlation of weight [C_out][C_in][k][k]."""
    n, c, h, w = shape(maps)
    k = len(weight[0][0])

    def value(a, b, i, j):
        products = []
        for d in range(c):
            for y in range(k):
                for x in range(k):
                    row, column = i * stride + y - padding, j * stride + x - padding
                    if 0 <= row < h and 0 <= column < w:
                        products.append(weight[b][d][y][x] * maps[a][d][row][column])
        return math.fsum(products) + (bias[b] if bias else 0.0)

    out = [(side + 2 * padding - k) // stride + 1 for side in (h, w)]
    return build(n, len(weight), *out, value)


def transposed_convolved(maps, weight, bias, padding, stride=1):
    """The transposed convolution of weight [C_in][C_out][k][k]: every input value spreads."""
    n, c, h, w = shape(maps)
    k, channels = len(weight[0][0]), len(weight[0])
    height, width = ((side - 1) * stride - 2 * padding + k for side in (h, w))
    out = build(n, channels, height, width, lambda a, b, i, j: bias[b])
    for a, d, i, j in indices(maps):
        for b in range(channels):
            for y in range(k):
                for x in range(k):
                    row, column = i * stride + y - padding, j * stride + x - padding
                    if 0 <= row < height and 0 <= column < width:
                        out[a][b][row][column] += weight[d][b][y][x] * maps[a][d][i][j]
    return out


def batch_normalized(maps, weight, bias, eps=1e-5):
    """By the batch's own mean and (biased) variance."""
    n, c, h, w = shape(maps)
    scale, shift = [], []
    for b in range(c):
        values = [maps[a][b][i][j] for a in range(n) for i in range(h) for j in range(w)]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        scale.append(weight[b] / math.sqrt(variance + eps))
        shift.append(bias[b] - mean * scale[b])
    return build(n, c, h, w, lambda a, b, i, j: maps[a][b][i][j] * scale[b] + shift[b])


def leaky(maps, slope=0.1):
    def value(*index):
        v = at(maps, index)
        return v if v > 0 else slope * v

    return build(*shape(maps), value)


def encoder(maps, state, normalized):
    """FT's three 3x3 convolutions; layers 0, 3, 6, normalisations 1, 4, 7."""
    for layer in (0, 3, 6):
        maps = convolved(maps, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=1)
        if normalized:
            norm = layer + 1
            maps = batch_normalized(maps, state[f"{norm}.weight"], state[f"{norm}.bias"])
        maps = leaky(maps)
    return maps


def decoder(maps, state):
    for layer in (0, 3, 6):
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        maps = leaky(transposed_convolved(maps, weight, bias, padding=1))
    return maps


def nearest(maps, height, width):
    n, c, h, w = shape(maps)
    return build(
        n, c, height, width, lambda a, b, i, j: maps[a][b][i * h // height][j * w // width]
    )


def fused(maps, residual, state, size):
    """One ABF: the output and the residual."""
    x = convolved(maps, state["conv1.0.weight"])
    x = batch_normalized(x, state["conv1.1.weight"], state["conv1.1.bias"])
    if residual is not None:
        y = nearest(residual, *shape(x)[2:])
        joined = [a + b for a, b in zip(x, y, strict=True)]
        z = convolved(joined, state["attention.weight"], state["attention.bias"])

        def value(a, b, i, j):
            first, second = (1 / (1 + math.exp(-z[a][k][i][j])) for k in (0, 1))
            return x[a][b][i][j] * first + y[a][b][i][j] * second

        x_fused = build(*shape(x), value)
    else:
        x_fused = x
    x_fused = nearest(x_fused, *size)
    out = convolved(x_fused, state["conv2.0.weight"], padding=1)
    return batch_normalized(out, state["conv2.1.weight"], state["conv2.1.bias"]), x_fused


def review(student, teacher, states):
    """ReviewKD: maps of both networks, the first stage first, and the ABFs' parameters."""
    residual, total = None, 0.0
    for maps, target, state in reversed(list(zip(student, teacher, states, strict=True))):
        out, residual = fused(maps, residual, state, shape(target)[2:])
        total += hierarchical_context(out, target)
    return total
