"""Time and memory of pieces of a training, on a CPU or the current GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import is_distributed


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Run ``function`` once and return the seconds until its work on the device is done."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def by_turns(
    functions: Sequence[Callable[[], object]], turns: int, warmup: int = 0
) -> list[list[float]]:
    """Time functions that take turns, so that a drift of the machine meets all of them.

    Each turn has an order of its own, drawn from a fixed seed: what ran just before, and the memory
    that it left, would else favour the same function in every turn.

    Args:
        functions: What to run.
        turns: Timed runs of each.
        warmup: Runs of each before them.

    Returns:
        The seconds of each function's runs.
    """
    times: list[list[float]] = [[] for _ in functions]
    order, draw = list(range(len(functions))), random.Random(0)
    for turn in range(warmup + turns):
        draw.shuffle(order)
        for index in order:
            if turn < warmup:
                functions[index]()
            else:
                times[index].append(seconds(functions[index]))
    return times


def quartiles(seconds: Sequence[float]) -> list[float]:
    """Return the lower and the upper quartile of at least two durations, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return [1e3 * low, 1e3 * high]


def peak_memory(function: Callable[[], object]) -> float:
    """Run ``function`` once and return the most memory, in MiB, that it held above the start."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
        if is_distributed():
            # Without, 4 of 20 runs of two processes crashed on torch 2.5.1, with it none of 20:
            # most likely other threads still freed memory when the profile was gone.
            time.sleep(0.5)
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=_clock):
        held += change.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def _clock(event: object) -> int:
    # torch before 2.4 has microseconds alone.
    name = "start_ns" if hasattr(event, "start_ns") else "start_us"
    return int(getattr(event, name)())


def matrix_rate(duration: float = 1.0) -> float:
    """Measure bfloat16 matrix products for ``duration`` seconds; return the best rate seen, in
    operations per second.
    """
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(10):
            a @ a

    seconds(products)
    taken: list[float] = []
    while sum(taken) < duration:
        taken.append(seconds(products))
    return 10 * 2 * size**3 / min(taken)


def markdown_table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format figures as a Markdown table.

    Args:
        columns: From each title to the format of the cells under it, of a row's figures by name.
        rows: Figures of each row.
    """
    cells = [[form.format_map(row) for form in columns.values()] for row in rows]
    lines = [[*columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_name() -> str:
    """Name what the figures are of: the GPU, or the CPU's threads, and torch's version."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"
