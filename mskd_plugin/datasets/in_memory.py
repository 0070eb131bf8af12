"""Small images held in memory, cropped and flipped a whole batch at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmpretrain.registry import DATASETS
from torch import Tensor
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from mskd_plugin.datasets.batch import BatchSample, check_one_class
from mskd_plugin.errors import SettingError, check_count, check_flag

#: Images read twice to see whether they come out the same.
COMPARED = 32


@DATASETS.register_module()
class InMemoryImages(Dataset):
    """The images of another data set as one array on the training device, read by the batch, with
    ``RandomCrop`` and ``RandomFlip`` of mmpretrain on the way.

    Images are held padded with zeros, and mirrored ones beside them, so that a random crop and flip
    is one copy out of the array: it begins at a random pixel. Each window of an image is as likely
    as any other, whatever the other images of the batch get. Numbers come from torch's default
    generator of the device; ``EpochSeedHook`` makes them depend on seed, epoch and rank, and
    without it all processes draw the same. The host does not wait for the device.

    The other data set's pipeline runs once for each image, at the start, so nothing in it may be
    random. Length, order, ``metainfo`` and ``sample_idx`` are the other data set's. The data loader
    needs ``collate_fn=dict(type="collate_batch")``, which takes a batch as it is, and no workers;
    ``BatchDataPreprocessor`` normalises the batch in place.

    Args:
        dataset: Config of a data set of mmpretrain whose pipeline ends with ``PackInputs``, or the
            data set itself.
        crop_size: Side, or (height, width), of the crops. Default: the images' own size.
        padding: Pixels of zeros on each side before the crop.
        flip_prob: Probability of mirroring an image left to right.
        batch_labels: Give one :class:`~mskd_plugin.datasets.batch.BatchSample` for a batch, for
            training. False gives a copy of the other data set's data sample for each image, as
            validation and tests need them.
        device: Where the array is: N C (H + 2 ``padding``) (W + 2 ``padding``) bytes, twice that
            with flips, 480 MB for CIFAR's training images. Default: the training device.

    Attributes:
        labels: Classes, (N,) int64 on the device.
        sample_idx: Numbers of the images, (N,) int64 on the CPU; None where the other data set does
            not number them.
        numbered: What :func:`numbered` returns of the other data set.

    Raises:
        SettingError: If the pipeline is random, the images are not uint8 of one size, an image has
            not one class, or a setting is out of its range.

    Example:
        >>> digits = dict(type="Digits", pipeline=[dict(type="PackInputs")])
        >>> images = InMemoryImages(digits, padding=4, flip_prob=0.5, device="cpu")
        >>> batch = images.__getitems__([0, 1, 2])
        >>> batch["inputs"].shape, batch["data_samples"][0].gt_label
        (torch.Size([3, 3, 32, 32]), tensor([0, 1, 2]))
    """

    def __init__(
        self,
        dataset: Any,
        crop_size: int | Sequence[int] | None = None,
        padding: int = 0,
        flip_prob: float = 0.0,
        batch_labels: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        check_count("padding", padding, least=0)
        if not 0 <= flip_prob <= 1:
            raise SettingError("flip_prob", "from 0 to 1", flip_prob)
        source = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.metainfo = source.metainfo
        self.flip_prob = flip_prob
        self.batch_labels = check_flag("batch_labels", batch_labels)
        self.device = torch.device(get_device() if device is None else device)
        self.numbered = numbered(source)
        images, self.samples = read_once(source)
        self.sample_idx: Tensor | None = None
        if all("sample_idx" in sample for sample in self.samples):
            self.sample_idx = torch.tensor([sample.sample_idx for sample in self.samples])
        labels = torch.tensor([int(sample.gt_label) for sample in self.samples], dtype=torch.int64)
        self.labels = labels.to(self.device)

        padded = functional.pad(images.to(self.device), (padding,) * 4)
        self.crop_size = _crop_size(crop_size, tuple(images.shape[-2:]), tuple(padded.shape[-2:]))
        parts = [padded, padded.flip(-1)] if flip_prob else [padded]
        # Row by row, with the channels of a row side by side: the rows of a crop are one piece.
        rows = torch.cat(parts).transpose(1, 2).flatten(1)
        self._shape = padded.shape[2], padded.shape[1], padded.shape[3]
        # The last crops reach over the end of the last image.
        pixels = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).flatten()
        # From each pixel what follows it in memory, for the rows of a crop; a view.
        self._reaches = pixels.unfold(0, self.crop_size[0] * self._shape[1] * self._shape[2], 1)

    def __len__(self) -> int:  # noqa: D105
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image and its data sample, by itself."""
        batch = self.__getitems__([index])
        return {"inputs": batch["inputs"][0], "data_samples": batch["data_samples"][0]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a batch; torch's data loader calls this where a data set has it.

        Args:
            indices: n numbers.

        Returns:
            ``inputs`` (n, C, height, width) uint8 and ``data_samples``.
        """
        on_host = torch.from_numpy(np.array(indices, np.int64))  # faster than torch.tensor
        rows = on_host.to(self.device, non_blocking=True)
        top, left = (
            torch.randint(side - crop + 1, rows.shape, device=self.device) if side > crop else None
            for side, crop in zip(self._shape[::2], self.crop_size)
        )
        flip = None
        if self.flip_prob:
            flip = torch.empty_like(rows, dtype=torch.bool).bernoulli_(self.flip_prob)
        samples: list[Any]
        if self.batch_labels:
            numbers = None if self.sample_idx is None else self.sample_idx.index_select(0, on_host)
            samples = [BatchSample.of(self.labels.index_select(0, rows), numbers)]
        else:
            samples = [_copy(self.samples[index]) for index in indices]
        return {"inputs": self.windows(rows, top, left, flip), "data_samples": samples}

    def windows(
        self,
        rows: Tensor,
        top: Tensor | None = None,
        left: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Cut one window out of each image, mirrored or not.

        Args:
            rows: Images, (n,) int64 on the device, as are the others.
            top: First row of each window, (n,), counted in the padded image. Default: 0.
            left: First column of each window, counted after the mirroring. Default: 0.
            flip: Whether to mirror each image, (n,) bool. Default: no.

        Returns:
            (n, C, height, width) uint8, not contiguous.
        """
        height, channels, width = self._shape
        size = height * channels * width
        start = rows * size
        if flip is not None:
            start = start.add_(flip, alpha=len(self) * size)
        if top is not None:
            start = start.add_(top, alpha=channels * width)
        if left is not None:
            start = start.add_(left)
        reaches = self._reaches.index_select(0, start).view(-1, self.crop_size[0], channels, width)
        return reaches[..., : self.crop_size[1]].transpose(1, 2)


def _copy(sample: Any) -> Any:
    """Copy a data sample, without the deep copies of its own ``clone``: values are replaced in it,
    never changed.
    """
    copy = type(sample)()
    for name, value in sample.metainfo_items():
        copy.set_field(value, name, field_type="metainfo")
    for name, value in sample.items():
        copy.set_field(value, name)
    return copy


def read_once(source: Any) -> tuple[Tensor, list[Any]]:
    """Read all images and data samples of a data set.

    Args:
        source: The data set.

    Returns:
        Images (N, C, H, W) uint8, and N data samples.

    Raises:
        SettingError: As :class:`InMemoryImages`.
    """
    for transform in _transforms(source):
        # What mmcv's decorator `cache_randomness` leaves on a class.
        if getattr(transform, "_methods_with_randomness", None):
            raise _random(type(transform).__name__)
    images, samples = torch.empty(0, 0, 0, 0, dtype=torch.uint8), []
    for index in range(len(source)):
        item = source[index]
        if not isinstance(item, dict) or not {"inputs", "data_samples"} <= item.keys():
            raise SettingError(
                "dataset.pipeline", "transforms that end with PackInputs", type(item).__name__
            )
        image = item["inputs"]
        if index == 0:
            images = torch.empty(len(source), *image.shape, dtype=torch.uint8)
        if image.dtype != torch.uint8 or image.shape != images.shape[1:]:
            raise SettingError(
                "dataset",
                f"uint8 images of one size, {tuple(images.shape[1:])} as the first",
                f"{image.dtype} of {tuple(image.shape)} at {index}",
                "A Resize in its pipeline makes sizes equal.",
            )
        if index < COMPARED and not image.equal(source[index]["inputs"]):
            raise _random(f"two readings of image {index} that differ")
        check_one_class(item["data_samples"])
        images[index] = image
        samples.append(item["data_samples"])
    return images, samples


def _random(found: str) -> SettingError:
    return SettingError(
        "dataset.pipeline",
        "transforms that are not random, since they run once (crop_size, padding and flip_prob of "
        "InMemoryImages crop and flip)",
        found,
    )


def _transforms(part: Any) -> Iterator[Any]:
    """Yield the transforms of a data set, of one inside wrappers too."""
    for inner in (getattr(part, "dataset", None), *getattr(part, "datasets", ())):
        if inner is not None:
            yield from _transforms(inner)
    yield from getattr(getattr(part, "pipeline", None), "transforms", ())


def numbered(dataset: Any) -> list[int]:
    """Return how many images have numbers of their own in a data set, ``sample_idx``.

    Args:
        dataset: The data set. One that wraps another gives its images the other's numbers.

    Returns:
        One count for each of joined data sets, whose images are each numbered from 0; none of a
        stream.
    """
    if isinstance(dataset, InMemoryImages):
        return dataset.numbered
    if isinstance(dataset, IterableDataset):
        return []
    if isinstance(dataset, ConcatDataset):
        return [count for part in dataset.datasets for count in numbered(part)]
    inner = getattr(dataset, "dataset", None)  # MMEngine's wrappers are no `Dataset` of torch
    is_wrapper = hasattr(inner, "__getitem__") and not isinstance(inner, (str, Mapping))
    return numbered(inner) if is_wrapper else [len(dataset)]


def _crop_size(
    wanted: int | Sequence[int] | None, own: tuple[int, ...], padded: tuple[int, ...]
) -> tuple[int, int]:
    """Return the crops' (height, width)."""
    wanted = own if wanted is None else wanted
    size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    if len(size) != 2 or not all(0 < side <= limit for side, limit in zip(size, padded)):
        raise SettingError("crop_size", f"at most the padded image, {padded}", wanted)
    return size[0], size[1]
