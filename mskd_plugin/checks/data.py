"""The data: where they are, whether images and batches of them can be read, and their classes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.config_parts import inner_dataset
from mskd_plugin.datasets import BatchSample
from mskd_plugin.datasets.in_memory import numbered
from mskd_plugin.errors import SettingError
from mskd_plugin.unchanged import unchanged_random_state


def check_data_roots(cfg: Mapping[str, Any]) -> None:
    """Check that the folders of the data sets exist, before anything is built.

    Args:
        cfg: The whole config.

    Raises:
        SettingError: If a ``data_root`` is no folder and the data set does not download itself.
    """
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = inner_dataset((cfg.get(loader) or {}).get("dataset") or {}, "data_root")
        root = dataset.get("data_root")
        if root and not dataset.get("download") and "://" not in root and not Path(root).is_dir():
            raise SettingError(
                f"{loader}.dataset.data_root",
                "a folder with the images",
                f"{root!r}, which is not there",
                f"Put the data there, or set it by --cfg-options "
                f"{loader}.dataset.data_root=FOLDER.",
            )


def read_items(dataset: Any, setting: str = "train_dataloader", count: int = 2) -> Any:
    """Read the first images of a data set as torch's loader would, not collated.

    Args:
        dataset: The data set.
        setting: Place of its loader in the config.
        count: How many; one image is read again where the data set has no other. Of a stream, the
            first ones that it gives.

    Raises:
        SettingError: If there is no image, or one cannot be read.
    """
    stream = isinstance(dataset, IterableDataset)
    if not stream and not len(dataset):
        raise SettingError(f"{setting}.dataset", "at least one image", "an empty data set")
    # What torch's loader prefers where a data set has it.
    read = getattr(dataset, "__getitems__", None)
    items, place = [], "the first images"
    try:
        if stream:
            return list(itertools.islice(dataset, count))
        indices = [i % len(dataset) for i in range(count)]
        if read:
            return read(indices)
        for index in indices:
            place = _file_of(dataset, index)
            items.append(dataset[index])
    except SettingError:
        raise
    except Exception as error:  # of a decoder, or of whatever transform
        cause = (str(error).strip().splitlines() or ["no message"])[0]
        raise SettingError(
            f"{setting}.dataset",
            "images that its pipeline can read",
            f"{place}: {type(error).__name__}: {cause}",
        ) from error
    return items


def _file_of(dataset: Any, index: int) -> str:
    """Name an image by its file, or by its number where the data set does not tell."""
    try:
        return repr(str(dataset.get_data_info(index)["img_path"]))
    except (AttributeError, LookupError, TypeError):  # a data set of another kind
        return f"image {index}"


def first_images(
    loader: DataLoader, setting: str = "train_dataloader", count: int = 2
) -> dict[str, Any]:
    """Read the first images as the data loader would.

    Args:
        loader: The data loader.
        setting: Its place in the config.
        count: How many images.

    Raises:
        SettingError: If one cannot be read, or the loader cannot join them.
    """
    items = read_items(loader.dataset, setting, count)
    try:
        return loader.collate_fn(items)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise SettingError(
            f"{setting}.collate_fn",
            "a function that joins what the data set gives (for InMemoryImages 'collate_batch')",
            f"{type(error).__name__} on two images: {error}",
        ) from error


def check_images(runner: Runner, model: BaseModel) -> None:
    """Check that the training pipeline packs images as the data preprocessor takes them, and that
    labels which become scores of each image come with a data sample for each.
    """
    if not isinstance(model.data_preprocessor, ClsDataPreprocessor):
        return
    loader = runner.train_dataloader
    with unchanged_random_state():
        items = read_items(loader.dataset)
    first = items if isinstance(items, dict) else items[0]
    if not isinstance(first, dict) or "inputs" not in first:
        raise SettingError(
            "train_dataloader.dataset.pipeline",
            "transforms that end with PackInputs",
            f"{sorted(first) if isinstance(first, dict) else type(first).__name__} from them",
        )
    if not model.data_preprocessor.to_onehot:  # batch augments set it, too
        return
    with unchanged_random_state():
        samples = first_images(loader)["data_samples"]
    if isinstance(samples[0], BatchSample):
        raise SettingError(
            "train_dataloader.collate_fn",
            "one that keeps a data sample for each image, as batch augments and one-hot labels of "
            "the data preprocessor need it",
            "'collate_batch'",
        )


def check_classes(runner: Runner, model: BaseModel) -> None:
    """Check that the data of validation and test number the classes as the training data do.

    Raises:
        SettingError: If both state their classes and these differ, as those of image folders do
            where one split lacks a class.
    """
    training = runner.train_dataloader.dataset
    for stage in ("val", "test"):
        # A test loop that is still a config is not built here.
        loader = getattr(getattr(runner, f"_{stage}_loop"), "dataloader", None)
        if loader is not None:
            compare_classes(
                classes_of(training), loader.dataset, f"{stage}_dataloader.dataset", "training data"
            )


def classes_of(dataset: Any) -> Sequence[str] | None:
    """Return the names of a data set's classes, or None where it does not state them."""
    return (getattr(dataset, "metainfo", None) or {}).get("classes")


