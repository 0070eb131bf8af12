"""Logged values that stay on the device until somebody reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor


class DeferringMessageHub(MessageHub):
    """A ``MessageHub`` that writes scalars to their histories when a history is read.

    ``MessageHub.update_scalar`` takes each tensor's number at once, for which the host waits until
    the device has computed it: once a step for each logged value. And it appends by copying the
    whole history, which after 500,000 steps is 8 MB a value. Here values wait, tensors without
    their graph, and are written together, into arrays that have room for more: one transfer for all
    tensors of a dtype. What a reader finds is the same.

    :class:`DeferredRuntimeInfoHook` gives the runner's hub this class for a training.
    """

    _pending: dict[str, list[tuple[Any, int]]]
    _rooms: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, int]]

    @classmethod
    def adopt(cls, hub: MessageHub) -> None:
        """Make a hub one of this class, in place, since optimizer wrapper and loops hold it."""
        if not isinstance(hub, cls):
            hub.__class__ = cls
            hub._pending, hub._rooms = defaultdict(list), {}

    def release(self) -> None:
        """Write what waits, and be a plain ``MessageHub`` again."""
        self.flush()
        del self._pending, self._rooms
        self.__class__ = MessageHub

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """Note a scalar. The first one of a key is written at once, which sets the keys' order."""
        if key not in self._log_scalars or not isinstance(count, int):
            super().update_scalar(key, value, count, resumed)
            return
        self._set_resumed_keys(key, resumed)
        if isinstance(value, Tensor):
            assert value.numel() == 1
            # A result has its own memory; what else is logged may be overwritten meanwhile.
            value = value.detach().clone() if value.is_leaf else value.detach()
        else:
            value = self._get_valid_value(value)
        self._pending[key].append((value, count))

    def get_scalar(self, key: str) -> HistoryBuffer:
        """Return the history of a key, complete. Other keys' values go on waiting."""
        if key in self._pending:
            self._write({key: self._pending.pop(key)})
        return self._log_scalars[key] if key in self._log_scalars else super().get_scalar(key)

    @property
    def log_scalars(self) -> Mapping[str, HistoryBuffer]:
        """All histories, complete."""
        self.flush()
        return self._log_scalars

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps, complete."""
        self.flush()
        return super().state_dict()

    def flush(self) -> None:
        """Write what waits."""
        pending = dict(self._pending)
        self._pending.clear()
        self._write(pending)

    def _write(self, pending: Mapping[str, list[tuple[Any, int]]]) -> None:
        # Keys may have been taken out since, with what they held.
        pending = {key: values for key, values in pending.items() if key in self._log_scalars}
        groups: dict[tuple, list[Tensor]] = defaultdict(list)
        for values in pending.values():
            for value, _ in values:
                if isinstance(value, Tensor):
                    groups[value.dtype, value.device].append(value.reshape(()))
        numbers = {group: iter(torch.stack(parts).tolist()) for group, parts in groups.items()}
        for key, values in pending.items():
            buffer = self._log_scalars[key]
            written = [
                next(numbers[v.dtype, v.device]) if isinstance(v, Tensor) else v for v, _ in values
            ]
            self._append(buffer, "_log_history", written)
            self._append(buffer, "_count_history", [count for _, count in values])

    def _append(self, buffer: HistoryBuffer, name: str, values: list[float]) -> None:
        """Append to an array of a history as ``HistoryBuffer.update`` does.

        The array becomes a part of a longer one, in which the next values find room.
        """
        history = getattr(buffer, name)
        dtype = np.result_type(history, np.asarray(values))
        part, room, end = self._rooms.get((id(buffer), name), (None, history, 0))
        if part is not history or room.dtype != dtype or end + len(values) > len(room):
            end = len(history)
            room = np.empty(max(2 * (end + len(values)), 1024), dtype)
            room[:end] = history
        start, end = end - len(history), end + len(values)
        room[end - len(values) : end] = values
        part = room[max(start, end - buffer.max_length) : end]
        setattr(buffer, name, part)
        self._rooms[id(buffer), name] = (part, room, end)


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's ``RuntimeInfoHook``, whose logged values wait on the device until they are read.

    To be put in its place, as ``default_hooks.runtime_info``. ``LoggerHook``, checkpoints and any
    other reader find the values that they would have found; between two logs the host does not wait
    for the device. See :class:`DeferringMessageHub`.
    """

    def before_train(self, runner: Runner) -> None:
        """Begin to defer."""
        super().before_train(runner)
        DeferringMessageHub.adopt(runner.message_hub)

    def after_train(self, runner: Runner) -> None:
        """Write what waits, and defer no more."""
        super().after_train(runner)
        if isinstance(runner.message_hub, DeferringMessageHub):
            runner.message_hub.release()
