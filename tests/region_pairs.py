"""Regions of a student and a teacher, and settings of the contrastive terms, for their tests."""

from __future__ import annotations

import torch

COUNTS = (1, 4, 9)
SETTINGS = {
    "temperature": 0.5,
    "scale_weights": (1.0, 0.0, 2.5),
    "symmetric": True,
    "center": True,
    "region_weights": True,
    "excluded_labels": torch.tensor([0, 1, 0, 2, 0]),
}


def random_regions(seed, counts=COUNTS, size=5, width=6, dtype=torch.float64, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(size, count, width, generator=generator, dtype=torch.float64)
        .add(shift)
        .to(dtype)
        for count in counts
    )


def pair(dtype=torch.float64, **kwargs):
    """A student that resembles its teacher, so that neither the loss nor its gradient vanishes."""
    teacher = random_regions(1, dtype=dtype, **kwargs)
    noise = random_regions(2, dtype=dtype, **kwargs)
    return tuple(0.5 * t + n for t, n in zip(teacher, noise, strict=True)), teacher


def settings_of(names, counts=COUNTS, size=5):
    """The named settings, random region weights among them."""
    chosen = {name: SETTINGS[name] for name in names}
    if "region_weights" in chosen:
        generator = torch.Generator().manual_seed(9)
        chosen["region_weights"] = tuple(
            torch.rand(size, count, generator=generator, dtype=torch.float64) for count in counts
        )
    return chosen
