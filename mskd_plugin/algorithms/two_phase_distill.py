"""Distillation in two phases: something is trained first, the student afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.structures import BaseDataElement
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.algorithms.frozen_teacher_distill import FrozenTeacherDistill
from mskd_plugin.errors import SettingError, check_count

STUDENT, DISTILLER = "architecture", "distiller"


@MODELS.register_module()
class TwoPhaseDistill(FrozenTeacherDistill):
    """``FrozenTeacherDistill`` with an initial phase, as AB, FSP and FT have it.

    Phase 1 trains ``init_modules`` by ``init_losses`` alone; the student's own loss is off and all
    other modules are in eval mode. Phase 2 trains the student and what belongs to the other losses,
    by the student's loss and the distillation losses that are not in ``init_losses``; those of
    ``init_modules`` that belong to the distiller (a paraphraser, connectors) are finished: frozen
    and in eval mode.

    :class:`mskd_plugin.hooks.PhaseHook` says which phase it is. Until it does, as in the checks
    before training, all losses are computed and nothing may train.

    Which parameters train changes between the phases, so several processes need
    ``find_unused_parameters=True`` in the config (:func:`mskd_plugin.recipes.two_phases` sets it):
    ``DistributedDataParallel`` then waits for no gradient of a parameter that has none.

    Args:
        *args: The arguments of ``FrozenTeacherDistill``.
        init_losses: Names of the distillation losses of phase 1.
        init_modules: Modules that phase 1 trains: of the student (``architecture.backbone``) or the
            distiller (``distiller.connectors.<name>``, ``distiller.distill_losses.<name>``).
        init_epochs: Epochs of phase 1. Default 30, the CRD benchmark's.
        **kwargs: The other arguments of ``FrozenTeacherDistill``.

    Attributes:
        phase: 1, 2, or None before the first epoch.

    Raises:
        SettingError: When built, if there is no such loss or module; in training, if the phase is
            not known.

    Source: the order of training of HobbitLong/RepDistiller (``train_student.py``,
    ``helper/pretrain.py``).
    """

    phase: int | None = None

    def __init__(
        self,
        *args: Any,
        init_losses: Sequence[str],
        init_modules: Sequence[str],
        init_epochs: int = 30,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_epochs = check_count("init_epochs", init_epochs)
        self._mappings = dict(self.distiller.loss_forward_mappings)
        self.init_losses = _known("init_losses", init_losses, self._mappings)
        modules = [
            name
            for name, _ in self.named_modules()
            if name.startswith(
                (STUDENT, f"{DISTILLER}.connectors.", f"{DISTILLER}.distill_losses.")
            )
        ]
        self.init_modules = _known("init_modules", init_modules, modules)
        # Phases bring back only what the user has not frozen.
        self._trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        self._as_built: tuple[bool, bool] = (self.calculate_student_loss, self.student_trainable)

    def enter_phase(self, phase: int) -> None:
        """Set which losses are computed and which parameters train.

        Args:
            phase: 1 or 2.

        Raises:
            SettingError: If it is neither.
        """
        if phase not in (1, 2):
            raise SettingError("phase", "1 or 2", repr(phase))
        self.phase = phase
        first = phase == 1
        calculate_student_loss, student_trainable = self._as_built
        student_takes_part = not first or any(n.startswith(STUDENT) for n in self.init_modules)
        self.calculate_student_loss = calculate_student_loss and not first
        self.student_trainable = student_trainable and student_takes_part
        self.distiller.loss_forward_mappings = {
            name: mapping
            for name, mapping in self._mappings.items()
            if (name in self.init_losses) == first
        }
        for name, loss in self.distiller.distill_losses.items():
            if name not in self.distiller.loss_forward_mappings:
                getattr(loss, "terms", {}).clear()  # else the log would repeat the last ones
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trainable and self._trains(name))
            parameter.grad = None
        self.train(self.training)

    def _trains(self, name: str) -> bool:
        """Whether a parameter or module of student or distiller trains in this phase."""
        initial = any(f"{name}.".startswith(f"{module}.") for module in self.init_modules)
        return initial if self.phase == 1 else name.startswith(STUDENT) or not initial

    def loss(
        self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of the phase."""
        if self.training and self.phase is None:
            raise SettingError(
                "custom_hooks",
                "hooks with a PhaseHook, since this model trains in two phases",
                "none that has set the phase",
            )
        return super().loss(batch_inputs, data_samples)

    def train(self, mode: bool = True) -> TwoPhaseDistill:
        """Set the mode; modules that do not train in this phase stay in eval mode."""
        super().train(mode)
        if mode and self.phase == 1:
            self.architecture.eval()
            self.distiller.eval()
            for name in self.init_modules:
                self.get_submodule(name).train()
        elif mode and self.phase == 2:
            for name in self.init_modules:
                if not self._trains(name):
                    self.get_submodule(name).eval()
        return self


def _known(setting: str, names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return ``names`` as a tuple, all of them known and at least one."""
    known = list(known)
    wrong = [repr(name) for name in names if name not in known]
    if isinstance(names, str) or not names or wrong:
        # Of modules, those of one level say enough.
        shown = [name for name in known if name.count(".") <= 2]
        raise SettingError(setting, f"names out of {', '.join(shown)}", ", ".join(wrong) or names)
    return tuple(names)
