"""Several processes: they begin at one step, take as many, and reduce the same gradients."""

from __future__ import annotations

from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import ZeroRedundancyOptimizer
from mmengine.runner import Runner
from mmrazor.engine.hooks import StopDistillHook
from torch.utils.data import DataLoader, IterableDataset

from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import optim_wrappers_of


def check_same_start(runner: Runner, model: BaseModel) -> None:
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


def check_saved_optimizer(runner: Runner, model: BaseModel) -> None:
    """Check that the main process alone can save the optimizer, as MMEngine has it do.

    A ``ZeroRedundancyOptimizer`` is spread over the processes, and would wait for the others.
    """
    sharded = any(
        isinstance(wrapper.optimizer, ZeroRedundancyOptimizer)
        for wrapper in optim_wrappers_of(runner)
    )
    saved = any(isinstance(hook, CheckpointHook) and hook.save_optimizer for hook in runner.hooks)
    if runner.world_size > 1 and sharded and saved:
        raise SettingError(
            "optim_wrapper.optimizer.type",
            "an optimizer that one process can save",
            "'ZeroRedundancyOptimizer', whose state is spread over the processes",
            "default_hooks.checkpoint.save_optimizer=False leaves it out of the checkpoints, which "
            "then cannot be resumed from exactly.",
        )


def check_even_batches(runner: Runner, model: BaseModel) -> None:
    """Check that all processes have as many batches, and of one size where a loss joins them.

    A loss that does says so by an attribute ``joins_processes``.

    Raises:
        SettingError: If the sampler gives some processes one image more, and with it a batch more,
            in which they would wait for the others, or such a loss would meet it.
    """
    losses = getattr(getattr(model, "distiller", None), "distill_losses", None) or {}
    joining = [name for name, loss in losses.items() if getattr(loss, "joins_processes", False)]
    loader = runner.train_dataloader
    if runner.world_size == 1 or isinstance(loader.dataset, IterableDataset):
        return
    counts = images_per_process(loader, runner.world_size)
    size = loader.batch_size  # None with a batch sampler
    if joining and not loader.drop_last:
        uneven = counts
    elif size:
        uneven = {count // size if loader.drop_last else -(-count // size) for count in counts}
    else:
        return
    if len(uneven) > 1:
        needed, told = "processes that take as many steps each", f" with batches of {size}"
        if joining:
            needed, told = "losses that join the batches of all processes", ""
            needed += f" ({', '.join(joining)}), which have to be of one size"
        raise SettingError(
            "train_dataloader.sampler.round_up",
            f"True for {needed}",
            f"False with {len(loader.dataset)} images for {runner.world_size} processes{told}",
        )


def images_per_process(loader: DataLoader, world_size: int) -> set[int]:
    """Return how many images processes read in an epoch, one number where all read as many."""
    if getattr(loader.sampler, "round_up", True):
        return {len(loader.sampler)}  # type: ignore[arg-type]
    count = len(loader.dataset)  # type: ignore[arg-type]
    return {count // world_size, -(-count // world_size)}
