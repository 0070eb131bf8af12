"""Memory layout and compilation of the networks of any model that a config trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch._functorch.config
from mmengine.model import is_model_wrapper
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import ModuleOutputsRecorder
from mmrazor.models.task_modules.recorder.param_recorder import ParameterRecorder
from packaging.version import Version
from torch import Tensor, nn

from mskd_plugin.errors import SettingError

#: Where networks are in a distillation algorithm of MMRazor.
NETWORKS = ("architecture", "teacher")
#: Whether torch can trace recorders. Before, graphs stop at them, or leave them out (2.1).
COMPILES_BACKBONES = Version(torch.__version__) >= Version("2.4.0.dev0")
#: Whether torch can trace a backward pass as it runs, without autocast.
COMPILES_LOSSES = hasattr(torch._functorch.config, "backward_pass_autocast")
#: Whether a first CUDA graph captured in inference mode leaves those outside of it alone
#: (pytorch's issue 166792).
CAPTURES_INFERENCE_MODE = Version(torch.__version__) >= Version("2.11.0.dev0")
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


def place_state(optimizer: torch.optim.Optimizer) -> None:
    """Put an optimizer's state, as a checkpoint brings it, where its kernels want it.

    What is as large as its parameter gets the parameter's strides: the checkpoint's are those of
    the layout that it was written in, and fused kernels want one. Counts of steps go to the CPU
    unless the kernels read them on the device: MMEngine loads them onto a GPU, and torch leaves
    them there and then waits for each of them in each step.
    """
    for group in optimizer.param_groups:
        counts_on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step" and not counts_on_device:
                    state[name] = value.cpu()
                elif value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def keep_kernels(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put an optimizer's own choice of kernels into a state dict that it is to load.

    torch keeps the choice, ``fused`` and ``foreach``, among the settings of a group, so that a
    checkpoint brings that of the training which wrote it.
    """
    for group in state_dict["param_groups"]:
        for name in ("fused", "foreach"):
            if name in optimizer.defaults:
                group[name] = optimizer.defaults[name]