def trained_classes(checkpoint: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the classes that MMEngine noted in a checkpoint, or None where it states none."""
    found: Any = checkpoint
    for key in ("meta", "dataset_meta", "classes"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def compare_classes(
    expected: Sequence[str] | None, dataset: Any, setting: str, source: str
) -> None:
    """Check that a data set has the classes of the training, in the same order.

    Args:
        expected: The classes of the training; None where they are not known.
        dataset: A data set.
        setting: Place of ``dataset`` in the config.
        source: Where ``expected`` comes from, for errors.

    Raises:
        SettingError: If both are known and differ.
    """
    given = classes_of(dataset)
    if not expected or not given or list(expected) == list(given):
        return
    pairs = enumerate(itertools.zip_longest(expected, given))
    index, (known, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise SettingError(
        setting,
        f"data with the {len(expected)} classes of the {source}, number {index} of them {known!r}",
        f"{len(given)} classes, number {index} {found!r}",
        "Labels are numbers of classes: give classes=[...], the same list, to the data sets "
        "(CustomDataset else takes the names of the folders that are there), and to each split a "
        "folder for each, empty where it has no image.",
    )


def check_memories(runner: Runner, model: BaseModel) -> None:
    """Check that a loss with something of each training image, CRD, has as much as there are
    images: rows of images that never come would be noise, and would be drawn as negatives.

    A loss that does says so by an attribute ``num_images``.

    Raises:
        SettingError: If there are more or fewer images, or two data sets number theirs alike.
    """
    losses = getattr(getattr(model, "distiller", None), "distill_losses", None) or {}
    counts = {name: loss.num_images for name, loss in losses.items() if hasattr(loss, "num_images")}
    images = numbered(runner.train_dataloader.dataset) if counts else []
    for name, count in counts.items() if images else ():  # not of a stream, whose are not known
        if len(images) > 1:
            raise SettingError(
                "train_dataloader.dataset",
                f"one data set, whose images have numbers of their own, for {name}",
                f"a ConcatDataset of {len(images)}, each numbered from 0",
            )
        if count != images[0]:
            raise SettingError(
                f"model.distiller.distill_losses.{name}.num_images",
                f"{images[0]}, the number of training images",
                count,
                "A pair's config states it as num_train_images, beside the data set.",
            )


def tell_batch_augments(runner: Runner, model: BaseModel) -> None:
    """Warn that a distillation does not mix images as the student's own config says, in
    ``train_cfg`` mostly: the distillation's data preprocessor is the one that mixes.
    """
    own = getattr(getattr(model, "architecture", None), "data_preprocessor", None)
    mixing = getattr(own, "batch_augments", None)
    if mixing is not None and getattr(model.data_preprocessor, "batch_augments", None) is None:
        kinds = ", ".join(type(augment).__name__ for augment in mixing.augments)
        runner.logger.warning(
            f"The student's own batch augments ({kinds}) are not applied; those of the "
            "distillation are `data_preprocessor.batch_augments`, which is None."
        )
