"""Distillation losses that grow to their weight over the first epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mskd_plugin.algorithms.loss_warmup import check_losses_exist, check_warmup, logged_name
from mskd_plugin.algorithms.two_phase_distill import TwoPhaseDistill
from mskd_plugin.errors import SettingError
from mskd_plugin.unwrapped import model_of


@HOOKS.register_module()
class LossWarmupHook(Hook):
    r"""Scale distillation losses by :math:`\min(e / E, 1)` in epoch e, counted from 1.

    For a loss that a :class:`mskd_plugin.algorithms.TwoPhaseDistill` computes in phase 2, e counts
    from the end of phase 1; until then the factor is 0.

    What to scale is stated here, by the algorithm (``FrozenTeacherDistill(loss_warmup=...)``, which
    is how a method asks for it), or by both. The factor is applied to what the loss returns, so
    that it works with any loss of any ``ConfigurableDistiller``, MMRazor's own included, and it
    depends on the epoch alone, so that a resumed run goes on where it stopped. It is logged as
    ``train/warmup/<loss>``, without "loss" in its name.

    Args:
        losses: From the name of a distillation loss to its warm-up E in epochs. A warm-up of 1 or
            less changes nothing.

    Raises:
        SettingError: When built, if ``losses`` is malformed; before training, if there is no such
            distillation loss, the algorithm states another warm-up for it, or training is not
            counted in epochs.

    Attributes:
        factors: The current epoch's factors.

    Source: the schedule of megvii-research/mdistiller's ``DKD.py`` and ``ReviewKD.py``.
    """

    priority = "NORMAL"

    def __init__(self, losses: Mapping[str, float] | None = None) -> None:
        self.losses = check_warmup("losses", losses)
        self.factors: dict[str, float] = {}
        self._warmup: dict[str, float] = {}
        self._begins: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Runner) -> None:
        """Find the losses and follow them.

        Raises:
            SettingError: See the class.
        """
        self._release()
        model = model_of(runner)
        self._warmup = self._merged(getattr(model, "loss_warmup", {}))
        if not self._warmup:
            return
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            raise SettingError(
                "train_cfg.by_epoch", "True, since a loss warms up over epochs", False
            )
        modules = getattr(getattr(model, "distiller", None), "distill_losses", {})
        check_losses_exist("losses", self._warmup, modules)
        for name in self._warmup:
            late = isinstance(model, TwoPhaseDistill) and name not in model.init_losses
            self._follow(name, modules[name], model.init_epochs if late else 0)

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the factors of the epoch."""
        for name, epochs in self._warmup.items():
            passed = runner.epoch + 1 - self._begins[name]
            self.factors[name] = min(max(passed, 0) / epochs, 1.0)
            self._scales[name].fill_(self.factors[name])

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Log the factors, as mmengine logs the learning rate."""
        for name, factor in self.factors.items():
            runner.message_hub.update_scalar(f"train/warmup/{logged_name(name)}", factor)

    def after_train(self, runner: Runner) -> None:
        """Leave the losses as they were."""
        self._release()

    def _merged(self, asked: Mapping[str, float]) -> dict[str, float]:
        for name, epochs in asked.items():
            if self.losses.get(name, epochs) != epochs:
                raise SettingError(
                    f"losses.{name}",
                    f"the {epochs} epochs that the algorithm's `loss_warmup` says",
                    self.losses[name],
                )
        return {**asked, **self.losses}

    def _follow(self, name: str, loss: nn.Module, begin: int = 0) -> None:
        def scale(_: nn.Module, __: tuple, output: Any) -> Any:
            factor = self._scales[name]
            if isinstance(output, (list, tuple)):
                return type(output)(factor * value for value in output)
            return factor * output

        self._handles.append(loss.register_forward_hook(scale))
        self.factors[name] = 1.0
        self._begins[name] = begin
        # A number would be a constant of a compiled loss, to be compiled anew in each epoch; a
        # tensor of the CPU would keep the loss out of CUDA graphs.
        self._scales[name] = torch.ones((), device=get_device())

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._warmup, self.factors = [], {}, {}
        self._begins, self._scales = {}, {}


def check_warmup_hook(runner: Runner, model: BaseModel) -> None:
    """Check that the warm-up of losses is not asked for in vain.

    Raises:
        SettingError: If no hook applies it.
    """
    warmup = getattr(model, "loss_warmup", None)
    if warmup and not any(isinstance(hook, LossWarmupHook) for hook in runner.hooks):
        raise SettingError(
            "custom_hooks",
            f"hooks with a LossWarmupHook, since the model's `loss_warmup` is {warmup}",
            [type(hook).__name__ for hook in runner.hooks],
            "A list of one's own takes the place of the base's: [*_base_.custom_hooks, ...].",
        )
