"""Trained weights that come with the package: BACKBONE/UPSAMPLER-FACTORx.safetensors, each with a model card."""

from pathlib import Path

HOME = Path(__file__).parent


def list_weights() -> list[str]:
    """List the names that ``load_from_file`` takes instead of a path."""
    return sorted(path.relative_to(HOME).with_suffix("").as_posix() for path in HOME.glob("*/*.safetensors"))
