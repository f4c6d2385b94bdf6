"""Entries of ``torch.hub``: ``torch.hub.load("OWNER/REPOSITORY", "sharp_encoder", "dinov2-s", "tile", 2)``."""

from typing import Any

from featsharp.builder import SharpEncoder, create_encoder, load_from_file
from featsharp.published import load_published

dependencies = ["torch", "numpy", "PIL", "safetensors"]


def sharp_encoder(backbone: str, upsampler: str, factor: float | None = None, **options: Any) -> SharpEncoder:
    """Build an encoder that needs no training; arguments as for ``featsharp.create_encoder``."""
    return create_encoder(backbone, upsampler, factor, **options)


def pretrained(name: str = "vits14-focus/featsharp-2x", **options: Any) -> SharpEncoder:
    """Load weights that ship with the package, or a file; arguments as for ``featsharp.load_from_file``."""
    return load_from_file(name, **options)


def published(kind: str, name: str, backbone: str, **options: Any) -> Any:
    """Load weights of the authors of a method; arguments as for ``featsharp.load_published``."""
    return load_published(kind, name, backbone, **options)


def from_hub(repository: str, **options: Any) -> SharpEncoder:
    """Load a repository of the Hugging Face Hub; arguments as for ``SharpEncoder.from_pretrained``."""
    return SharpEncoder.from_pretrained(repository, **options)
