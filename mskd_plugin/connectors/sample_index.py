"""From recorded data samples to the indices of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.errors import SettingError


@MODELS.register_module()
class SampleIndex(BaseModule):
    """Read which training images a batch holds, for losses that keep something of each image.

    MMEngine's ``BaseDataset`` numbers its images from 0 as ``sample_idx``, and ``PackInputs`` keeps
    the number among its default ``meta_keys``. A recorder of the student's own inputs gets to the
    data samples::

        student_recorders=dict(data_samples=dict(type="ModuleInputs", source=""))
        connectors=dict(sample_idx=dict(type="SampleIndex"))
        ...=dict(recorder="data_samples", from_student=True, data_idx=1, connector="sample_idx")

    One data sample for a whole batch, as ``collate_batch`` and ``InMemoryImages`` give it, holds
    the indices of all its images. Under ``ConcatDataset`` the numbers begin anew with each part, so
    that images share one.

    Shapes:
        A list of data samples of N images in; an int64 tensor (N,) on the CPU out.

    Raises:
        SettingError: If a data sample has no ``sample_idx``.

    Example:
        >>> from mmpretrain.structures import DataSample
        >>> SampleIndex()([DataSample(metainfo={"sample_idx": i}) for i in (7, 3)])
        tensor([7, 3])
    """

    def forward(self, data_samples: Sequence[Any]) -> Tensor:
        """Return the indices."""
        for sample in data_samples:
            if "sample_idx" not in sample:
                raise SettingError(
                    "PackInputs.meta_keys",
                    "names with 'sample_idx' among them, which this method reads",
                    f"data samples with {sorted(sample.all_keys())} alone",
                )
        if len(data_samples) == 1:
            return torch.as_tensor(data_samples[0].sample_idx).reshape(-1)
        return torch.tensor([int(sample.sample_idx) for sample in data_samples])
