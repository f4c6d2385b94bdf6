"""Choice of upsampler, from what was measured before: ``featsharp eval pareto``, of which ``pareto.json`` is a part.

Newly shipped weights take part as soon as they are in that file: ``python benchmarks/results_page.py`` writes it.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("pareto.json")
# Quality is compared with this one's.
BASELINE = "bilinear"
# What is taken for backbones of which nothing was measured.
UNMEASURED = "views-2x?passes=4"


@cache
def read_measured(backbone: str, factor: float = 2) -> dict[str, dict[str, Any]]:
    """Read the results of a backbone and a factor.

    Returns:
        By name: "passes", "seconds", "measures" with a number for each, and "gain": the geometric mean over measures of
        the number in units of the baseline's, 1 for the baseline.
    """
    content = json.loads(MEASURED.read_text(encoding="utf-8"))
    known = {name: one for name, one in content.items() if one["backbone"] == backbone and one["factor"] == factor}
    baseline = known.get(f"{BASELINE}-{factor:g}x")
    if baseline is None:
        return {}

    base = baseline["measures"]

    def gain(measures: dict[str, float]) -> float:
        ratios = [value / base[name] for name, value in measures.items() if base.get(name, 0) > 0]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios and min(ratios) > 0 else 0.0

    return {name: {**one, "gain": gain(one["measures"])} for name, one in known.items()}


def choose_upsampler(backbone: str, most_passes: float = 5) -> str:
    """Name the upsampler of factor 2 with the best quality that costs at most so many passes."""
    known = {name: one for name, one in read_measured(backbone).items() if round(one["passes"], 1) <= most_passes}
    return max(known, key=lambda name: known[name]["gain"]) if known else UNMEASURED
