"""Constants that depend on shapes and settings alone, kept on the device that reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Built = TypeVar("Built")


def kept(build: Callable[..., Built]) -> Callable[..., Built]:
    """Keep what a function returns, for each set of its arguments.

    Building a constant on a GPU costs a copy and a wait, each step. Where ``functools.lru_cache``
    does the same, torch.compile traces through it and builds the constant in its graph; a constant
    that is kept here is read by the graph.

    Args:
        build: A function of hashable arguments by position, which returns tensors that nobody
            changes, not None.

    Returns:
        The function with its memory.

    Example:
        >>> identity = kept(torch.eye)
        >>> identity(2) is identity(2)
        True
    """
    memory: dict[tuple, Built] = {}

    @torch.compiler.disable
    def fill(key: tuple) -> Built:
        # A tensor made under inference mode could not take part in autograd later.
        with torch.inference_mode(False):
            return build(*key)

    @wraps(build)
    def look_up(*key: Any) -> Built:
        found = memory.get(key)
        if found is None:
            found = memory[key] = fill(key)
        return found

    return look_up
