"""Mixed precision in bfloat16 for MMEngine's optimizer wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """An ``OptimWrapper`` whose forward runs under bfloat16 autocast, on a GPU or a CPU.

    MMEngine's ``AmpOptimWrapper`` refuses a CPU and always scales the loss. bfloat16 has float32's
    range, so nothing needs scaling, and the step needs no look at the gradients for infinities,
    which makes the host wait. Nor does clipping read the gradients' norm: it is logged as a tensor,
    for which the host waits at once unless
    :class:`~mskd_plugin.hooks.deferred_log.DeferredRuntimeInfoHook` defers the log.

    Args:
        **kwargs: Those of ``OptimWrapper``: ``optimizer``, ``accumulative_counts``, ``clip_grad``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter gradient accumulation's context and autocast on the model's device."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield

    def _clip_grad(self) -> None:
        """Clip as ``OptimWrapper`` does, which reads the norm at once."""
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.grad is not None
        ]
        norm = self.clip_func(parameters, **self.clip_grad_kwargs) if parameters else None
        if norm is not None:  # clipping by value has none
            self.message_hub.update_scalar(f"train/{self.grad_name}", norm)
