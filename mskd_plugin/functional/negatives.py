"""Drawing negatives from a memory of all training images, on the device, as a batch needs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mskd_plugin.errors import SettingError


def draw_negatives(row_labels: Tensor, labels: Tensor, count: int) -> Tensor:
    """Draw rows of other classes for each image of a batch, uniformly.

    Rows are drawn without replacement, or with it for an image that has fewer than ``count`` rows
    of other classes. Time and memory grow with N ``count``, not with N M: rows are drawn with
    replacement and repeated ones dropped until enough are left, which leaves each set of rows as
    likely as any other.

    Args:
        row_labels: Class of each row of the memory, (M,). Rows whose class is not known yet have a
            number that no image has, and are drawn too.
        labels: Class of each image, (N,).
        count: Rows to draw for each image.

    Returns:
        Rows, (N, ``count``).

    Raises:
        SettingError: If all rows are of an image's class.

    Example:
        >>> rows = draw_negatives(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 2]), count=2)
        >>> sorted(rows[0].tolist())
        [1, 3]
    """
    rows = row_labels.argsort(stable=True)  # those of a class stand together
    ordered = row_labels[rows]
    start = torch.searchsorted(ordered, labels.contiguous())
    own = torch.searchsorted(ordered, labels.contiguous(), right=True) - start  # rows of the class
    others = len(rows) - own
    if bool((others < 1).any()):
        raise SettingError(
            "labels", "of at least two classes among the images of the memory", "one class"
        )
    enough = others >= count
    if bool(enough.all()):
        picks = _distinct(others, count)
    else:
        picks = _uniform(others, count)
        picks[enough] = _distinct(others[enough], count)
    picks = picks + own[:, None] * (picks >= start[:, None])  # step over the image's own class
    return rows[picks]


def _uniform(bounds: Tensor, count: int) -> Tensor:
    """Draw whole numbers below each bound with replacement, (N,) to (N, count)."""
    # In float64, whose steps are far finer than one row in millions.
    draws = torch.rand(len(bounds), count, dtype=torch.float64, device=bounds.device)
    return (draws * bounds[:, None]).long().minimum(bounds[:, None] - 1)


def _distinct(bounds: Tensor, count: int) -> Tensor:
    """Draw different whole numbers below each bound, none below ``count``: (N,) to (N, count)."""
    if not len(bounds):
        return bounds.new_empty(0, count)
    smallest = int(bounds.min())
    # How many draws it takes in the mean until `count` of them differ, and some more.
    expected = smallest * math.log((smallest + 0.5) / (smallest - count + 0.5))
    draws = _uniform(bounds, math.ceil(1.05 * expected) + 16)
    while True:
        ordered, order = draws.sort(dim=1, stable=True)
        first = torch.ones_like(draws, dtype=torch.bool)
        first.scatter_(1, order[:, 1:], ordered[:, 1:] != ordered[:, :-1])
        found = first.cumsum(1)
        if bool((found[:, -1] >= count).all()):
            return draws[first & (found <= count)].view(len(draws), count)
        draws = torch.cat([draws, _uniform(bounds, draws.shape[1])], dim=1)
