"""Mmpretrain's normalisation without waiting for the device and with less memory to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from torch import Tensor

from mskd_plugin.datasets.batch import BatchSample
from mskd_plugin.errors import SettingError, check_flag


@MODELS.register_module()
class BatchDataPreprocessor(ClsDataPreprocessor):
    """Mmpretrain's ``ClsDataPreprocessor`` for batches that come as one tensor.

    It normalises in one pass in place, ``x / std - mean / std``, where the base class writes three
    arrays of float32; the results agree to float32 rounding. Pinned images, and labels of a
    :class:`~mskd_plugin.datasets.batch.BatchSample`, are copied without waiting for the device.

    Args:
        mean: Mean of each channel, in units of 0 to 255. Default: no normalisation.
        std: Deviation of each channel.
        to_rgb: Reverse the three channels.
        **kwargs: Other arguments of ``ClsDataPreprocessor``.

    Shapes:
        ``inputs`` (N, C, H, W), or N images (C, H, W) of one size, become (N, C, H, W) float32;
        grey images get as many channels as there are means.

    Raises:
        SettingError: If mean or std is given alone.

    Example:
        >>> images = torch.full((2, 3, 4, 4), 5, dtype=torch.uint8)
        >>> preprocessor = BatchDataPreprocessor(mean=[1.0, 1.0, 1.0], std=[2.0, 2.0, 2.0])
        >>> preprocessor({"inputs": images})["inputs"].unique()
        tensor([2.])
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        to_rgb: bool = False,
        **kwargs: Any,
    ) -> None:
        if (mean is None) != (std is None):
            raise SettingError("mean, std", "given both or neither", f"{mean} and {std}")
        # The base class would do both once more.
        super().__init__(mean=None, std=None, to_rgb=False, **kwargs)
        self._non_blocking = True
        self._reverses_channels = check_flag("to_rgb", to_rgb)
        self.mean: Tensor | None
        self.std: Tensor
        for name, values in (("mean", mean), ("std", std)):
            value = None if values is None else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self._affine: tuple[Tensor, Tensor] | None = None

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Return normalised images, and data samples whose labels are on the device.

        Args:
            data: ``inputs``, and ``data_samples`` if there are labels.
            training: Whether to apply batch augments.
        """
        inputs = data["inputs"]
        if isinstance(inputs, Tensor):
            inputs = inputs.to(self.device, non_blocking=True)
        else:
            inputs = torch.stack(list(self.cast_data(inputs)))
        if self._reverses_channels and inputs.shape[1] == 3:
            inputs = inputs.flip(1)
        if self.mean is not None and inputs.shape[1] == 1:  # grey, for networks of colour
            inputs = inputs.expand(-1, len(self.mean), -1, -1)
        # The caller's images stay as they are, floating point ones too.
        inputs = inputs.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.mean is not None:
            shift, scale = self._shift_and_scale(inputs)
            torch.addcmul(shift, inputs, scale, out=inputs)
        samples = data.get("data_samples")
        if samples and isinstance(samples[0], BatchSample):
            for sample in samples:
                sample.set_field(sample.gt_label.to(self.device, non_blocking=True), "gt_label")
            if self.pad_size_divisor == 1 and not self.to_onehot:
                return {"inputs": inputs, "data_samples": samples}  # nothing is left to do
        return super().forward({"inputs": inputs, "data_samples": samples}, training)

    def _shift_and_scale(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what normalises an image, each (C, H, W): of full size, since a CPU is several
        times slower where it has to repeat a number for each channel.
        """
        known = self._affine
        if known is None or known[0].shape != inputs.shape[1:] or known[0].device != inputs.device:
            assert self.mean is not None
            std = self.std.to(inputs.device, torch.float64)
            parts = (-self.mean.to(inputs.device, torch.float64) / std, 1 / std)
            shift, scale = (part.float().expand(inputs.shape[1:]).contiguous() for part in parts)
            known = self._affine = (shift, scale)
        return known
