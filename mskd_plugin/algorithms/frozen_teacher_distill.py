"""``SingleTeacherDistill`` with a teacher that is frozen, checked and not saved."""

from __future__ import annotations

import difflib
from inspect import signature
from traceback import walk_tb
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.utils import add_prefix
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.algorithms.loss_warmup import check_losses_exist, check_warmup, logged_name
from mskd_plugin.algorithms.records import (
    connectors_computed_once,
    copy_inference_records,
    release_records,
)
from mskd_plugin.checkpoints.weights import load_weights
from mskd_plugin.errors import SettingError, check_flag

TEACHER_MODES = ("tensor", "loss")


@MODELS.register_module()
class FrozenTeacherDistill(SingleTeacherDistill):
    """Distil one frozen teacher into a student; a drop-in for MMRazor's ``SingleTeacherDistill``.

    What differs from it, all of it listed in MMRazor's own behaviour as of 1.0.0:

    - the whole teacher is in eval mode, dropout and stochastic depth included, not its BatchNorm
      alone;
    - the teacher's loss is not computed;
    - the teacher's weights are loaded strictly, from any layout that
      :func:`mskd_plugin.checkpoints.weights.load_weights` reads;
    - checkpoints leave the teacher out, and loading one keeps the teacher that is in place;
    - a connector that serves several losses is computed once a step;
    - records are released after the losses, not at the next forward;
    - a recorder's source that names no module or parameter is reported with the nearest names;
    - a network that nothing reads is not run: the teacher after ``StopDistillHook`` has stopped the
      distillation, or beside losses of the student's records alone;
    - the teacher can run in inference mode.

    With ``teacher_trainable=True`` the teacher trains as in ``SingleTeacherDistill`` and is always
    saved.

    Args:
        distiller: Config of the distiller, MMRazor's ``ConfigurableDistiller`` for one.
        architecture: The student: config or model.
        teacher: Config or model. A model that is handed over counts as loaded.
        teacher_ckpt: The teacher's weights: a path, a URL or ``torchvision://<name>``.
        teacher_mode: ``"tensor"`` runs the teacher up to its logits. ``"loss"`` computes its loss
            too, for recorders of the teacher that sit inside its loss.
        teacher_inference_mode: Run the teacher under ``torch.inference_mode`` in place of
            ``torch.no_grad``: less work for the host at every operation, equal results. What the
            teacher's recorders hold is copied, once each, since backward cannot save an inference
            tensor; records of large maps cost their memory twice.
        save_teacher: Whether checkpoints hold the teacher's weights.
        loss_warmup: From the name of a distillation loss to the epochs over which it grows to its
            weight. :class:`mskd_plugin.hooks.LossWarmupHook` reads and applies it.
        **kwargs: The other arguments of ``SingleTeacherDistill``: ``data_preprocessor``,
            ``student_trainable``, ``teacher_norm_eval``, ``calculate_student_loss``,
            ``teacher_module_inplace``, ``module_inplace``, ``init_cfg``, ``teacher_trainable``.

    Shapes:
        Images (N, C, H, W) in; a dict of scalars out. ``student.*`` are the student's own losses,
        ``distill.*`` the distillation losses, weighted. Terms that a loss exposes in ``terms`` are
        added for the log alone, as ``distill.<loss>.<term>`` without "loss" in either name.

    Attributes:
        teacher_source: Where the teacher's weights come from, or None for a teacher with random
            weights.

    Raises:
        SettingError: If the teacher's weights do not fit, its head has other classes than the
            student's, a recorder's source does not exist, ``teacher_mode`` is unknown,
            ``teacher_inference_mode`` meets a teacher that trains or deliveries, or ``loss_warmup``
            is malformed or names no distillation loss.

    Source: MMRazor 1.0.0,
    ``mmrazor/models/algorithms/distill/configurable/single_teacher_distill.py``.
    """

    def __init__(
        self,
        distiller: dict,
        architecture: BaseModel | dict,
        teacher: BaseModel | dict,
        teacher_ckpt: str | None = None,
        teacher_mode: str = "tensor",
        teacher_inference_mode: bool = False,
        save_teacher: bool = False,
        loss_warmup: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_mode not in TEACHER_MODES:
            raise SettingError("teacher_mode", f"one of {TEACHER_MODES}", repr(teacher_mode))
        check_flag("teacher_inference_mode", teacher_inference_mode)
        check_flag("save_teacher", save_teacher)
        warmup = check_warmup("loss_warmup", loss_warmup)
        check_losses_exist("loss_warmup", warmup, distiller.get("distill_losses") or {})
        teacher_source = "the model given" if isinstance(teacher, nn.Module) else None
        if isinstance(teacher, dict):
            teacher = MODELS.build(teacher)
        if isinstance(architecture, dict):
            architecture = MODELS.build(architecture)
        _check_sources("student_recorders", distiller, architecture)
        _check_sources("teacher_recorders", distiller, teacher)
        _check_classes(architecture, teacher)

        super().__init__(distiller, teacher, architecture=architecture, **kwargs)

        self.teacher_mode = teacher_mode
        self.teacher_inference_mode = teacher_inference_mode
        self.loss_warmup = warmup
        self.teacher_source = teacher_source or _pretrained_source(self.teacher)
        if teacher_ckpt is not None:
            load_weights(
                self.teacher,
                teacher_ckpt,
                setting="teacher_ckpt",
                data_preprocessor=self.data_preprocessor,
            )
            self.teacher._is_init = True  # else `init_weights` would overwrite them
            self.teacher_source = teacher_ckpt
        if teacher_inference_mode and (self.teacher_trainable or self._delivers()):
            # The student's forward would meet inference tensors that deliveries bring.
            raise SettingError(
                "teacher_inference_mode",
                "False for a teacher that trains, and for a distiller with deliveries",
                True,
            )
        if not self.teacher_trainable:
            self.teacher.eval()
            if not save_teacher:
                self._register_state_dict_hook(_leave_teacher_out)
        self._register_load_state_dict_pre_hook(_keep_teacher_in_place, with_module=True)

    def loss(
        self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None = None
    ) -> dict[str, Tensor]:
        """Run teacher and student and return the losses of both the task and the distillation."""
        try:
            with connectors_computed_once(self.distiller):
                if self.teacher_trainable:
                    losses = super().loss(batch_inputs, data_samples)
                else:
                    losses = self._loss_of_student(batch_inputs, data_samples)
            losses.update(self._logged_terms())
        except SettingError as error:
            # Here, outside what `compile_losses` traces.
            if place := _place_of(error, self.distiller):
                raise error.inside(f"distiller.{place}") from error
            raise
        finally:
            release_records(self.distiller)
        return losses

    def _loss_of_student(
        self, batch_inputs: Tensor, data_samples: list[BaseDataElement] | None
    ) -> dict[str, Tensor]:
        distiller = self.distiller
        teacher_is_read, student_is_read = self._is_read(False), self._is_read(True)
        if teacher_is_read or self._delivers():
            without_grad = torch.inference_mode if self.teacher_inference_mode else torch.no_grad
            distiller.set_deliveries_override(False)
            with distiller.teacher_recorders, distiller.deliveries, without_grad():
                self.teacher(batch_inputs, data_samples, mode=self.teacher_mode)
            if self.teacher_inference_mode:
                copy_inference_records(distiller.teacher_recorders)

        losses = {}
        if student_is_read or self.calculate_student_loss:
            distiller.set_deliveries_override(True)
            needs_grad = self.calculate_student_loss or self.student_trainable
            with (
                distiller.student_recorders,
                distiller.deliveries,
                torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad),
            ):
                student_losses = self.student(batch_inputs, data_samples, mode="loss")
            if self.calculate_student_loss:
                losses = add_prefix(student_losses, "student")
        if not self.distillation_stopped:
            losses.update(add_prefix(distiller.compute_distill_losses(), "distill"))
        return losses

    def _is_read(self, from_student: bool) -> bool:
        """Whether a distillation loss reads a record of the student, or of the teacher."""
        return not self.distillation_stopped and any(
            record["from_student"] is from_student
            for mapping in self.distiller.loss_forward_mappings.values()
            for record in mapping.values()
        )

    def _delivers(self) -> bool:
        """Whether the teacher's forward leaves something for the student's."""
        return bool(self.distiller.deliveries.deliveries)

    def _logged_terms(self) -> dict[str, Tensor]:
        """Collect the terms of the losses for the log; a key without "loss" is not summed."""
        if self.distillation_stopped:
            return {}
        return {
            f"distill.{logged_name(name)}.{logged_name(term)}": value
            for name, loss in self.distiller.distill_losses.items()
            for term, value in getattr(loss, "terms", {}).items()
        }

    def train(self, mode: bool = True) -> FrozenTeacherDistill:
        """Set the student's mode; a frozen teacher stays in eval mode."""
        super().train(mode)
        if not self.teacher_trainable:
            self.teacher.eval()
        return self


