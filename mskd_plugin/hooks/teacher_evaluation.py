"""The frozen teacher's accuracy, measured once."""

from __future__ import annotations

from numbers import Real

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mskd_plugin.checks.data import classes_of
from mskd_plugin.unchanged import unchanged_random_state
from mskd_plugin.unwrapped import model_of


@HOOKS.register_module()
class TeacherEvaluationHook(Hook):
    """Evaluate the teacher once before training, on the validation data, by the validation metrics.

    A teacher whose weights or normalisation are wrong otherwise trains a student for days
    unnoticed. MMRazor's ``SingleTeacherDistillValLoop`` shows the accuracy too, and pays for it at
    every validation. Metrics that are numbers are logged and written to the visualizer as
    ``teacher/<metric>``; all are kept in the message hub, hence in checkpoints. A resumed run does
    not measure again. Without a validation loop, or without a teacher, nothing happens.
    """

    priority = "VERY_LOW"  # after the hooks that prepare the run's logs

    def before_train(self, runner: Runner) -> None:
        """Measure and log."""
        model = model_of(runner)
        loop = runner.val_loop
        teacher = getattr(model, "teacher", None)
        if runner.iter > 0 or loop is None or teacher is None:
            return
        was_training = teacher.training
        teacher.eval()
        # The order of the validation data may be drawn; training must not depend on that.
        with unchanged_random_state(), torch.no_grad():
            for batch in loop.dataloader:
                data = model.data_preprocessor(batch, False)
                outputs = teacher(**data, mode="predict")
                loop.evaluator.process(data_samples=outputs, data_batch=batch)
            metrics = loop.evaluator.evaluate(len(loop.dataloader.dataset))
        teacher.train(was_training)

        for name, value in metrics.items():
            runner.message_hub.update_info(f"teacher/{name}", value)
        # Metrics of each class are lists, a confusion matrix is a tensor.
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.dim() == 0)
        }
        runner.visualizer.add_scalars({f"teacher/{name}": v for name, v in numbers.items()})
        runner.logger.info(
            "Teacher on the validation data: "
            + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        )
        classes = classes_of(loop.dataloader.dataset)
        top1 = metrics.get("accuracy/top1")
        if top1 is not None and classes and top1 < 2 * 100 / len(classes):
            runner.logger.warning(
                f"The teacher's accuracy of {top1:.2f} is near chance ({100 / len(classes):.2f}): "
                "check its weights, the order of the classes and the data preprocessor's mean, std "
                "and channel order."
            )
