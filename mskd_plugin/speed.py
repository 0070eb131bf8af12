"""Memory layout and compilation of the networks of any model that a config trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import ModuleOutputsRecorder
from mmrazor.models.task_modules.recorder.param_recorder import ParameterRecorder
from torch import Tensor, nn

from mskd_plugin.errors import SettingError

#: Where networks are in a distillation algorithm of MMRazor.
NETWORKS = ("architecture", "teacher")
_COMPILE_OPTIONS = set(inspect.signature(torch.compile).parameters) - {"model", "disable"}


def to_channels_last(model: nn.Module) -> None:
    """Lay weights and images out with the channels last, in place, as tensor cores want them.

    Values, names and shapes stay. Images get the layout as they leave ``model.data_preprocessor``,
    and convolutions pass it on. Calling it again changes nothing.

    Args:
        model: A classifier or an algorithm. In a distributed wrapper its weights keep their layout,
            for which ``DistributedDataParallel`` has laid out its buckets: it would take the first
            step with wrong gradients, or every step with ``find_unused_parameters``. Convolutions
            then convert their weights at each call.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> to_channels_last(network)
        >>> network[0].weight.stride()
        (27, 1, 9, 3)
    """
    wrapped = is_model_wrapper(model)
    if not wrapped:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocessor = getattr(model.module if wrapped else model, "data_preprocessor", None)
    if preprocessor is not None and _lay_out_images not in preprocessor._forward_hooks.values():
        preprocessor.register_forward_hook(_lay_out_images)


def _lay_out_images(_: nn.Module, __: tuple, data: Any) -> Any:
    images = data.get("inputs") if isinstance(data, dict) else None
    if isinstance(images, Tensor) and images.dim() == 4:
        data["inputs"] = images.contiguous(memory_format=torch.channels_last)
    return data


def lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer's state the strides of its parameters.

    A checkpoint brings the state in the layout that it was written in; fused kernels want one
    layout for a parameter and all that belongs to it.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_compile(setting: str, options: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments for ``torch.compile``, or None for no compilation.

    Each shape gets a graph of its own (``dynamic=False``), unless ``options`` says otherwise: the
    smaller last batch of an epoch would else slow down all that follow.

    Raises:
        SettingError: If ``options`` is neither a bool nor a dict of arguments that there are.
    """
    if isinstance(options, bool):
        return {"dynamic": False} if options else None
    unknown = set(options) - _COMPILE_OPTIONS if isinstance(options, Mapping) else None
    if unknown is None or unknown:
        raise SettingError(
            setting,
            f"True, False or a dict of arguments of torch.compile "
            f"({', '.join(sorted(_COMPILE_OPTIONS))})",
            repr(options),
        )
    return {"dynamic": False, **options}


class CompiledBackbones:
    """The backbones of a model, compiled for training steps alone.

    Replaced is each backbone's ``forward``, on the instance, so that names in the state dict stay.
    MMRazor's recorders inside a backbone are traced with it and still record; the plugin's own
    backbones and mmpretrain's ResNet become one graph each, without a break. Head, connectors and
    losses are not compiled. Evaluation isn't either: it runs what it always ran, and its batch
    sizes cost no compilation.

    Args:
        model: A classifier or an algorithm, without its distributed wrapper.
        options: Arguments of ``torch.compile``.

    Attributes:
        names: The backbones' names in the model.
        enabled: Whether the compiled forward is used. False at first.

    Raises:
        SettingError: If there is no backbone, torch cannot compile here, or the distiller has
            deliveries or recorders that replace functions while the networks run.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self.enabled = False
        self.names = [
            f"{prefix}backbone"
            for prefix in ("", *(f"{name}." for name in NETWORKS))
            if f"{prefix}backbone" in dict(model.named_modules())
        ]
        if not self.names:
            raise SettingError(
                "compile", "False for a model without a `backbone`", type(model).__name__
            )
        distiller = getattr(model, "distiller", None)
        if isinstance(distiller, ConfigurableDistiller):
            _check_traceable(distiller)
        # Recorders are hooks. By default torch takes a network's graph for another of its shape
        # whose hooks differ.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self._backbones = [model.get_submodule(name) for name in self.names]
        for backbone in self._backbones:
            _numbers_of_python(backbone)
            backbone.forward = self._switched(backbone.forward, options)

    def _switched(self, eager: Callable, options: Mapping[str, Any]) -> Callable:
        try:
            compiled = torch.compile(eager, **options)
        except (ImportError, RuntimeError) as error:  # not with this Python, or on this system
            raise SettingError(
                "compile", "False, since torch cannot compile here", error
            ) from error

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (compiled if self.enabled else eager)(*args, **kwargs)

        return forward

    def remove(self) -> None:
        """Give the backbones their own ``forward`` back."""
        for backbone in self._backbones:
            del backbone.forward
        self._backbones = []


def _numbers_of_python(network: nn.Module) -> None:
    """Turn NumPy's numbers in a network's settings into Python's.

    torch.compile takes them for tensors, whose values no graph can branch on; mmpretrain's
    transformers have drop-path rates of that kind.
    """
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, np.generic):
                setattr(module, name, value.item())


def _check_traceable(distiller: ConfigurableDistiller) -> None:
    recorders = {
        **distiller.student_recorders.recorders,
        **distiller.teacher_recorders.recorders,
    }
    replacing = [
        name
        for name, recorder in recorders.items()
        if not isinstance(recorder, (ModuleOutputsRecorder, ParameterRecorder))
    ]
    replacing += distiller.deliveries.deliveries
    if replacing:
        raise SettingError(
            "compile",
            "False for a distiller with deliveries, or recorders of functions or methods, which "
            "replace functions while the networks run",
            ", ".join(replacing),
        )
