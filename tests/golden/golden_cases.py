"""All recorded cases: importing a module of them adds to ``CASES``."""

import golden_backbones  # noqa: F401
import golden_runs  # noqa: F401
import golden_upsamplers  # noqa: F401
from golden_base import CASES, Values, run_case

__all__ = ["CASES", "Values", "run_case"]
