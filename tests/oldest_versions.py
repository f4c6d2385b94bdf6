"""Print the oldest versions that pyproject.toml allows, for ``make test-oldest``: a line ``name==version`` each."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

# Beside the extras that are used: what runs the tests. Not onnx, whose exporter needs a later torch than the oldest,
# nor hub: tests of both run with what other libraries bring.
EXTRAS = ("timm", "hf", "open_clip", "train", "viz", "eval", "focus", "video", "zarr", "test")
# Tested with versions of today alone: their oldest ones lack wheels for Python 3.11 or other oldest versions here.
APART = ("gradio", "playwright", "ray", "wandb")


def main() -> None:
    """Print the list."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    for requirement in {Requirement(line).name: Requirement(line) for line in lines}.values():
        if requirement.name not in APART:
            (bound,) = (each for each in requirement.specifier if each.operator == ">=")
            print(f"{requirement.name}=={bound.version}")


if __name__ == "__main__":
    main()
