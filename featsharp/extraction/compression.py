"""Fewer numbers a cell: principal components of features, fitted once on a sample of the pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from featsharp.device import to_double
from featsharp.errors import DataError
from featsharp.files import write_file

SAMPLE_PICTURES = 64
SAMPLE_CELLS = 1024  # of each picture
SAMPLE_VECTORS = 10  # pooled ones, for each component


class PCA(NamedTuple):
    """A basis: ``mean`` [C], ``components`` [N, C], ``explained`` [N], the share of the variance of each."""

    mean: Tensor
    components: Tensor
    explained: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Project features [B, C, ...] to [B, N, ...]."""
        mean, components = (x.to(features) for x in (self.mean, self.components))
        shift = (components @ mean).view(1, -1, *[1] * (features.ndim - 2))
        return torch.einsum("bc...,nc->bn...", features, components) - shift

    def restore(self, projected: Tensor) -> Tensor:
        """Compute the nearest features [B, C, ...] of projected ones [B, N, ...]."""
        mean, components = (x.to(projected) for x in (self.mean, self.components))
        return torch.einsum("bn...,nc->bc...", projected, components) + mean.view(1, -1, *[1] * (projected.ndim - 2))


def fit_pca(path: Path, count: int, sample: Callable[[], Iterator[Tensor]]) -> PCA:
    """Load the basis of a store, or fit and save it.

    Args:
        path: Of its file. Processes that fit it at the same time fit the same one.
        count: Components N.
        sample: Yields features [1, C, H, W] or [1, C] of pictures.

    Raises:
        DataError: For a damaged file, or fewer features than components.
    """
    if path.exists():
        try:
            # Copies lie as new tensors do: torch rounds products otherwise at another alignment in memory.
            return PCA(**{name: tensor.clone() for name, tensor in load_file(path).items()})
        except (OSError, SafetensorError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); use another folder for the store") from error
    cells = torch.cat([torch.empty(0), *map(_cells, sample())])
    if len(cells) <= count:
        raise DataError(
            f"{count} principal components need more than the {len(cells)} features of these pictures; give more "
            "pictures, or take fewer components"
        )
    mean = cells.mean(0)
    covariance = (cells - mean).T @ (cells - mean) / len(cells)
    values, vectors = torch.linalg.eigh(covariance)
    components = vectors.T.flip(0)[:count]
    # The sign is free: the largest weight is positive.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    explained = values.flip(0)[:count] / values.sum()
    basis = PCA(mean.float(), components.float().contiguous(), explained.float())
    write_file(path, save(basis._asdict()))
    return basis


def _cells(features: Tensor) -> Tensor:
    """Features [1, C, ...] of cells spread over a map, [N, C] float64, without those that are not finite."""
    cells = features[0].flatten(1).T if features.ndim > 2 else features
    cells = to_double(cells[:: -(-len(cells) // SAMPLE_CELLS)])
    return cells[cells.isfinite().all(1)]
