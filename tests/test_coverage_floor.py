"""The check of `make test` that no module goes untested."""

from coverage_floor import modules_below


def test_modules_below_the_floor_are_named():
    shares = {"featsharp/a.py": 59.9, "featsharp/b.py": 60.0, "featsharp/c.py": 12.3}
    report = {"files": {name: {"summary": {"percent_covered": share}} for name, share in shares.items()}}
    assert modules_below(report) == ["featsharp/a.py: 59.9 %", "featsharp/c.py: 12.3 %"]
