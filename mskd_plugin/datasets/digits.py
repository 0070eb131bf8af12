"""Scikit-learn's handwritten digits: real images that come with a dependency, without a
download.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from mskd_plugin.errors import SettingError

#: The first images train, the others test.
SPLITS = {"train": slice(0, 1198), "test": slice(1198, 1797)}
SIDE = 32


def resize_bilinear(images: np.ndarray, side: int) -> np.ndarray:
    """Resize square images bilinearly, pixels taken as areas and the border repeated.

    Args:
        images: (N, H, H), H of at most ``side``.
        side: Side of the result in pixels.

    Returns:
        (N, side, side) in float64, the same on every machine to rounding.
    """
    size = images.shape[-1]
    # Where the centres of the new pixels lie, counted in centres of the old ones.
    centres = ((np.arange(side) + 0.5) * size / side - 0.5).clip(0, size - 1)
    weights = (1 - abs(centres[:, None] - np.arange(size))).clip(0)  # (side, H)
    return weights @ images.astype(np.float64) @ weights.T


@DATASETS.register_module()
class Digits(BaseDataset):
    """The 1,797 handwritten digits of scikit-learn's ``load_digits`` as RGB images of 32 x 32, held
    in memory.

    The 8 x 8 originals with values 0 to 16 are resized bilinearly and scaled to 0 to 255. The first
    1,198 images train, the last 599 test. No field names the writers, but the file runs writer by
    writer: a split by its order, not at random, keeps the writers of the test images out of the
    training images, all but the one at the border.

    Args:
        split: ``"train"`` or ``"test"``.
        metainfo: Entries that replace those of ``METAINFO``, ``classes`` for one.
        **kwargs: Other arguments of mmpretrain's ``BaseDataset``: ``pipeline``, ``indices``,
            ``test_mode`` and so on.

    Shapes:
        Each item enters the pipeline with ``img`` (32, 32, 3) uint8, ``gt_label``, ``img_shape``
        and ``ori_shape``.

    Raises:
        SettingError: If ``split`` is neither, or scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository (1998), its test part, as shipped with scikit-learn.
    """

    METAINFO = {"classes": tuple("0123456789")}

    def __init__(self, split: str = "train", metainfo: dict | None = None, **kwargs: Any) -> None:
        if split not in SPLITS:
            raise SettingError("split", "'train' or 'test'", repr(split))
        self.split = split
        super().__init__(ann_file="", metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the images of the split."""
        try:
            # Here, not above: nobody else needs scikit-learn.
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SettingError(
                "dataset.type",
                "a data set whose packages are installed",
                f"'Digits' without scikit-learn ({error})",
                "`pip install scikit-learn` installs it.",
            ) from error
        digits = load_digits()
        part = SPLITS[self.split]
        grey = np.rint(resize_bilinear(digits.images[part], SIDE) * (255 / 16)).astype(np.uint8)
        images = grey[..., None].repeat(3, axis=-1)
        return [
            {
                "img": image,
                "gt_label": int(label),
                "img_shape": (SIDE, SIDE),
                "ori_shape": (SIDE, SIDE),
            }
            for image, label in zip(images, digits.target[part], strict=True)
        ]

    def extra_repr(self) -> list[str]:
        """Add the split to the data set's text form."""
        return [f"Split: \t{self.split}"]
