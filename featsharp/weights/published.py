"""Files of weights that others published and this package can fetch by name: addresses, licences, hashes."""

import hashlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from featsharp.errors import CheckpointError, FeatSharpError, MissingDependencyError
from featsharp.files import cache_folder, replacing, write_file
from featsharp.urls import redact_url
from featsharp.weights.hub import fetch_file, find_file

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
TIMEOUT = 60.0  # seconds without a byte

RELEASE = "https://github.com/{}/releases/download/{}/{}"
HUB = "https://huggingface.co/"
HUB_FILE = HUB + "{}/resolve/main/{}"
FEATUP = (
    "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained/{}_jbu_stack_cocostuff.ckpt"
)


@dataclass(frozen=True)
class PublishedFile:
    """One file of weights.

    Attributes:
        kind: Of ``featsharp.load_published``.
        address: To fetch it from.
        licence: Of the weights.
        backbone: That it is for, in words.
        authors: Whom to name, as the owner of the repository.
        sha256: Hex digest of its bytes; None where nobody has stated one: that of the first use is recorded.
    """

    kind: str
    address: str
    licence: str
    backbone: str
    authors: str = ""
    sha256: str | None = None


def _published() -> Iterator[tuple[str, PublishedFile]]:
    """Yield name and file; the order is that of ``featsharp ls weights``."""
    for name, tag in (("anyup_paper", "checkpoint"), ("anyup_multi_backbone", "checkpoint_v2")):
        address = RELEASE.format("wimmerth/anyup", tag, f"{name}.pth")
        yield name, PublishedFile("anyup", address, "CC-BY-4.0", "any", "wimmerth/anyup")
    for model, backbone in {
        "vit_base_patch16_224.dino": "DINO ViT-B/16",
        "vit_base_patch16_224": "ViT-B/16",
        "vit_small_patch14_dinov2.lvd142m": "DINOv2 ViT-S/14",
        "vit_base_patch14_dinov2.lvd142m": "DINOv2 ViT-B/14",
        "vit_small_patch14_reg4_dinov2": "DINOv2 ViT-S/14 with registers",
        "vit_base_patch16_clip_384": "CLIP ViT-B/16, 384 pixels",
        "vit_base_patch16_siglip_512.v2_webli": "SigLIP 2 ViT-B/16, 512 pixels",
        "vit_small_plus_patch16_dinov3.lvd1689m": "DINOv3 ViT-S+/16",
    }.items():
        address = RELEASE.format("PaulCouairon/JAFAR", "Weights", f"{model}.pth")
        yield f"jafar-{model}", PublishedFile("jafar", address, "Apache-2.0", backbone, "PaulCouairon/JAFAR")
    for name, backbone in {
        "loftup-dinov2s": "DINOv2 ViT-S/14",
        "loftup-dinov2s_reg": "DINOv2 ViT-S/14 with registers",
        "loftup-dinov2b": "DINOv2 ViT-B/14",
        "loftup-dinov2b_reg": "DINOv2 ViT-B/14 with registers",
        "loftup-clip": "CLIP ViT-B/16, projected dense tokens",
        "loftup-siglip": "SigLIP ViT-B/16",
        "loftup-siglip2": "SigLIP 2 ViT-B/16",
    }.items():
        address = HUB_FILE.format(f"haiwen/{name}", "pytorch_model.bin")
        yield name, PublishedFile("loftup", address, "MIT", backbone, f"haiwen/{name}")
    address = RELEASE.format("valeoai/NAF", "model", "naf_release.pth")
    yield "naf_release", PublishedFile("naf", address, "Apache-2.0", "any", "valeoai/NAF")
    for name, backbone in {"uplift_dinov2-s14": "DINOv2 ViT-S/14", "uplift_dinov3-splus16": "DINOv3 ViT-S+/16"}.items():
        repository = f"UPLiFT-upsampler/{name}"
        address = HUB_FILE.format(repository, f"{name}.safetensors")
        yield name, PublishedFile("uplift", address, "MIT", backbone, repository)
    for model, backbone in {
        "dino16": "DINO ViT-S/16",
        "dinov2": "DINOv2 ViT-S/14",
        "clip": "CLIP ViT-B/16",
        "vit": "ViT-S/16",
        "resnet50": "ResNet-50",
    }.items():
        for name, path in ((f"featup-{model}", model), (f"featup-{model}-no-norm", f"no_norm/{model}")):
            yield name, PublishedFile("featup", FEATUP.format(path), "MIT", backbone, "mhamilton723/FeatUp")


PUBLISHED = dict(_published())


