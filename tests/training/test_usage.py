"""Time and memory of a run are those that were spent."""

import subprocess
import sys
import time

import pytest
import torch

from featsharp.training.usage import StepClock, peak_memory


class Time:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def batches(self, waits):
        for number, wait in enumerate(waits):
            self.now += wait
            yield number


def test_waiting_and_working_are_told_apart():
    now = Time()
    clock = StepClock(lambda: now.now)
    logged = []
    for number in clock.batches(now.batches([5.0, 1.0, 2.0, 1.0])):
        now.now += 3.0
        clock.step_done()
        if number in (1, 3):
            logged.append(clock.scalars(images_per_step=8))
        now.now += 100.0  # what lies between steps is nobody's
    assert clock.startup == 5
    assert clock.waits == [0, 1, 2, 1]
    assert clock.works == [3, 3, 3, 3]
    assert clock.seconds_per_step == 4
    assert clock.wait_share == 4 / 16
    # Two steps each: 3 and 4 seconds, then 5 and 4.
    assert logged[0] == {
        "speed/seconds_per_step": 3.5,
        "speed/images_per_second": 16 / 7,
        "data/wait_seconds": 0.5,
        "data/wait_share": 1 / 7,
    }
    assert logged[1]["data/wait_share"] == 3 / 9
    assert clock.time_for(1000) == "1:06:40"
    assert clock.summary() == (
        "4 steps of 4.00 s (median); 25.0% of the time waiting for data, first batch after 5.0 s"
    )


def test_real_waiting_is_seen():
    def slow():
        for number in range(4):
            time.sleep(0.05)
            yield number

    clock = StepClock()
    for _ in clock.batches(slow()):
        clock.step_done()
    assert clock.startup >= 0.05
    assert all(wait >= 0.05 for wait in clock.waits[1:])
    assert clock.wait_share > 0.5


def test_a_run_without_steps():
    clock = StepClock()
    assert list(clock.batches([])) == []
    assert clock.wait_share == 0
    assert clock.seconds_per_step != clock.seconds_per_step


def test_an_error_of_the_data_passes_through():
    def failing():
        yield 0
        raise ValueError("no images left")

    batches = StepClock().batches(failing())
    assert next(batches) == 0
    with pytest.raises(ValueError, match="no images left"):
        next(batches)


@pytest.mark.slow
def test_peak_of_resident_memory_grows_with_what_is_held():
    """In a process of its own: the tests before may have held far more, which must not count."""
    ballast = b"x" * 2**30
    code = (
        "import torch; from featsharp.training.usage import peak_memory\n"
        "before = peak_memory(torch.device('cpu'))\n"
        "held = torch.ones(2**28, dtype=torch.uint8)\n"
        "after = peak_memory(torch.device('cpu'))\n"
        "print(*after, after['memory/peak_resident_gib'] - before['memory/peak_resident_gib'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, growth = done.stdout.split()
    assert name == "memory/peak_resident_gib"
    assert 0.2 < float(growth) < 0.35
    del ballast


@pytest.mark.gpu
def test_peak_of_cuda_memory():
    held = torch.ones(2**28, device="cuda")
    assert peak_memory(held.device)["memory/peak_cuda_gib"] >= 1
