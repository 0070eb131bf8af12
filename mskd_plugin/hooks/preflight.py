"""Checks before the first step: each failure is one clear error, none costs training time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from mmrazor.engine.hooks import StopDistillHook
from mmrazor.models.distillers import ConfigurableDistiller
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from mskd_plugin.datasets import BatchSample
from mskd_plugin.errors import SettingError
from mskd_plugin.hooks.data_checks import (
    check_classes,
    check_even_batches,
    check_memories,
    check_normalized,
    check_recipes,
    check_single_images,
    classes_of,
    tell_batch_augments,
)
from mskd_plugin.hooks.loss_warmup import check_warmup_hook
from mskd_plugin.hooks.random_state import unchanged_random_state
from mskd_plugin.hooks.trial import check_metrics, check_recorded, first_images, read_items
from mskd_plugin.losses import MultiScaleContrastiveLoss
from mskd_plugin.schedule import schedule_with_own_rate
from mskd_plugin.unwrapped import model_of, schedulers_of

#: Largest difference, relative to the largest logit, that rounding in bfloat16 explains.
CLASSIFIER_TOLERANCE = 0.05


@HOOKS.register_module()
class PreflightHook(Hook):
    """Run the checks before training.

    - the training data are there and can be read, their classes are as many as the heads' classes
      and those of the validation and test data;
    - the teacher's weights are loaded, and its normalisation and order of channels are those that
      the images get;
    - every recorder records, and every connector and loss takes what it is given, on two training
      images;
    - every distillation loss is finite on them;
    - a loss that categorizes regions sits at the stage that feeds the teacher's classifier;
    - a warm-up that the algorithm asks for has the hook that applies it, and what a
      ``SwitchRecipeHook`` will change is there;
    - validation, tried on two of its images, measures what checkpoints and schedules depend on,
      and no schedule ends before training does;
    - all processes begin at the same step, with gradients for all that they train, and no recorder
      is inside a module whose forward runs without gradients;
    - processes have as many batches each, and of one size where a loss gathers their images, and
      one that keeps something of each image has all of them;
    - images are mixed as the student's own config says, the learning rate is meant for the batch
      size, and no batch has one image, else there is a warning, or an error where the student
      cannot train on that.

    The images run without gradients but where blocks have ``with_cp``, in eval mode but for that
    last check; parameters, statistics and random states stay as they were.
    """

    priority = "HIGHEST"

    def before_train(self, runner: Runner) -> None:
        """Check data, teacher and losses.

        Raises:
            SettingError: With the setting, what was expected and what was found.
        """
        model = model_of(runner)
        check_same_start(runner)
        check_stop(runner, model)
        check_recomputed(runner, model)
        check_batch_size(runner)
        check_heads(runner.train_dataloader.dataset, model)
        check_classes(runner)
        check_images(runner.train_dataloader, model)
        check_warmup_hook(runner, model)
        check_recipes(runner, model)
        check_normalized(runner, model)
        check_even_batches(runner, model)
        check_memories(runner, model)
        tell_batch_augments(runner, model)
        teacher = getattr(model, "teacher", None)
        if teacher is not None:
            check_teacher(model, teacher)
        check_schedules(runner)
        check_best(runner)
        if runner.val_loop is not None:
            with _unchanged(model):
                check_metrics(runner, model)
        # Networks with an optimizer each, as in data-free distillation, have a step of their own.
        one_step = not isinstance(runner.optim_wrapper, OptimWrapperDict)
        if one_step and isinstance(getattr(model, "distiller", None), ConfigurableDistiller):
            with _unchanged(model), runner.optim_wrapper.optim_context(model):
                check_losses(model, runner.train_dataloader)
                check_recorded(model, runner.train_dataloader)
            tell_accumulation(runner)
        with _unchanged(model):  # after what names a student that cannot run at all
            check_single_images(runner, model)
        runner.logger.info("Preflight passed: data, teacher, recorders, connectors and losses.")


def check_same_start(runner: Runner) -> None:
    """Check that the processes resume from one checkpoint; each looks for it by itself."""
    starts = all_gather_object((runner.epoch, runner.iter))
    if len(set(starts)) > 1:
        raise SettingError(
            "--work-dir",
            "a folder that all nodes share, to resume from",
            f"processes that begin after these (epochs, steps): {starts}",
        )


def check_stop(runner: Runner, model: BaseModel) -> None:
    """Check that parameters of connectors and losses may be left without gradients where
    distillation stops before training does.
    """
    stops = any(isinstance(hook, StopDistillHook) for hook in runner.hooks)
    distiller = getattr(model, "distiller", None)
    trained = distiller is not None and any(p.requires_grad for p in distiller.parameters())
    # Other wrappers than DistributedDataParallel have no such attribute.
    if stops and trained and not getattr(runner.model, "find_unused_parameters", True):
        raise SettingError(
            "find_unused_parameters",
            "True for several processes with a StopDistillHook, after which the parameters of "
            "connectors and losses get no gradient",
            False,
        )


def check_recomputed(runner: Runner, model: BaseModel) -> None:
    """Check that no student's recorder is inside a module of ``activation_checkpointing``, which
    runs without gradients: the distillation would train nothing before it.
    """
    names = runner.cfg.get("activation_checkpointing") or []
    distiller = getattr(model, "distiller", None)
    if not isinstance(distiller, ConfigurableDistiller):
        return
    for recorder in distiller.student_recorders.recorders.values():
        for name in [names] if isinstance(names, str) else names:
            if f"architecture.{recorder.source}".startswith(f"{name}."):
                raise SettingError(
                    "activation_checkpointing",
                    "modules without a recorder inside, whose records would have no gradient",
                    f"{name!r}, with a recorder of {recorder.source!r}",
                )


def check_batch_size(runner: Runner) -> None:
    """Warn where the config's learning rate is meant for another batch size."""
    auto_scale_lr = runner.cfg.get("auto_scale_lr") or {}
    base = auto_scale_lr.get("base_batch_size")
    size = runner.train_dataloader.batch_size  # None with a batch sampler
    if base is None or size is None or auto_scale_lr.get("enable", False):
        return
    accumulated = (runner.cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    total = runner.world_size * size * accumulated
    if total != base:
        scales = "" if schedule_with_own_rate(runner.cfg) else ": --auto-scale-lr scales it"
        runner.logger.warning(
            f"A step takes {total} images ({size} x {runner.world_size} processes x {accumulated} "
            f"accumulated), but the learning rate is meant for auto_scale_lr.base_batch_size="
            f"{base}{scales}."
        )


def tell_accumulation(runner: Runner) -> None:
    """Warn that losses between images do not reach over the batches of an accumulated step."""
    size = runner.train_dataloader.batch_size
    accumulated = (runner.cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if accumulated > 1:
        runner.logger.warning(
            f"optim_wrapper.accumulative_counts={accumulated}: losses between the images of a "
            f"batch, contrastive ones among them, see {size} images at a time, not {accumulated} x "
            f"{size}."
        )


def check_best(runner: Runner) -> None:
    """Check that there is a validation where it chooses the best checkpoint."""
    for hook in runner.hooks:
        best = hook.save_best if isinstance(hook, CheckpointHook) else None
        if best is not None and runner.val_loop is None:
            raise SettingError(
                "default_hooks.checkpoint.save_best", "None without validation", repr(best)
            )


def check_schedules(runner: Runner) -> None:
    """Check that no schedule of a fixed number of steps ends, with an error, before training does.

    One that was resumed ends by itself where it would have.
    """
    for scheduler in schedulers_of(runner):
        total = getattr(scheduler, "total_steps", None)
        end = runner.max_epochs if scheduler.by_epoch else runner.max_iters
        steps = min(end, scheduler.end) - scheduler.begin
        if total is not None and steps > total:
            raise SettingError(
                "param_scheduler.total_steps",
                f"at least the {steps} {'epochs' if scheduler.by_epoch else 'iterations'} of this "
                "training",
                f"{total} of {type(scheduler).__name__}",
                "It is set together with train_cfg.max_epochs.",
            )


def check_heads(dataset: BaseDataset, model: BaseModel) -> None:
    """Check that every head has the classes of the data."""
    classes = classes_of(dataset)
    for name in ("student", "teacher"):
        network = getattr(model, name, model)
        count = getattr(getattr(network, "head", None), "num_classes", None)
        if classes and count is not None and count != len(classes):
            raise SettingError(
                f"{name}.head.num_classes",
                f"{len(classes)}, the number of classes of {type(dataset).__name__}",
                count,
            )


def check_images(loader: DataLoader, model: BaseModel) -> None:
    """Check that the training pipeline packs images as the data preprocessor takes them, and that
    labels which become scores of each image come with a data sample for each.
    """
    if not isinstance(model.data_preprocessor, ClsDataPreprocessor):
        return
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


def check_teacher_weights(model: BaseModel) -> None:
    """Check that the teacher, if there is one, has weights of its own."""
    trainable = getattr(model, "teacher_trainable", False)
    if getattr(model, "teacher_source", "unknown") is None and not trainable:
        raise SettingError(
            "teacher_ckpt",
            "the teacher's weights (--teacher FILE, a URL or torchvision://NAME)",
            None,
        )


def check_teacher(model: BaseModel, teacher: nn.Module) -> None:
    """Check that the teacher has weights of its own and gets the images as it knows them."""
    check_teacher_weights(model)
    own = getattr(teacher, "data_preprocessor", None)
    shared = model.data_preprocessor
    for name in ("mean", "std"):
        mine, given = getattr(own, name, None), getattr(shared, name, None)
        if mine is not None and given is not None and not torch.equal(mine.cpu(), given.cpu()):
            raise SettingError(
                "data_preprocessor",
                f"the teacher's own {name} {mine.flatten().tolist()}, since both networks see the "
                f"same images",
                given.flatten().tolist(),
            )


def check_losses(model: BaseModel, loader: DataLoader) -> None:
    """Send two training images through recorders, connectors and losses."""
    data = model.data_preprocessor(first_images(loader), True)
    handles = _watch_categorization(model)
    try:
        losses = model(**data, mode="loss")
    except SettingError:
        raise
    except (
        AssertionError,
        AttributeError,  # of images without labels, or of a loss that is given no tensor
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,  # of a loss that unpacks another shape
    ) as error:
        got = f"{type(error).__name__} on two training images: {str(error) or 'no message'}"
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_locals.get("self") is model.architecture:
                expected = "a student whose own loss takes these images and labels"
                raise SettingError("model.architecture", expected, got) from error
        expected = "recorders, connectors and losses that fit together"
        raise SettingError("model.distiller", expected, got) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, value in losses.items():
        if not torch.isfinite(torch.as_tensor(value)).all():
            raise SettingError(name, "a finite loss on two training images", f"{value}")


def _watch_categorization(model: BaseModel) -> list[RemovableHandle]:
    """Compare, in the coming forward, the classifier's answer on the global region with the
    teacher's logits.
    """
    outputs: list[object] = []

    def check(loss: nn.Module, _: tuple, kwargs: dict) -> None:
        logits = outputs[-1] if outputs else None
        feature = next((r for r in kwargs["teacher_regions"] if r.shape[1] == 1), None)
        weight, bias = kwargs.get("classifier_weight"), kwargs.get("classifier_bias")
        if not isinstance(logits, torch.Tensor) or feature is None or weight is None:
            return
        if weight.shape[1] != feature.shape[-1]:
            return  # the loss itself says so
        answer = nn.functional.linear(feature[:, 0].to(weight.dtype), weight, bias)
        gap = (answer - logits).abs().max().item()
        if gap > CLASSIFIER_TOLERANCE * logits.abs().max().item():
            raise SettingError(
                "teacher_regions",
                "regions of the stage that feeds the teacher's classifier, to be categorized",
                f"a stage on whose global feature the classifier is {gap:.3g} off the teacher's "
                f"logits",
            )

    handles = [
        loss.register_forward_pre_hook(check, with_kwargs=True)
        for loss in model.distiller.distill_losses.values()
        if isinstance(loss, MultiScaleContrastiveLoss) and loss.categorizes
    ]
    if handles:
        handles.append(model.teacher.register_forward_hook(lambda *io: outputs.append(io[-1])))
    return handles


@contextmanager
def _unchanged(model: BaseModel) -> Iterator[None]:
    """Run without gradients in eval mode, so that no parameter or running statistic moves."""
    was_training = model.training
    model.eval()
    try:
        with unchanged_random_state(), torch.no_grad():
            yield
    finally:
        model.train(was_training)
