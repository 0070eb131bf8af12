"""What changes over the epochs: schedules, phases and recipes, which have to fit the training."""

from __future__ import annotations

from mmengine.model import BaseModel
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmpretrain.engine import SwitchRecipeHook

from mskd_plugin.algorithms.two_phase_distill import TwoPhaseDistill
from mskd_plugin.datasets import InMemoryImages
from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import schedulers_of


def check_schedules(runner: Runner, model: BaseModel) -> None:
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


def check_epochs(runner: Runner, model: BaseModel) -> None:
    """Check that the training of a model in two phases reaches the second.

    Raises:
        SettingError: If it is not counted in epochs, or ends in phase 1.
    """
    if not isinstance(model, TwoPhaseDistill):
        return
    loop = runner.train_loop
    if not isinstance(loop, EpochBasedTrainLoop):
        raise SettingError("train_cfg.by_epoch", "True, since phases last for epochs", False)
    if loop.max_epochs <= model.init_epochs:
        raise SettingError(
            "train_cfg.max_epochs",
            f"above the {model.init_epochs} epochs of phase 1, which it includes",
            loop.max_epochs,
        )


def check_recipes(runner: Runner, model: BaseModel) -> None:
    """Check that what mmpretrain's ``SwitchRecipeHook`` changes in a later epoch is there, where it
    would end the training.
    """
    head = getattr(model, "head", None)
    dataset = runner.train_dataloader.dataset
    for hook in runner.hooks:
        for recipe in hook.schedule.values() if isinstance(hook, SwitchRecipeHook) else ():
            if "loss" in recipe and not any(hasattr(p, "loss_module") for p in (model, head)):
                raise SettingError(
                    "SwitchRecipeHook.schedule",
                    "one without a `loss`, since the hook does not find the student's inside a "
                    "distillation",
                    type(recipe["loss"]).__name__,
                )
            if "train_pipeline" in recipe and isinstance(dataset, InMemoryImages):
                raise SettingError(
                    "SwitchRecipeHook.schedule",
                    "one without a `train_pipeline` for InMemoryImages, whose pipeline has run "
                    "before training",
                    [type(transform).__name__ for transform in recipe["train_pipeline"]],
                )