def check_compile(setting: str, options: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments for ``torch.compile``, or None for no compilation.

    Each shape gets a graph of its own (``dynamic=False``), unless ``options`` says otherwise: the
    smaller last batch of an epoch would else slow down all that follow.

    Args:
        setting: ``"compile"`` or ``"compile_losses"``.
        options: What the config states.

    Raises:
        SettingError: If ``options`` is neither a bool nor a dict of arguments that there are, or
            this torch is too old for what it asks for.
    """
    given = options if isinstance(options, Mapping) else {}
    if not isinstance(options, (bool, Mapping)) or set(given) - _COMPILE_OPTIONS:
        raise SettingError(
            setting,
            f"True, False or a dict of arguments of torch.compile "
            f"({', '.join(sorted(_COMPILE_OPTIONS))})",
            repr(options),
        )
    if options is False:
        return None
    _check_torch(setting)
    return {"dynamic": False, **given}


def _check_torch(setting: str) -> None:
    """Refuse what this torch cannot compile."""
    able, reason = {
        "compile": (COMPILES_BACKBONES, "2.4, which cannot trace recorders"),
        "compile_losses": (
            COMPILES_LOSSES,
            "2.9, which computes gradients of float32 losses in low precision",
        ),
    }[setting]
    if not able:
        raise SettingError(
            setting, f"False before torch {reason}", f"True with torch {torch.__version__}"
        )


def asks_for_cuda_graphs(options: Mapping[str, Any] | None) -> bool:
    """Whether arguments of ``torch.compile`` lead to CUDA graphs on a GPU."""
    options = options or {}
    return (
        options.get("mode") in ("reduce-overhead", "max-autotune")
        or options.get("backend") == "cudagraphs"
        or bool((options.get("options") or {}).get("triton.cudagraphs"))
    )


def check_cuda_graphs(model: nn.Module, accumulated: int) -> None:
    """Check that a training leaves alone what CUDA graphs overwrite in the next step.

    Args:
        model: A model without its distributed wrapper.
        accumulated: Batches whose gradients are added up.

    Raises:
        SettingError: If gradients, which autograd takes from a graph's memory as they are, have to
            outlive a step, or torch before 2.11 would capture a teacher in inference mode, which
            then fails for the student.
    """
    if accumulated > 1:
        raise SettingError(
            "optim_wrapper.accumulative_counts",
            "1 with CUDA graphs, which the compilation's mode asks for",
            accumulated,
        )
    if getattr(model, "teacher_inference_mode", False) and not CAPTURES_INFERENCE_MODE:
        raise SettingError(
            "model.teacher_inference_mode",
            "False with CUDA graphs before torch 2.11",
            f"True with torch {torch.__version__}",
        )


class CompiledMethods:
    """Methods of a model's modules, compiled for training steps alone.

    They are replaced on the instances, so that names in the state dict stay. Evaluation runs what
    it always ran, and its batch sizes cost no compilation.

    Args:
        methods: From a name for messages to a module and the name of its method.
        options: Arguments of ``torch.compile``.
        setting: The setting that asks for it.
        after: Calls of each method, while enabled, that run as they are before it is compiled.
        compiler: What does as ``torch.compile`` does. Default: itself.

    Attributes:
        names: The names.
        enabled: Whether the compiled methods are used. False at first.

    Raises:
        SettingError: If torch cannot compile here.
    """

    def __init__(
        self,
        methods: Mapping[str, tuple[nn.Module, str]],
        options: Mapping[str, Any],
        setting: str = "compile",
        after: int = 0,
        compiler: Callable[..., Callable] | None = None,
    ) -> None:
        self.enabled = False
        self._setting, self._after = setting, after
        self._compiler = compiler or torch.compile
        self.names = list(methods)
        _trace_as_eager_runs()
        self._replaced = list(methods.values())
        for owner, name in self._replaced:
            setattr(owner, name, self._switched(getattr(owner, name), options))

    def _switched(self, eager: Callable, options: Mapping[str, Any]) -> Callable:
        try:
            compiled = self._compiler(eager, **options)
        except (ImportError, RuntimeError) as error:  # not with this Python, or on this system
            raise SettingError(
                self._setting, "False, since torch cannot compile here", error
            ) from error

        left = self._after

        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if not self.enabled:
                return eager(*args, **kwargs)
            left -= 1
            return (eager if left >= 0 else compiled)(*args, **kwargs)

        return method

    def remove(self) -> None:
        """Give the modules their own methods back."""
        for owner, name in self._replaced:
            delattr(owner, name)


def compile_backbones(model: nn.Module, options: Mapping[str, Any]) -> CompiledMethods:
    """Compile the backbones of a classifier or of student and teacher.

    MMRazor's recorders inside a backbone are traced with it and still record; the plugin's own
    backbones and mmpretrain's ResNet become one graph each, without a break. The heads are not
    compiled.

    Args:
        model: A classifier or an algorithm, without its distributed wrapper.
        options: Arguments of ``torch.compile``.

    Raises:
        SettingError: If there is no backbone, torch cannot compile here, or cannot trace recorders,
            as torch before 2.4, or the distiller has deliveries or recorders that replace functions
            while the networks run.
    """
    _check_torch("compile")
    modules = dict(model.named_modules())
    names = [
        f"{prefix}backbone"
        for prefix in ("", *(f"{name}." for name in NETWORKS))
        if f"{prefix}backbone" in modules
    ]
    if not names:
        raise SettingError(
            "compile", "False for a model without a `backbone`", type(model).__name__
        )
    distiller = getattr(model, "distiller", None)
    if isinstance(distiller, ConfigurableDistiller):
        _check_traceable(distiller)
    for name in names:
        _numbers_of_python(modules[name])
    return CompiledMethods({name: (modules[name], "forward") for name in names}, options)


def compile_losses(model: nn.Module, options: Mapping[str, Any], after: int = 1) -> CompiledMethods:
    """Compile the connectors and distillation losses of an algorithm, as one graph where they wait
    for no number of the device.

    A loss is many small operations, which cost a GPU's host more time than the GPU. The graph reads
    what a call without it has kept for the device
    (:func:`mskd_plugin.functional.constants.kept`).

    Args:
        model: A model without its distributed wrapper. One that distils nothing, or by a distiller
            other than ``ConfigurableDistiller``, has nothing to compile.
        options: Arguments of ``torch.compile``.
        after: Steps that run without; 0 where the losses have run on this device before.

    Raises:
        SettingError: If torch cannot compile here, or cannot trace a backward pass that leaves
            autocast, as torch before 2.9.
    """
    _check_torch("compile_losses")
    distiller = getattr(model, "distiller", None)
    if not isinstance(distiller, ConfigurableDistiller):
        return CompiledMethods({}, options, "compile_losses")
    return CompiledMethods(
        {"connectors and losses": (distiller, "compute_distill_losses")},
        options,
        "compile_losses",
        after,
        compiler=_compiler_of_losses(distiller),
    )


def _compiler_of_losses(distiller: ConfigurableDistiller) -> Callable[..., Callable]:
    """Return a ``torch.compile`` for losses whose graph gets the distiller's records as arguments.

    What torch finds in a module it takes to stay at its place in memory, as parameters do: a CUDA
    graph reads it there, and is recorded anew for each other place. Arguments are copied to it.
    """
    managers = (distiller.student_recorders, distiller.teacher_recorders)
    recorders = [recorder for manager in managers for recorder in manager.recorders.values()]

    def compile(losses: Callable, **options: Any) -> Callable:
        def losses_of(records: list[list]) -> Any:
            for recorder, record in zip(recorders, records):
                recorder._data_buffer = record
            return losses()

        compiled = torch.compile(losses_of, **options)
        return lambda: compiled([recorder.data_buffer for recorder in recorders])

    return compile


def _trace_as_eager_runs() -> None:
    """Mend two settings of torch by which graphs differ from what they are traced from."""
    # Recorders are hooks. By default torch takes a network's graph for another of its shape
    # whose hooks differ.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # By default the backward graph is traced under the autocast around the forward, which brings
    # float32 products to bfloat16 although the forward took care that they are not.
    if COMPILES_LOSSES:
        torch._functorch.config.backward_pass_autocast = "off"


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
