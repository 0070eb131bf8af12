"""One data sample for the labels of a whole batch.

A sample an image costs a copy to the device for each label and some ten microseconds on the host.
Training needs no more than the labels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from mmengine.registry import FUNCTIONS
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import default_collate

from mskd_plugin.errors import SettingError


class BatchSample(DataSample):
    """The labels of a batch of images in one data sample, for training alone.

    Mmpretrain's heads join the labels of all data samples, so a list of this one gives them the
    labels of the batch. What needs one sample an image, scores and predictions, is refused.

    Attributes:
        gt_label: Classes, (N,) int64.
        sample_idx: Numbers of the images in their data set, (N,) int64 on the CPU, where the data
            set gives them.
    """

    @classmethod
    def of(cls, labels: Tensor, sample_idx: Tensor | None = None) -> BatchSample:
        """Return the data sample of a batch.

        Args:
            labels: (N,) int64.
            sample_idx: (N,) int64.
        """
        sample = cls()
        sample.set_field(labels, "gt_label")
        if sample_idx is not None:
            sample.set_field(sample_idx, "sample_idx", field_type="metainfo")
        return sample

    def pin_memory(self) -> BatchSample:
        """Pin the labels, as a data loader with ``pin_memory`` asks for."""
        return self.set_gt_label(self.gt_label.pin_memory())

    def _refuse(self, value: object = None) -> NoReturn:
        raise SettingError(
            "collate_fn",
            "one that keeps a data sample for each image, which predictions, one-hot labels and "
            "batch augments need ('default_collate', or InMemoryImages with batch_labels=False)",
            "one data sample for the whole batch",
        )

    set_gt_score = set_pred_label = set_pred_score = set_mask = _refuse


@FUNCTIONS.register_module()
def collate_batch(items: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Join the items of a batch, with all labels in one data sample; for training.

    Args:
        items: Items of a data set, each with ``inputs`` (C, H, W) and ``data_samples``; or a ready
            batch, as :class:`~mskd_plugin.datasets.in_memory.InMemoryImages` gives it, which stays
            as it is.

    Returns:
        ``inputs`` (N, C, H, W) and ``data_samples``, a list of one :class:`BatchSample`.

    Raises:
        SettingError: If a data sample has anything but one class for training: scores for one.

    Example:
        >>> items = [
        ...     {"inputs": torch.zeros(3, 2, 2), "data_samples": DataSample().set_gt_label(i)}
        ...     for i in (4, 7)
        ... ]
        >>> collate_batch(items)["data_samples"][0].gt_label
        tensor([4, 7])
    """
    if isinstance(items, dict):
        return items
    samples = [item["data_samples"] for item in items]
    for sample in samples:
        check_one_class(sample)
    labels = torch.cat([sample.gt_label for sample in samples])
    numbers = None
    if all("sample_idx" in sample for sample in samples):
        numbers = torch.tensor([sample.sample_idx for sample in samples])
    inputs = default_collate([item["inputs"] for item in items])
    return {"inputs": inputs, "data_samples": [BatchSample.of(labels, numbers)]}


def check_one_class(sample: Any) -> None:
    """Check that a data sample holds one class and nothing else to train on.

    Raises:
        SettingError: If it does not.
    """
    keys = sample.keys() if isinstance(sample, DataSample) else [type(sample).__name__]
    if list(keys) != ["gt_label"] or sample.gt_label.shape != (1,):
        raise SettingError(
            "the data samples of training images",
            "one class each (gt_label), to be joined for the batch",
            sorted(keys) if list(keys) != ["gt_label"] else f"{sample.gt_label.tolist()}",
        )
