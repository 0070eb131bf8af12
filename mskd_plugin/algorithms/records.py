"""What ``ConfigurableDistiller`` keeps between a forward and its losses, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmrazor.models.distillers import ConfigurableDistiller


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


def release_records(distiller: ConfigurableDistiller) -> None:
    """Drop the activations that MMRazor would keep until the next forward."""
    for manager in (distiller.student_recorders, distiller.teacher_recorders):
        for recorder in manager.recorders.values():
            recorder.reset_data_buffer()
    for delivery in distiller.deliveries.deliveries.values():
        delivery.data_queue.clear()
