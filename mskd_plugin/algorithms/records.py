"""What ``ConfigurableDistiller`` keeps between a forward and its losses, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager
from torch import Tensor
from torch.utils._pytree import tree_map


@contextmanager
def connectors_computed_once(distiller: ConfigurableDistiller) -> Iterator[None]:
    """Compute each connector once per record inside this context.

    ``ConfigurableDistiller.get_record`` runs a connector for every mapping that names it, so one
    that serves two losses is computed twice. It is shadowed on the instance, which keeps MMRazor's
    own class usable in configs.
    """
    get_record = distiller.get_record
    outputs: dict[tuple, Any] = {}

    def get_record_once(
        recorder: str,
        from_student: bool,
        record_idx: int = 0,
        data_idx: int | None = None,
        connector: str | None = None,
        connector_idx: int | None = None,
    ) -> Any:
        key = (recorder, from_student, record_idx, data_idx, connector)
        if key not in outputs:
            outputs[key] = get_record(recorder, from_student, record_idx, data_idx, connector)
        output = outputs[key]
        return output if connector_idx is None else output[connector_idx]

    distiller.get_record = get_record_once
    try:
        yield
    finally:
        del distiller.get_record


def copy_inference_records(recorders: RecorderManager) -> None:
    """Put normal tensors in the place of recorded inference tensors, for losses with a backward.

    A tensor in several records is copied once. Whatever else is recorded stays as it is.
    """
    copies: dict[int, Tensor] = {}

    def normal(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_inference():
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    # All records are alive until the end, so that no id is given twice.
    fresh = [
        (recorder.data_buffer, [tree_map(normal, record) for record in recorder.data_buffer])
        for recorder in recorders.recorders.values()
    ]
    for buffer, records in fresh:
        buffer[:] = records


def release_records(distiller: ConfigurableDistiller) -> None:
    """Drop the activations that MMRazor would keep until the next forward."""
    for manager in (distiller.student_recorders, distiller.teacher_recorders):
        for recorder in manager.recorders.values():
            recorder.reset_data_buffer()
    for delivery in distiller.deliveries.deliveries.values():
        delivery.data_queue.clear()
