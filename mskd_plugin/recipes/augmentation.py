"""The augmentation of images that vision transformers and MLPs are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def mixed_batches() -> dict[str, Any]:
    """Return the ``batch_augments`` of a data preprocessor: mixup or cutmix, one of both at random.

    Source: OFA-KD's configs (Hao840/OFAKD).
    """
    return {"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}]}


def strong_augmentation(
    mean: Sequence[float], std: Sequence[float], interpolation: str
) -> list[dict[str, Any]]:
    """Return the steps of a training pipeline, from the image to the packed inputs.

    A crop of 224 x 224, a flip, RandAugment (two operations of magnitude 9, deviation 0.5) and
    random erasing (probability 0.25). Of the recipe's settings, colour jitter is left out: it has
    no effect beside RandAugment.

    Args:
        mean: Of the channels in the order of the images, from 0 to 255: fills what an operation
            leaves empty, and what is erased.
        std: Likewise; the erased part is noise of this deviation.
        interpolation: Of the crop and of RandAugment, ``"bilinear"`` or ``"bicubic"``.

    Example:
        >>> [step["type"] for step in strong_augmentation([127.5] * 3, [64.0] * 3, "bicubic")]
        ['RandomResizedCrop', 'RandomFlip', 'RandAugment', 'RandomErasing', 'PackInputs']

    Source: OFA-KD's configs (Hao840/OFAKD), in terms of mmpretrain's transforms.
    """
    return [
        {
            "type": "RandomResizedCrop",
            "scale": 224,
            "backend": "pillow",
            "interpolation": interpolation,
        },
        {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
        {
            "type": "RandAugment",
            "policies": "timm_increasing",
            "num_policies": 2,
            "total_level": 10,
            "magnitude_level": 9,
            "magnitude_std": 0.5,
            "hparams": {"pad_val": [round(m) for m in mean], "interpolation": interpolation},
        },
        {
            "type": "RandomErasing",
            "erase_prob": 0.25,
            "mode": "rand",
            "min_area_ratio": 0.02,
            "max_area_ratio": 1 / 3,
            "fill_color": list(mean),
            "fill_std": list(std),
        },
        {"type": "PackInputs"},
    ]