def fetch_published(name: str, file: PublishedFile, folder: Path | None = None) -> Path:
    """Fetch a file unless it is there already, and check its hash.

    Address, licence and authors are logged before anything is fetched. Files of the Hub go to its cache, through
    huggingface_hub; others to torch.hub's, under another name until they are whole. At the first use the hash is
    logged and written to ``published`` in the cache folder of this package; from then on the file has to have it.
    What was put there by hand comes first. Under HF_HUB_OFFLINE nothing is fetched from anywhere.

    Args:
        name: Of the file in the folder, and of the record of its hash.
        file: Where to get it.
        folder: To keep file and record in; None: as above.

    Raises:
        CheckpointError: When it cannot be fetched, or has another hash than the stated or recorded one.
        MissingDependencyError: For a file of the Hub, without huggingface_hub.
    """
    known, record = _known_hash(name, file, folder), _record(name, folder)
    path = _find(name, file, folder)
    fetched = path is None
    if path is None:
        logger.warning(
            "%s: weights by %s for backbone %s, licence %s, from %s",
            *(name, file.authors or "others", file.backbone, file.licence, redact_url(file.address)),
        )
        if folder is None and file.address.startswith(HUB):
            path = fetch_file(**_in_repository(file.address))
        else:
            path = _place(name, file, folder)
            _fetch(file.address, path, known, record)
    digest = hash_file(path)
    # The Hub's cache has links, which would be made anew without a download.
    _check(path.resolve(), digest, known, f"delete it{'' if file.sha256 else f' and its record {record}'}")
    if known is None:
        try:
            write_file(record, f"{digest}\n".encode())
        except FeatSharpError as error:
            logger.warning("%s: sha256 %s is not recorded: %s", name, digest, error)
            return path
    if known is None or fetched:
        logger.warning("%s: sha256 %s%s", name, digest, "" if known else " (recorded now: nobody has stated one)")
    return path


def is_fetched(name: str) -> bool:
    """Return whether a published file is on this machine."""
    try:
        return _find(name, PUBLISHED[name], None) is not None
    except MissingDependencyError:
        return False


def known_hash(name: str) -> str | None:
    """Return the SHA-256 of a published file, stated or recorded at its first use here; None: not known yet."""
    return _known_hash(name, PUBLISHED[name], None)


def refuse_published(name: str) -> None:
    """Raise CheckpointError with the way to load it for a name of published weights, which no checkpoint has."""
    if name in PUBLISHED:
        kind = PUBLISHED[name].kind
        raise CheckpointError(
            f"{name} is no checkpoint but weights of {PUBLISHED[name].authors}: in Python, load_published({kind!r}, "
            f"{name!r}, BACKBONE) loads them, and save_checkpoint(encoder, FILE) makes a checkpoint for commands"
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_hash(name: str, file: PublishedFile, folder: Path | None) -> str | None:
    record = _record(name, folder)
    return file.sha256 or (record.read_text(encoding="ascii").strip() if record.is_file() else None)


def _record(name: str, folder: Path | None) -> Path:
    return (folder or cache_folder() / "published") / f"{name}.sha256"


def _place(name: str, file: PublishedFile, folder: Path | None) -> Path:
    """Return the path of a file that is not of the Hub; authors give several files one name, so ours are longer."""
    if folder is not None:
        return folder / name
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints" / f"featsharp-{name}{Path(file.address).suffix}"


def _find(name: str, file: PublishedFile, folder: Path | None) -> Path | None:
    """Find a file on this machine."""
    given = (folder or cache_folder() / "published") / name
    if given.is_file():
        return given
    if folder is None and file.address.startswith(HUB):
        return find_file(**_in_repository(file.address))
    path = _place(name, file, folder)
    return path if path.is_file() else None


def _in_repository(address: str) -> dict[str, str]:
    """Take the address of a file of the Hub apart."""
    repository, _, rest = address.removeprefix(HUB).partition("/resolve/")
    revision, _, name = rest.partition("/")
    return {"repository": repository, "name": name, "revision": revision}


def _fetch(address: str, path: Path, expected: str | None, record: Path) -> None:
    """Fetch a file, which gets its name when it is whole and right."""
    place = redact_url(address)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it
    if offline and not address.startswith("file:"):
        raise CheckpointError(f"there is no {path}, and HF_HUB_OFFLINE forbids to fetch {place}; put the file there")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as source, replacing(path) as target:
            digest, size = hashlib.sha256(), 0
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
                size += len(block)
            announced = source.headers.get("Content-Length")
            if announced is not None and size != int(announced):
                raise OSError(f"connection lost after {size} of {announced} bytes")
            _check(place, digest.hexdigest(), expected, f"delete the record {record}")  # before it gets its name
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"cannot fetch {place} to {path} ({error}); get it in another way and give its path"
        ) from error


def _check(place: object, digest: str, expected: str | None, advice: str) -> None:
    if expected is not None and digest != expected:
        raise CheckpointError(
            f"{place} has sha256 {digest} instead of {expected}; it was changed or damaged. To take what is "
            f"published now, {advice}"
        )
