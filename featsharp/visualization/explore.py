"""One picture's features to look at from several sides: pairs of pictures, low resolution and sharp, in one scale."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.errors import InputError
from featsharp.memory import PeakMeter
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.similarity import cosine_map, self_similarity, similarity_picture

Result = TypeVar("Result")
# RGB [3, h, w] and [3, H, W] in [0, 1].
PicturePair = tuple[Tensor, Tensor]
# Colours of clusters that can be told apart, also by the colour-blind (after Okabe and Ito), and their tints.
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233), (213, 94, 0),
    (60, 60, 60), (127, 184, 216), (242, 207, 127), (127, 206, 185), (229, 188, 211), (247, 241, 160), (170, 217, 244),
    (234, 174, 127), (170, 170, 170),
)  # fmt: skip
KMEANS_STEPS = 30


class Cost(NamedTuple):
    """Cost of a computation: seconds, and the bytes of its tensors at their peak."""

    seconds: float
    peak: int

    def __str__(self) -> str:
        """Format as "0.21 s, 35 MiB"."""
        return f"{self.seconds:.2f} s, {self.peak / 2**20:.0f} MiB"


class Exploration(NamedTuple):
    """Features of a picture: both maps [1, C, h, w] in the named backbone's space, on the CPU, float32; their costs."""

    backbone: str
    image: Image
    low_res: Tensor
    high_res: Tensor
    low_res_cost: Cost
    high_res_cost: Cost


@torch.no_grad()
def explore(encoder: SharpEncoder, image: Image) -> Exploration:
    """Compute features of an RGB picture; of several maps on top of each other (S2) the last one is kept.

    The cost of the low-resolution map is that of the backbone alone, that of the sharp map holds everything.
    """
    prepared = encoder.prepare_image(image)
    whitened = encoder.input_conditioner(prepared.pixels).to(encoder.device)
    low_res_size = prepared.low_res_size or encoder.low_res_size((whitened.shape[2], whitened.shape[3]))
    _, low_res_cost = measure(lambda: encoder.backbone(resize(whitened, low_res_size)).features.cpu())
    (low_res, high_res), high_res_cost = measure(
        lambda: [one.float().cpu() for one in encoder.encode_image(image)[:2]]  # waits for a GPU
    )
    high_res = high_res[:, -encoder.embed_dim :]
    return Exploration(encoder.backbone.name, image, low_res, high_res, low_res_cost, high_res_cost)


def measure(function: Callable[[], Result]) -> tuple[Result, Cost]:
    """Call a function; returns its result and what it cost."""
    start = time.perf_counter()
    with PeakMeter() as meter:
        result = function()
    return result, Cost(time.perf_counter() - start, meter.peak)


def pca_pictures(features: Exploration) -> PicturePair:
    """Draw three principal components, in the basis of the low-resolution map."""
    colours = FeaturePCA(features.low_res)
    return colours(features.low_res)[0], colours(features.high_res)[0]


def similarity_pictures(features: Exploration, at: tuple[float, float]) -> PicturePair:
    """Draw the cosines of each map with its own feature at a point (y, x) from 0 to 1, dark for 0 and less."""
    low_res, high_res = (self_similarity(one, at) for one in (features.low_res, features.high_res))
    return similarity_picture(low_res, (0.0, 1.0)), similarity_picture(high_res, (0.0, 1.0))


def vector_pictures(features: Exploration, vector: Tensor) -> tuple[PicturePair, tuple[float, float]]:
    """Draw the cosines with a vector [C], such as a text; returns the least and most of the low-resolution map too."""
    low_res, high_res = (cosine_map(one, vector[None])[0, 0] for one in (features.low_res, features.high_res))
    limits = (low_res.min().item(), low_res.max().item())
    return (similarity_picture(low_res, limits), similarity_picture(high_res, limits)), limits


def cluster_pictures(features: Exploration, count: int) -> PicturePair:
    """Draw each feature in the colour of its cluster; the clusters are those of the low-resolution map."""
    if not 2 <= count <= len(COLOURS):
        raise InputError(f"the number of clusters is from 2 to {len(COLOURS)}; got {count}")
    centres = fit_kmeans(features.low_res[0].flatten(1).T, count)
    palette = torch.tensor(COLOURS, dtype=torch.float32) / 255
    low_res, high_res = (
        palette[cosine_map(one, centres)[0].argmax(0)].permute(2, 0, 1) for one in (features.low_res, features.high_res)
    )
    return low_res, high_res


def fit_kmeans(vectors: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Fit centres to vectors by cosine (spherical k-means, k-means++ start).

    Args:
        vectors: [N, C], at least ``count``.
        count: K.
        seed: Of the start.

    Returns:
        [K, C], of length 1.

    Raises:
        InputError: For fewer vectors.
    """
    if len(vectors) < count:
        raise InputError(f"{count} clusters need as many features; got {len(vectors)}")
    generator = torch.Generator().manual_seed(seed)
    points = F.normalize(vectors.float().cpu(), dim=1)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        distances = (1 - (points @ centres.T).amax(1)).clamp(min=1e-9)  # some chance for each where all are alike
        centres = torch.cat([centres, points[torch.multinomial(distances, 1, generator=generator)]])
    for _ in range(KMEANS_STEPS):
        labels = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        # A centre without points stays where it is.
        moved = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def show(picture: Tensor, image: Image, side: int) -> Tensor:
    """Enlarge [3, h, w] with visible cells to the shape of an image whose longer side has ``side`` pixels."""
    scale = side / max(image.size)
    size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    return F.interpolate(picture[None], size, mode="nearest")[0]
