"""The measures of time and memory, on work whose cost is known."""

from __future__ import annotations

import pytest
import torch

from mskd_plugin import measure


def test_functions_take_turns_in_changing_order_and_the_warm_up_is_not_timed():
    order = []
    names = "abc"
    functions = [lambda name=name: order.append(name) for name in names]
    times = measure.by_turns(functions, 10, warmup=2)
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == 12 and all(sorted(turn) == list(names) for turn in turns)
    assert {turn[0] for turn in turns} == set(names)
    assert [len(taken) for taken in times] == [10, 10, 10]


def test_seconds_are_those_of_the_function(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def takes(duration):
        now[0] += duration

    assert measure.by_turns([lambda: takes(2.0), lambda: takes(0.5)], 2, 1) == [[2, 2], [0.5, 0.5]]


def test_the_order_of_turns_is_the_same_every_time():
    order = []
    for _ in range(2):
        measure.by_turns([lambda name=name: order.append(name) for name in "abcd"], 5)
    assert order[:20] == order[20:]


def test_the_clock_starts_and_stops_when_the_device_is_done(monkeypatch):
    events = []
    monkeypatch.setattr(measure, "synchronize", lambda: events.append("wait"))
    clock = measure.time.perf_counter
    monkeypatch.setattr(measure.time, "perf_counter", lambda: events.append("clock") or clock())
    measure.seconds(lambda: events.append("work"))
    assert events == ["wait", "clock", "work", "wait", "clock"]


def test_peak_memory_counts_what_is_held_at_once():
    mebibyte = 2**18  # numbers in float32

    def two_at_once_of_three():
        one = torch.zeros(mebibyte)
        two = torch.zeros(2 * mebibyte)
        del one
        three = torch.zeros(4 * mebibyte)
        return two[0] + three[0]

    assert measure.peak_memory(two_at_once_of_three) == pytest.approx(6, abs=0.01)


def test_quartiles_are_in_milliseconds_and_among_what_was_measured():
    assert measure.quartiles([0.005, 0.001, 0.002, 0.004, 0.003]) == pytest.approx([2, 4])
    assert measure.quartiles([0.001, 0.002]) == pytest.approx([1.25, 1.75])


def test_a_table_has_a_column_for_each_format():
    columns = {"name": "{name}", "ms (least)": "{ms:.1f} ({least (ms)[0]:.2f})"}
    rows = [
        {"name": "a", "ms": 1.26, "least (ms)": [1.0, 7.0]},
        {"name": "b", "ms": 2, "least (ms)": [0.5]},
    ]
    assert measure.markdown_table(columns, rows).splitlines() == [
        "| name | ms (least) |",
        "| --- | --- |",
        "| a | 1.3 (1.00) |",
        "| b | 2.0 (0.50) |",
    ]


def test_the_matrix_rate_is_the_best_of_operations_over_time(monkeypatch):
    # Ten products of 2,048 squared; the first block warms up, the last one reaches a second.
    taken = iter([9.0, 0.5, 0.4, 0.3])
    monkeypatch.setattr(measure, "seconds", lambda function: next(taken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure.matrix_rate(1.0) == pytest.approx(10 * 2 * 2048**3 / 0.3)


class Counters:
    """What ``torch.cuda`` tells of a GPU's memory; queued work counts when it is waited for."""

    def __init__(self, monkeypatch):
        self.held = self.peak = 0
        self.queue = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)

    def take(self, mebibytes):
        self.queue.append(mebibytes * 2**20)

    def reset(self):
        self.peak = self.held

    def synchronize(self):
        for size in self.queue:
            self.held += size
            self.peak = max(self.peak, self.held)
        self.queue.clear()


def test_a_gpus_peak_is_that_of_the_work_alone_and_above_its_start(monkeypatch):
    gpu = Counters(monkeypatch)
    for size in (50, -40, 3):  # a peak before the start, and work still queued
        gpu.take(size)

    def work():
        for size in (4, 5, -6):
            gpu.take(size)

    assert measure.peak_memory(work) == 9
    assert gpu.held == 16 * 2**20 and not gpu.queue


def test_a_gpus_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert measure.device_name() == f"NVIDIA X, torch {torch.__version__}"


def test_a_gpus_matrix_rate_is_that_of_larger_products_there(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, **given: asked.append((shape, given)))
    monkeypatch.setattr(measure, "seconds", lambda function: 2.0)
    assert measure.matrix_rate(1.0) == 10 * 2 * 8192**3 / 2
    assert asked == [((8192, 8192), {"device": "cuda", "dtype": torch.bfloat16})]
