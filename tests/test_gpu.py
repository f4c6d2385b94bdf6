"""What only a GPU can show; skipped visibly without one. The checks are in ``gpu_checks.py``."""

import pytest
from gpu_checks import device_checks

CHECKS = device_checks("cuda")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CHECKS)
def test_the_device_agrees_with_the_cpu(name):
    CHECKS[name]()
