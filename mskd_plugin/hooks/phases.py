"""The change from the first phase of a distillation to the second."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mskd_plugin.algorithms.two_phase_distill import TwoPhaseDistill
from mskd_plugin.checks.schedule import check_epochs
from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import model_of, optim_wrappers_of, schedulers_of


@HOOKS.register_module()
class PhaseHook(Hook):
    """Lead a :class:`mskd_plugin.algorithms.TwoPhaseDistill` through its phases; without one, do
    nothing.

    Before each epoch the phase is set from the epoch's number alone, 1 in the first ``init_epochs``
    epochs and 2 afterwards, so that a resumed run is in the phase it was stopped in. Where phase 2
    begins the optimizer's state (momentum) is dropped. The learning rate of both phases is the
    config's ``param_scheduler``; :func:`mskd_plugin.recipes.two_phases` writes it. The phase is
    logged as ``train/phase``, and the change in a line of its own.

    Raises:
        SettingError: Before training, if it is not counted in epochs, ends in phase 1, or runs in
            several processes without ``find_unused_parameters=True``.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._model: TwoPhaseDistill | None = None

    def before_train(self, runner: Runner) -> None:
        """Check that the run suits two phases.

        Raises:
            SettingError: See the class.
        """
        model = model_of(runner)
        self._model = model if isinstance(model, TwoPhaseDistill) else None
        if self._model is None:
            return
        check_epochs(runner, model)
        # Other wrappers than DistributedDataParallel have no such attribute.
        if not getattr(runner.model, "find_unused_parameters", True):
            raise SettingError(
                "find_unused_parameters",
                "True for a model in two phases and several processes, "
                "since each phase trains other parameters",
                False,
            )
        self._warn_of_schedule(runner, model.init_epochs)

    def _warn_of_schedule(self, runner: Runner, init_epochs: int) -> None:
        """Warn where the schedule of phase 2 begins with phase 1."""
        iterations = len(runner.train_dataloader)
        for scheduler in schedulers_of(runner):
            change = init_epochs * (1 if scheduler.by_epoch else iterations)
            # One that ends one step later takes its factor back as phase 2 begins.
            if scheduler.begin < change and scheduler.end > change + 1:
                runner.logger.warning(
                    f"{type(scheduler).__name__} begins before the end of phase 1 and goes on in "
                    "phase 2. For a schedule that begins anew see mskd_plugin.recipes.two_phases."
                )

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the phase of the epoch."""
        model = self._model
        if model is None:
            return
        phase = 1 if runner.epoch < model.init_epochs else 2
        if model.phase != phase:
            model.enter_phase(phase)
            # MMEngine would go on logging the last values of what is no longer computed.
            for name in ("loss", *(f"distill.{name}" for name in model.init_losses)):
                runner.message_hub.log_scalars.pop(f"train/{name}", None)
            trained = [p.numel() for p in model.parameters() if p.requires_grad]
            runner.logger.info(
                f"Phase {phase} of 2 from epoch {runner.epoch + 1}: losses "
                + ", ".join([*model.distiller.loss_forward_mappings] or ["of the student alone"])
                + ("; the student's own loss is off" if phase == 1 else "")
                + f"; {sum(trained):,} parameters train."
            )
        if runner.epoch == model.init_epochs:
            for wrapper in optim_wrappers_of(runner):
                wrapper.optimizer.state.clear()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Log the phase, as mmengine logs the learning rate."""
        if self._model is not None:
            runner.message_hub.update_scalar("train/phase", self._model.phase)
