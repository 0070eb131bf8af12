"""Operations for which the host would wait for a GPU, found without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Their result, or its shape, is known to the host only when the device has computed it.
WAITING = {
    "_local_scalar_dense",  # item, bool, int, float
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Collects, in ``names``, the operations inside the context that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if name in WAITING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail if the host would wait inside; on a GPU CUDA itself looks for it, too."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Waits() as waits:
            yield
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    assert waits.names == []