def _check_sources(setting: str, distiller: dict, model: nn.Module) -> None:
    """Check that recorders which read a module or a parameter name one that the model has."""
    for name, recorder in (distiller.get(setting) or {}).items():
        kind = recorder.get("type")
        if kind in ("ModuleOutputs", "ModuleInputs"):
            known = [n for n, _ in model.named_modules()]
        elif kind == "Parameter":
            known = [n for n, _ in model.named_parameters()]
        else:
            continue
        source = recorder.get("source")
        if source not in known:
            near = difflib.get_close_matches(str(source), known, n=3, cutoff=0.4)
            raise SettingError(
                f"distiller.{setting}.{name}.source",
                f"the name of a {'parameter' if kind == 'Parameter' else 'module'} of the "
                f"{setting.removesuffix('_recorders')}",
                repr(source),
                f"The nearest names are {', '.join(near)}." if near else "",
            )


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Check that both heads have as many classes."""
    counts = [getattr(getattr(m, "head", None), "num_classes", None) for m in (student, teacher)]
    if None not in counts and counts[0] != counts[1]:
        raise SettingError(
            "teacher.head.num_classes", f"{counts[0]}, as the student's head has", counts[1]
        )


def _place_of(error: SettingError, distiller: nn.Module) -> str | None:
    """Name the connector or the loss that has refused a setting of its own."""
    names = {id(module): name for name, module in distiller.named_modules()}
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in names and error.setting in signature(type(module)).parameters:
            return names[id(module)]
    return None


def _pretrained_source(model: nn.Module) -> str | None:
    """Name the pretrained weights that the model's own config loads, if it does."""
    for module in model.modules():
        init_cfg = getattr(module, "init_cfg", None) or []
        for cfg in [init_cfg] if isinstance(init_cfg, dict) else init_cfg:
            if cfg.get("type") == "Pretrained":
                return str(cfg.get("checkpoint"))
    return None


def _leave_teacher_out(module: nn.Module, state_dict: dict, prefix: str, _: dict) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}teacher.")]:
        del state_dict[key]


def _keep_teacher_in_place(
    module: FrozenTeacherDistill, state_dict: dict, prefix: str, *_: Any
) -> None:
    """Complete a checkpoint that lacks the teacher, so that strict loading holds."""
    if not any(key.startswith(f"{prefix}teacher.") for key in state_dict):
        for key, value in module.teacher.state_dict().items():
            state_dict[f"{prefix}teacher.{key}"] = value
