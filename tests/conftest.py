"""What all tests share: options, fixed seeds and visible skips."""

import gc
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator

import later_versions
import numpy as np
import pytest
import torch

# The Hugging Face libraries read these when they are imported: no test asks a network or finds what the user fetched.
_HUB = tempfile.TemporaryDirectory(prefix="featsharp-hub-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _HUB.name}
# Without this, torch.compile starts processes that import torch, several in each process of the tests.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)


def pytest_report_header(config: pytest.Config) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only, tests marked gpu are skipped"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}; tests: {config.getoption('-m')}"


COVERED = 1  # parameters of a test that coverage follows: it doubles the time of all, and the rest run the same lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="gpu: no CUDA device")
    parameters: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        parameters[test] += 1
        if parameters[test] > COVERED:
            item.add_marker(pytest.mark.no_cover)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
    later_versions.mark(items)


def pytest_collection_finish() -> None:
    """Take what lives until the end out of garbage collection, each of which would walk through it for a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape names that UTF-8 cannot say in what a test has logged: pytest-xdist would end at them."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test draws the same numbers, alone or among others."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third parties draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def usual_log_level() -> Iterator[None]:
    """A command that a test runs here sets the level of the package's log messages for that test alone."""
    yield
    logging.getLogger("featsharp").setLevel(logging.NOTSET)


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """The environment for a subprocess that must find ``featsharp`` by its installation or the working folder only."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
