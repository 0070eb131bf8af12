"""The validation that an interruption took away."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner


@HOOKS.register_module()
class MissedValidationHook(Hook):
    """Validate before a resumed training goes on, where a validation was due at its checkpoint.

    MMEngine writes a checkpoint before the validation of its epoch, and resumes behind it: a
    training that was interrupted while validating would never have that one, be it the last epoch's
    or the one that steps a schedule or makes the best checkpoint. Such a checkpoint knows nothing
    of its validation, so one that had ended is made again, with the same numbers. With
    ``save_best`` it is written anew after the validation, which is noted in it then.
    """

    priority = "LOWEST"  # after the hooks that prepare the run's logs and best checkpoints

    def before_val_epoch(self, runner: Runner) -> None:
        """Note the validation."""
        runner.message_hub.update_info("validated", _progress(runner)[0])

    def before_train(self, runner: Runner) -> None:
        """Validate."""
        loop, (now, end) = runner.train_loop, _progress(runner)
        if runner.val_loop is None or now in (0, runner.message_hub.get_info("validated", 0)):
            return
        loop._decide_current_val_interval()
        if now >= loop.val_begin and (now % loop.val_interval == 0 or now == end):
            runner.logger.info("Validating the checkpoint that training resumes from.")
            runner.val_loop.run()


def _progress(runner: Runner) -> tuple[int, int]:
    """Return the epochs, or steps, that are done, and of how many; zeros for other loops."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        return loop.epoch, loop.max_epochs
    if isinstance(loop, IterBasedTrainLoop):
        return loop.iter, loop.max_iters
    return 0, 0
