"""Measuring times and memory."""

import sys
import time

import pytest
import torch

from featsharp.benchmark.measure import describe_machine, measure_memory, summarize, time_interleaved

CPU = torch.device("cpu")


def test_summary():
    timing = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.low, timing.median, timing.high, timing.runs) == (2.0, 3.0, 4.0, 5)


def test_cases_take_turns_and_slow_ones_run_less(monkeypatch):
    monkeypatch.setattr("featsharp.benchmark.measure.CASE_SECONDS", 0.2)
    calls = []

    def case(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    timings = time_interleaved({"fast": lambda: case("fast", 0.001), "slow": lambda: case("slow", 0.1)}, CPU, repeat=6)
    # Twice each, uncounted; then in turn.
    assert calls == ["fast", "fast", "slow", "slow", "fast", "slow", "fast", "slow", *4 * ["fast"]]
    assert timings["fast"].runs == 6
    assert timings["slow"].runs == 2
    assert 1 <= timings["fast"].median < 50 < 100 <= timings["slow"].median < 500


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process's own peak is read from /proc")
def test_memory_is_that_of_the_peak():
    def call():
        large = torch.ones(30 * 2**18)  # 30 MiB
        small = large[: 10 * 2**18].clone()
        del large
        return small.sum()

    assert 38 * 2**20 <= measure_memory(call, CPU) <= 48 * 2**20


def test_machine():
    machine = describe_machine(CPU)
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
