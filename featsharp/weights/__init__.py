"""Trained weights that come with the package: BACKBONE/UPSAMPLER-FACTORx.safetensors, each with a model card."""

from pathlib import Path

HOME = Path(__file__).parent
# The default of `featsharp upsample`.
DEFAULT = "vits14-focus/featsharp-2x"


def list_weights() -> list[str]:
    """List the names that ``load_from_file`` takes instead of a path."""
    return sorted(path.relative_to(HOME).with_suffix("").as_posix() for path in HOME.glob("*/*.safetensors"))


def find_weights(name: str) -> Path | None:
    """Return the file of shipped weights; None where no weights have that name."""
    return HOME / f"{name}.safetensors" if name in list_weights() else None
