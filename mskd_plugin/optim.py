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
    which makes the host wait.

    Args:
        **kwargs: Those of ``OptimWrapper``: ``optimizer``, ``accumulative_counts``, ``clip_grad``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter gradient accumulation's context and autocast on the model's device."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
