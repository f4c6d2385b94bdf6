"""Backbone passes that are not run twice: a training that sees its samples again reads their features from disk.

Most of a step on a CPU is the frozen backbone. With a limited number of samples (``feature_cache.samples``) every
epoch but the first one skips it. A file is named after the content of its image, so whatever changes (data, seed,
views) has other files, and runs with other upsamplers or rates share one folder.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.files import remove_leftovers, write_file
from featsharp.training.wrapped import WrappedBackbone


class CachedBackbone(WrappedBackbone):
    """A backbone that keeps the features of each image as a file, in half precision, and reads them from there.

    Features beyond the range of half precision are kept as they are. The files of other weights, feature options or
    autocast types lie beside each other. A damaged file is written again.

    Args:
        backbone: Computes what no file has.
        folder: Of the files; made where it does not exist.
    """

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        super().__init__(backbone)
        settings = f"{backbone.name}|{sorted(backbone.feature_options.items())}|{backbone.autocast_dtype}"
        tag = hashlib.sha256(f"{backbone.weights_hash()}|{settings}".encode()).hexdigest()[:16]
        self.folder = folder / tag
        remove_leftovers(self.folder, older_than=3600)

    def extract(self, images: Tensor) -> BackboneOutput:
        paths = [self.folder / f"{_digest(image, self.autocast_dtype)}.safetensors" for image in images]
        kept = [_read(path) for path in paths]
        missing = [i for i, tensors in enumerate(kept) if tensors is None]
        if missing:
            # All of the batch, as the last bits may depend on what else is in it: a run that was killed between two
            # files must write the very features that an uninterrupted one wrote.
            fresh = self.backbone.extract(images)
            for i in missing:
                kept[i] = _write(paths[i], fresh.features[i], None if fresh.summary is None else fresh.summary[i])
        whole = [tensors for tensors in kept if tensors is not None]

        def stack(name: str) -> Tensor:
            return torch.stack([tensors[name].to(images) for tensors in whole])

        return BackboneOutput(stack("features"), stack("summary") if "summary" in whole[0] else None)


def _digest(image: Tensor, wished: torch.dtype | None) -> str:
    """A name for the content of [3, H, W], and for an autocast of the caller, under which features are others."""
    device = image.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    about = f"{tuple(image.shape)}{image.dtype}{'' if autocast in (None, wished) else autocast}"
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, features: Tensor, summary: Tensor | None) -> dict[str, Tensor]:
    """Keep one image's features; returns what will be read."""
    from safetensors.torch import save

    tensors = {"features": features} if summary is None else {"features": features, "summary": summary}
    tensors = {name: _halved(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors))
    return tensors


def _halved(x: Tensor) -> Tensor:
    half = x.half()
    return half if torch.isfinite(half).all() else x
