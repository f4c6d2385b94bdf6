"""Cache keys: text that changes when an encoder, a file or a setting does."""

import hashlib
import json
from pathlib import Path

from featsharp import __version__
from featsharp.builder import content_key
from featsharp.model import SharpEncoder


def encoder_key(encoder: SharpEncoder) -> str:
    """Hash an encoder's content, autocast, classes and our version: the key changes when the features do.

    Code of the user is not part of it: neither that of a function of a custom upsampler, nor weights behind a function
    of a custom backbone.
    """
    backbone = encoder.backbone
    kinds = [type(backbone).__qualname__, repr(encoder.upsampler), repr(encoder.normalizer), __version__]
    return digest(content_key(encoder), str(backbone.autocast_dtype), kinds)


def file_key(root: Path, name: str) -> tuple[str, int, int]:
    """Return name, length and time of a file, which is not read; a missing one has length and time 0."""
    try:
        status = (root / name).stat()
    except OSError:
        return name, 0, 0
    return name, status.st_size, status.st_mtime_ns


def digest(*parts: object) -> str:
    """Hash JSON values to 32 characters."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
