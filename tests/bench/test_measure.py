"""Measuring times and memory."""

import sys
import time

import pytest
import torch

from featsharp.bench.measure import (
    describe_machine,
    describe_noise,
    device_name,
    measure_memory,
    summarize,
    time_interleaved,
)
from featsharp.bench.ops import bench_scaling

CPU = torch.device("cpu")


def test_summary():
    timing = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.low, timing.median, timing.high, timing.runs) == (2.0, 3.0, 4.0, 5)


def test_cases_take_turns_and_slow_ones_run_less():
    calls = []

    def case(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    cases = {"fast": lambda: case("fast", 0.001), "slow": lambda: case("slow", 0.1)}
    timings = time_interleaved(cases, CPU, repeat=6, seconds=0.2)
    # Twice each, uncounted; then in turn.
    assert calls == ["fast", "fast", "slow", "slow", "fast", "slow", "fast", "slow", *4 * ["fast"]]
    assert timings["fast"].runs == 6
    assert timings["slow"].runs == 2
    assert 1 <= timings["fast"].median < 50 < 100 <= timings["slow"].median < 500


@pytest.mark.parametrize("repeat", [1, 20])
def test_the_least_number_of_runs_wins_over_time_and_repeat(repeat):
    timings = time_interleaved({"slow": lambda: time.sleep(0.02)}, CPU, repeat=repeat, least=5, seconds=0.01)
    assert timings["slow"].runs == 5


def test_the_device_is_waited_for_before_and_after_every_run():
    """The order of calls, since no accelerator is here; tests marked gpu have one."""
    events = []
    time_interleaved({"case": lambda: events.append("run")}, CPU, repeat=2, wait=events.append)
    assert events == ["run", *3 * [CPU, "run", CPU]]


@pytest.mark.gpu
def test_times_on_a_gpu_are_those_of_its_work():
    """A product of 4096 x 4096 is 137 GFLOP: no device does ten of them in the time that starting them takes."""
    cuda = torch.device("cuda")
    x = torch.randn(4096, 4096, device=cuda, dtype=torch.float64)

    def call():
        for _ in range(10):
            x @ x

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    assert time_interleaved({"case": call}, cuda, repeat=3)["case"].median > 0.8 * start.elapsed_time(stop)
    assert describe_machine(cuda)["device"] == torch.cuda.get_device_name(cuda)


def test_quartiles_far_apart_are_pointed_out():
    calm, wild = {"low": 9.5, "median": 10.0, "high": 11.5}, {"low": 9.0, "median": 10.0, "high": 11.5}
    assert describe_noise({"calm": calm}) == []
    (line,) = describe_noise({"calm": calm, "wild": wild})
    assert line == "noisy machine: the quartiles spread by more than 20% of the median: wild"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process's own peak is read from /proc")
def test_memory_is_that_of_the_peak():
    def call():
        large = torch.ones(128 * 2**18)  # 128 MiB; the process itself grows or shrinks by up to ten
        small = large[: 80 * 2**18].clone()
        del large
        return small.sum()

    assert 196 * 2**20 <= measure_memory(call, CPU) <= 220 * 2**20


def test_growing_outputs_are_timed_side_by_side():
    rows = list(bench_scaling(CPU, repeat=2, sides=(4, 8)))
    assert [(row["name"], row["side"]) for row in rows] == [
        (name, side) for side in (4, 8) for name in ("JBU level 2x", "FeatSharp block, lean")
    ]
    assert all(row["forward"]["median"] > 0 for row in rows)


def test_machine():
    machine = describe_machine(CPU)
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
    assert device_name(torch.device("mps")) == "mps"  # PyTorch has no name for it
