"""What is tried on two images before training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.model import BaseModel
from mmengine.runner import Runner, ValLoop
from mmpretrain.evaluation import Accuracy
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import schedulers_of


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


def check_recorded(model: BaseModel, loader: DataLoader) -> None:
    """Check that no student's recorder is where a block with mmpretrain's ``with_cp`` runs without
    gradients: the distillation would train nothing before it.

    Raises:
        SettingError: If one is.
    """
    student = model.architecture
    if not any(getattr(module, "with_cp", False) for module in student.modules()):
        return
    modules, handles = dict(student.named_modules()), []
    calls: dict[str, list[tuple[bool, list[Tensor]]]] = {}
    for recorder in model.distiller.student_recorders.recorders.values():
        if recorder.source in modules:
            hook = partial(_note, calls.setdefault(recorder.source, []))
            handles.append(modules[recorder.source].register_forward_hook(hook))
    data = model.data_preprocessor(first_images(loader), True)
    try:
        with torch.enable_grad():
            student(**data, mode="loss")
    finally:
        for handle in handles:
            handle.remove()
    for source, noted in calls.items():
        # One that is changed in place may be what the whole block returns, which has a gradient.
        trains = [on or any(t.requires_grad for t in tensors) for on, tensors in noted]
        if trains and not any(trains):
            raise SettingError(
                "with_cp",
                "False in the student's blocks with a recorder inside, whose records would have "
                "no gradient",
                f"True around the recorder of {source!r}",
            )


def _note(
    calls: list[tuple[bool, list[Tensor]]], module: nn.Module, inputs: Any, output: Any
) -> None:
    """Note whether a call ran with gradients, and its tensors."""
    tensors = [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]
    calls.append((torch.is_grad_enabled(), tensors))


def check_metrics(runner: Runner, model: BaseModel) -> None:
    """Try validation, and check that it measures what checkpoints, schedules and the end of the
    training depend on.

    Validation loops and metrics that work otherwise than MMEngine's are not tried.

    Raises:
        SettingError: If the network cannot predict, a metric that is asked for is not measured or
            is no number, or the metrics do not fit the classes.
    """
    if type(runner.val_loop) is not ValLoop:
        return
    metrics = [m for m in runner.val_loop.evaluator.metrics if not isinstance(m, DumpResults)]
    if any(type(metric).evaluate is not BaseMetric.evaluate for metric in metrics):
        return
    loader = runner.val_loop.dataloader
    # Images of different sizes are validated one by one.
    data = first_images(loader, "val_dataloader", count=1 if loader.batch_size == 1 else 2)
    measured: dict[str, Any] = {}
    try:
        outputs = model.val_step(data)
    except Exception as error:  # of whatever network
        raise SettingError(
            "model.architecture" if hasattr(model, "distiller") else "model",
            "a network that can predict the classes of images",
            f"{type(error).__name__} on the first of the validation: {error}",
        ) from error
    try:
        evaluator = copy.deepcopy(runner.val_loop.evaluator)  # which keeps nothing of it
        evaluator.metrics = copy.deepcopy(metrics)
        evaluator.process(outputs, data)
        for metric in evaluator.metrics:  # by itself: its `evaluate` waits for other processes
            found = metric.compute_metrics(metric.results)
            front = f"{metric.prefix}/" if metric.prefix else ""
            measured |= {front + name: value for name, value in found.items()}
    except Exception as error:  # a metric of one's own may need more than two images
        if all(isinstance(metric, Accuracy) for metric in metrics):
            raise SettingError("val_evaluator", "metrics of these classes", error) from error
        runner.logger.warning(
            f"Validation was tried on two images and failed: {type(error).__name__}: {error}"
        )
        return
    for setting, name in _monitored(runner, measured):
        if not isinstance(measured.get(name), (int, float)):
            numbers = [key for key, value in measured.items() if isinstance(value, (int, float))]
            raise SettingError(
                setting, f"a number that validation measures: {', '.join(numbers)}", repr(name)
            )


def _monitored(runner: Runner, measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the runner reads from the metrics, each with the setting that names it."""
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook) and hook.strict:
            yield "EarlyStoppingHook.monitor", hook.monitor
        if not isinstance(hook, CheckpointHook) or hook.save_best is None:
            continue
        for name in hook.key_indicators:
            if name == "auto" and measured:
                name = next(iter(measured))  # as the hook chooses
                known = [key.lower() for key in (*hook.greater_keys, *hook.less_keys)]
                if hook.rules[0] is None and not any(key in name.lower() for key in known):
                    raise SettingError(
                        "default_hooks.checkpoint.rule",
                        f"'greater' or 'less' for {name!r}, which save_best='auto' takes",
                        None,
                    )
            yield "default_hooks.checkpoint.save_best", name
    for scheduler in schedulers_of(runner):
        if getattr(scheduler, "need_val_args", False):
            yield "param_scheduler.monitor", scheduler.monitor
