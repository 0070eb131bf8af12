"""Gathering across processes with an exact gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number P of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's index, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor over the processes; the gradient is summed over them and cut back."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # An image of this process is a candidate for the anchors of every process. The sum over
        # processes is taken in a copy: autograd may share the incoming gradient with other branches
        # of the graph.
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.count, ctx.count)


def gather_batch(local: Tensor) -> Tensor:
    """Concatenate ``local`` (n, ...) of all P processes into (P n, ...), in the order of their
    ranks.

    The gradient that reaches a process's rows is the sum over all processes' losses. Data-parallel
    training averages the gradients of the processes, so P processes that each take the mean over
    their n images equal one process with P n images. Every process has to bring the same n, as
    mmengine's ``DefaultSampler`` does.

    Without a process group, or with one process, ``local`` comes back as it is.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _AllGather.apply(local.contiguous())
    return gathered
