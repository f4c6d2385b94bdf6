"""Cache keys: text that changes when an encoder, a file or a setting does."""

import hashlib
import json
from pathlib import Path

from featsharp import __version__
from featsharp.builder import content_key
from featsharp.model import SharpEncoder


def encoder_key(encoder: SharpEncoder) -> str:
    """Digest of an encoder's content, autocast, classes and our version: changes when its features do.

    Code of the user's is not part of it: not that of a function that an upsampler was made from, nor weights behind a
    function that a backbone was made from.
    """
    backbone = encoder.backbone
    kinds = [type(backbone).__qualname__, repr(encoder.upsampler), repr(encoder.normalizer), __version__]
    return digest(content_key(encoder), str(backbone.autocast_dtype), kinds)


def file_key(root: Path, name: str) -> tuple[str, int, int]:
    """Name, length and time of a file, which is not read; a missing one has length and time 0."""
    try:
        status = (root / name).stat()
    except OSError:
        return name, 0, 0
    return name, status.st_size, status.st_mtime_ns


def digest(*parts: object) -> str:
    """Digest of JSON values, 32 characters."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
