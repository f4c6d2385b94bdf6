"""Files of weights that others published and this package can fetch by name: addresses, licences, hashes."""

import hashlib
import logging
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from featsharp.errors import CheckpointError
from featsharp.files import cache_folder, replacing
from featsharp.urls import redact_url

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
TIMEOUT = 60.0  # seconds without a byte

LOFTUP = "https://huggingface.co/haiwen/{}/resolve/main/pytorch_model.bin"


@dataclass(frozen=True)
class PublishedFile:
    """One file of weights.

    Attributes:
        kind: Of ``featsharp.load_published``.
        address: To fetch it from.
        licence: Of the weights.
        backbone: That it is for, in words.
        sha256: Hex digest of its bytes; None where nobody has stated one: then the first download is recorded.
    """

    kind: str
    address: str
    licence: str
    backbone: str
    sha256: str | None = None


PUBLISHED = {
    "naf_release": PublishedFile(
        "naf", "https://github.com/valeoai/NAF/releases/download/model/naf_release.pth", "Apache-2.0", "any"
    )
} | {
    name: PublishedFile("loftup", LOFTUP.format(name), "MIT", backbone)
    for name, backbone in {
        "loftup-dinov2s": "DINOv2 ViT-S/14",
        "loftup-dinov2s_reg": "DINOv2 ViT-S/14 with registers",
        "loftup-dinov2b": "DINOv2 ViT-B/14",
        "loftup-dinov2b_reg": "DINOv2 ViT-B/14 with registers",
        "loftup-clip": "CLIP ViT-B/16, projected dense tokens",
        "loftup-siglip": "SigLIP ViT-B/16",
        "loftup-siglip2": "SigLIP 2 ViT-B/16",
    }.items()
}


def fetch_published(name: str, file: PublishedFile, folder: Path | None = None) -> Path:
    """Fetch a file unless it is there already, and check its hash.

    At the first download the hash is written beside the file and logged with the address and the licence; from then on
    the file has to have it.

    Args:
        name: Of the file in the folder.
        file: Where to get it.
        folder: To keep it in; None: ``published`` in the cache folder of this package.

    Raises:
        CheckpointError: When it cannot be fetched, or has another hash than the stated or recorded one.
    """
    path = (cache_folder() / "published" if folder is None else folder) / name
    record = path.with_name(f"{name}.sha256")
    recorded = record.read_text(encoding="ascii").strip() if record.is_file() else None
    expected = file.sha256 or recorded
    if path.is_file():
        _check(path, _digest(path), expected)
        return path
    try:
        with urllib.request.urlopen(file.address, timeout=TIMEOUT) as source, replacing(path) as target:
            digest = hashlib.sha256()
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
            # Before it gets its name.
            _check(redact_url(file.address), digest.hexdigest(), expected)
        if recorded is None:
            with replacing(record) as note:
                note.write(f"{digest.hexdigest()}\n".encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot fetch {redact_url(file.address)} to {path} ({error}); get it in another way and give its path"
        ) from error
    logger.warning(
        "fetched %s for backbone %s, licence %s, sha256 %s%s",
        redact_url(file.address),
        file.backbone,
        file.licence,
        digest.hexdigest(),
        "" if expected else " (recorded now: nobody has stated one)",
    )
    return path


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(place: object, digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise CheckpointError(
            f"{place} has sha256 {digest} instead of {expected}; it was changed or damaged. Delete the file and the "
            "one with .sha256 behind its name to fetch it anew"
        )
