"""Settings of tasks and runs: dataclass fields that are also flags, or have a range; flags that name encoders."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from featsharp.names import plain_value

if TYPE_CHECKING:
    import torch

# The backbone that works without a model hub.
DEFAULT_BACKBONE = "vits14-focus"
# Maps an encoder to its scores by name, where higher is better; the first ranks.
Quality = Callable[[Any], dict[str, float]]


class PlainTask:
    """Base of tasks that are not given encoders: a dataclass with fields made by :func:`setting`.

    Attributes:
        name: Of the task, on the command line and in results.
    """

    name: ClassVar[str]

    @property
    def quality_images(self) -> tuple[Path, int] | None:
        """Folder or tars on which :meth:`run` needs ``quality``, and the number of images; None: it needs none."""
        return None

    def run(
        self, device: "torch.device", dtype: "torch.dtype | None", progress: bool, quality: Quality | None = None
    ) -> dict[str, Any]:
        """Compute the result, JSON values by name.

        Args:
            device: To compute on.
            dtype: Autocast type of backbone passes; None: float32.
            progress: Whether to show bars on stderr.
            quality: Measures an encoder on :attr:`quality_images`.

        Raises:
            FeatSharpError: When there is no result.
        """
        raise NotImplementedError

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format the result as lines of text."""
        raise NotImplementedError


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Add the flags --checkpoint and --upsampler of everything that takes several encoders."""
    parser.add_argument("--checkpoint", nargs="+", metavar="[LABEL=]FILE", help="trained files")
    parser.add_argument(
        "--upsampler",
        nargs="+",
        metavar="[LABEL=]NAME-FACTORx",
        help="training-free upsamplers, such as bilinear-2x; implicit-2x?steps=400 is fitted to each picture",
    )


def add_backbone(parser: argparse.ArgumentParser, text: str = "default: the checkpoint's own", **options: Any) -> None:
    """Add the flags --backbone and --allow-functions of everything that loads encoders."""
    parser.add_argument("--backbone", help=f"name of the backbone; {text}", **options)
    parser.add_argument(
        "--allow-functions",
        action="store_true",
        help="let the checkpoint import functions that it names; runs their code",
    )


def add_device(parser: argparse.ArgumentParser, text: str = "auto, cpu, cuda, mps, ...") -> None:
    """Add the flag --device."""
    parser.add_argument("--device", default="auto", help=text)


def setting(default: Any, help: str, **options: Any) -> Any:
    """Make a dataclass field that becomes a flag.

    Args:
        default: Of the field.
        help: Its line in the help of the command.
        options: Further arguments of ``add_argument``: type, nargs, choices, required, metavar. Types beyond those of
            argparse are "count" (a whole number of at least 1) and "size" (HxW).
    """
    return dataclasses.field(default=default, metadata={"help": help, **options})


def setting_fields(task: Any) -> "list[dataclasses.Field[Any]]":
    """List the fields of a task, or of its class, that were made by :func:`setting`."""
    return [field for field in dataclasses.fields(task) if "help" in field.metadata]


def settings_of(task: Any) -> dict[str, Any]:
    """Collect the settings of a task as JSON values, by name."""
    values = {field.name: getattr(task, field.name) for field in setting_fields(task)}
    return {name: str(value) if isinstance(value, Path) else plain_value(value) for name, value in values.items()}


def key(
    default: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    least_low: float | None = None,
    free: bool = False,
) -> Any:
    """Make a dataclass field of a training configuration.

    Args:
        default: Its value; lists are copied.
        least: Smallest value of a number, which must be finite.
        most: Largest value of a number.
        least_low: Smallest low end of a [low, high] range of finite numbers.
        free: Whether a resumed run may change it, as it has no effect on what a step computes.
    """
    limits = {"least": least, "most": most, "least_low": least_low}
    metadata = {name: value for name, value in limits.items() if value is not None} | {"free": free}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
