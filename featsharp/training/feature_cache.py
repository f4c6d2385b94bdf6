"""Cache of backbone features on disk, for training that repeats its samples.

Most of a step on a CPU is the frozen backbone. With a limited number of samples (``feature_cache.samples``) every
epoch but the first one skips it. A file is named after the content of its image, so other data, seeds or views have
other files, and runs with other upsamplers or learning rates share one folder.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.backbones.wrapped import WrappedBackbone
from featsharp.files import remove_leftovers, write_file


class CachedBackbone(WrappedBackbone):
    """A backbone that caches the features of each image in a file of ``folder``, in half precision.

    Features beyond the range of half precision keep their type. Other weights, feature options and autocast types have
    separate folders. A damaged file is written again.
    """

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        super().__init__(backbone)
        settings = f"{backbone.name}|{sorted(backbone.feature_options.items())}|{backbone.autocast_dtype}"
        tag = hashlib.sha256(f"{backbone.weights_hash()}|{settings}".encode()).hexdigest()[:16]
        self.folder = folder / tag
        remove_leftovers(self.folder, older_than=3600)

    def extract(self, images: Tensor) -> BackboneOutput:
        paths = [self.folder / f"{_digest(image, self.autocast_dtype)}.safetensors" for image in images]
        cached = [_read(path) for path in paths]
        missing = [i for i, tensors in enumerate(cached) if tensors is None]
        if missing:
            # The whole batch, as the last bits may depend on its other images: a run that was killed between two files
            # must write the same features as an uninterrupted one.
            fresh = self.backbone.extract(images)
            for i in missing:
                cached[i] = _write(paths[i], fresh.features[i], None if fresh.summary is None else fresh.summary[i])
        complete = [tensors for tensors in cached if tensors is not None]

        def stack(name: str) -> Tensor:
            return torch.stack([tensors[name].to(images) for tensors in complete])

        return BackboneOutput(stack("features"), stack("summary") if "summary" in complete[0] else None)


def _digest(image: Tensor, autocast_dtype: torch.dtype | None) -> str:
    """Hash the content of [3, H, W], and an autocast of the caller other than ``autocast_dtype``, the backbone's."""
    device = image.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    header = f"{tuple(image.shape)}{image.dtype}{'' if autocast in (None, autocast_dtype) else autocast}"
    digest = hashlib.blake2b(header.encode(), digest_size=16)
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
    """Write the features of one image; returns them as they will be read."""
    from safetensors.torch import save

    tensors = {"features": features} if summary is None else {"features": features, "summary": summary}
    tensors = {name: _halved(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors))
    return tensors


def _halved(x: Tensor) -> Tensor:
    half = x.half()
    return half if torch.isfinite(half).all() else x
