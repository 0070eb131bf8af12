"""The checks before the first step, as a hook."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmrazor.models.distillers import ConfigurableDistiller

from mskd_plugin.checks.batches import check_batch_size, check_single_images, tell_accumulation
from mskd_plugin.checks.data import check_classes, check_images, check_memories, tell_batch_augments
from mskd_plugin.checks.distillation import check_losses, check_recomputed, check_recorded
from mskd_plugin.checks.networks import check_heads, check_normalized, check_teacher
from mskd_plugin.checks.processes import (
    check_even_batches,
    check_same_start,
    check_saved_optimizer,
    check_stop,
)
from mskd_plugin.checks.schedule import check_recipes, check_schedules
from mskd_plugin.checks.validation import check_best, check_metrics
from mskd_plugin.hooks.loss_warmup import check_warmup_hook
from mskd_plugin.unchanged import unchanged
from mskd_plugin.unwrapped import model_of

#: What no network is run for, in this order.
CHECKS = (
    check_same_start,
    check_saved_optimizer,
    check_stop,
    check_recomputed,
    check_batch_size,
    check_heads,
    check_classes,
    check_images,
    check_warmup_hook,
    check_recipes,
    check_normalized,
    check_even_batches,
    check_memories,
    tell_batch_augments,
    check_teacher,
    check_schedules,
    check_best,
)


@HOOKS.register_module()
class PreflightHook(Hook):
    """Run the checks before training.

    - the training data are there and can be read, their classes are as many as the heads' classes
      and those of the validation and test data;
    - the teacher's weights are loaded, and its normalisation and order of channels are those that
      the images get;
    - every recorder records, and every connector and loss takes what it is given, on two training
      images, but where networks have an optimizer each, and with it a step of their own;
    - every distillation loss is finite on them;
    - a loss that categorizes regions sits at the stage that feeds the teacher's classifier;
    - a warm-up that the algorithm asks for has the hook that applies it, and what a
      ``SwitchRecipeHook`` will change is there;
    - validation, tried on two of its images, measures what checkpoints and schedules depend on,
      and no schedule ends before training does;
    - all processes begin at the same step, with gradients for all that they train and an optimizer
      that can be saved, and no recorder is inside a module whose forward runs without gradients;
    - processes have as many batches each, and of one size where a loss gathers their images, and
      one that keeps something of each image has all of them;
    - images are mixed as the student's own config says, the learning rate is meant for the batch
      size, and no batch has one image, else there is a warning, or an error where the student
      cannot train on that.

    The images run without gradients but where blocks have ``with_cp``, in eval mode but for that
    last check; parameters, statistics and random states stay as they were.

    Attributes:
        ran_losses: Whether connectors and losses have run in this process.
    """

    priority = "HIGHEST"
    ran_losses = False

    def before_train(self, runner: Runner) -> None:
        """Check data, teacher and losses.

        Raises:
            SettingError: With the setting, what was expected and what was found.
        """
        model = model_of(runner)
        passed = ["data"] if getattr(model, "teacher", None) is None else ["data", "teacher"]
        for check in CHECKS:
            check(runner, model)
        if runner.val_loop is not None:
            with unchanged(model):
                check_metrics(runner, model)
        # Networks with an optimizer each, as in data-free distillation, have a step of their own.
        one_step = not isinstance(runner.optim_wrapper, OptimWrapperDict)
        if one_step and isinstance(getattr(model, "distiller", None), ConfigurableDistiller):
            with unchanged(model), runner.optim_wrapper.optim_context(model):
                check_losses(runner, model)
                check_recorded(runner, model)
            self.ran_losses = True
            tell_accumulation(runner, model)
            passed += ["recorders", "connectors", "losses"]
        with unchanged(model):  # after what names a student that cannot run at all
            check_single_images(runner, model)
        runner.logger.info(f"Preflight passed: {', '.join(passed)}.")
