"""A recorder for maps before their last ReLU, for networks that overwrite them."""

from __future__ import annotations

from typing import Any

from mmrazor.models.task_modules.recorder import ModuleOutputsRecorder
from mmrazor.registry import TASK_UTILS
from torch import nn

from mskd_plugin.errors import SettingError

_PREACT = ".preact"


@TASK_UTILS.register_module()
class PreActivationRecorder(ModuleOutputsRecorder):
    """Record a map before its ReLU.

    The backbones of this project have a module whose output is that map, and this recorder does
    what MMRazor's ``ModuleOutputs`` does. The residual blocks of mmpretrain have none: their one
    ReLU, called two or three times, overwrites its input. There ``source`` is the block's name and
    ``.preact``, and recorded is the ReLU's last input, copied before it is overwritten.

    Args:
        source: A module's name, or ``<block>.preact``, where ``<block>.relu`` is the ReLU.

    Raises:
        SettingError: If the model has neither.

    Example:
        ``{"type": "PreActivation", "source": "backbone.layer4.1.preact"}`` in a distiller's
        ``teacher_recorders`` for mmpretrain's ResNet-18.
    """

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        """Register the hook."""
        modules = dict(model.named_modules()) if model is not None else {}
        relu = modules.get(f"{self.source.removesuffix(_PREACT)}.relu")
        if self.source in modules:
            super().prepare_from_model(model)
        elif relu is not None:
            relu.register_forward_pre_hook(self.record_input)
        else:
            raise SettingError(
                "source",
                "a module of the model, or a block with a `relu` and `.preact`",
                repr(self.source),
            )

    def record_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep the input, in the place of an earlier call's."""
        if self.recording:
            (value,) = inputs
            overwritten = getattr(module, "inplace", False)
            self._data_buffer = [value.clone() if overwritten else value]
