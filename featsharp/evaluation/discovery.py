"""Object discovery: is there one object that the features alone set apart, and is its box right?

Two rules on the graph of a sharp map's cells, whose features have the mean of their picture taken off. (The sources
take the keys of the last layer, which are not part of a map.)

    tokencut    normalised cut (arXiv 2202.11539): cells are joined by 1 where their cosine is above tau, else by 1e-5;
                the second eigenvector is cut at its mean; the side with its largest entry is the object
    lost        LOST (arXiv 2109.14279): the cell that is alike to fewest others is the seed; of the cells with fewest,
                a ninth, those alike to the seed vote; what is alike to their sum is the object

The object is the connected part around the seed. CorLoc is the share of pictures whose box overlaps that of
one of their objects by one half of the union or more; that of the whole picture as the box stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from featsharp.errors import InputError, MissingDependencyError
from featsharp.evaluation.estimates import estimate_mean
from featsharp.evaluation.features import sharp_features
from featsharp.evaluation.objects import ObjectTask, mask_box, overlap
from featsharp.evaluation.runner import Item, Row, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import size_of
from featsharp.settings import setting

# TokenCut: weight of cells that are not alike. LOST: share of cells that may vote (100 of about 900).
FAINT, VOTERS = 1e-5, 1 / 9
# Both compare all cells with all: matrices of 0.5 GiB. Of the eigen-solver: restarts; a usual picture needs a few.
MOST_CELLS, RESTARTS = 8192, 100


@dataclass
class DiscoveryTask(ObjectTask):
    """Unsupervised discovery of one object per picture by TokenCut and LOST, by CorLoc."""

    name: ClassVar[str] = "discovery"

    tau: float = setting(0.2, "TokenCut's least cosine of cells that are alike", type=float, metavar="X")

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        image, objects = self.read(item)
        features = sharp_features(encoder, image, self.low_res_size)
        cells = size_of(features)
        if cells[0] * cells[1] > MOST_CELLS:
            raise InputError(
                f"a map of {cells[0]}x{cells[1]} cells is too large to compare all with all; at most {MOST_CELLS}: "
                "give a smaller --low-res-size or a smaller factor"
            )
        flat = features[0].flatten(1).T
        vectors = (flat - flat.mean(0)).double().cpu().numpy()
        scale = np.array([image.height / cells[0]] * 2 + [image.width / cells[1]] * 2)
        boxes = {
            "tokencut": mask_box(cut_object(vectors, cells, self.tau)) * scale,
            "lost": mask_box(find_object(vectors, cells)) * scale,
            "whole": np.array([0, image.height, 0, image.width]),
        }
        truths = [mask_box(one.mask) for one in objects]
        return {
            f"corloc_{name}": int(max(overlap(box, truth) for truth in truths) >= 0.5) for name, box in boxes.items()
        }

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        return {name: estimate_mean([row[name] for row in rows]) for name in rows[0]}


def cut_object(vectors: np.ndarray, cells: tuple[int, int], tau: float = 0.2) -> np.ndarray:
    """Find the object of a picture by normalised cut, [h, w] bool, from vectors [hw, C] float64."""
    unit = F.normalize(torch.from_numpy(vectors), dim=1).numpy()
    entries = second_eigenvector(np.where(unit @ unit.T > tau, 1.0, FAINT))
    seed = int(np.abs(entries).argmax())
    above = entries > entries.mean()
    return connected(above == above[seed], seed, cells)


def second_eigenvector(weights: np.ndarray) -> np.ndarray:
    """Solve (D - W) y = x D y for the second smallest x, D the sums of the rows of W [n, n], symmetric: y [n].

    Raises:
        InputError: Where the solver does not converge.
        MissingDependencyError: Without scipy.
    """
    try:
        from scipy.sparse.linalg import ArpackError, eigsh
    except ImportError as error:
        raise MissingDependencyError('a cut needs the package scipy; run: pip install "featsharp[eval]"') from error
    root = np.sqrt(weights.sum(1))
    # The smallest of the Laplacian are the largest of this matrix, to which Lanczos converges without a solver.
    matrix, start = weights / root[:, None] / root, np.linspace(1, 2, len(root))
    try:
        _, vectors = eigsh(matrix, k=2, which="LA", v0=start, maxiter=RESTARTS)
    except ArpackError as error:
        raise InputError(f"the normalised cut of {len(root)} cells was not found: {error}") from error
    entries: np.ndarray = vectors[:, 0] / root
    return entries


def find_object(vectors: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """Find the object of a picture by LOST, [h, w] bool, from vectors [hw, C]."""
    alike = vectors @ vectors.T
    order = np.argsort((alike > 0).sum(1), kind="stable")
    voters = order[: max(1, round(VOTERS * len(order)))]
    voters = voters[alike[order[0], voters] > 0]
    return connected(alike[voters].sum(0) > 0, int(order[0]), cells)


def connected(inside: np.ndarray, seed: int, cells: tuple[int, int]) -> np.ndarray:
    """Return the part [h, w] of a set of cells [hw] that hangs together with the seed, which is in it."""
    from scipy.ndimage import label

    mask = inside.reshape(cells).copy()
    mask.flat[seed] = True
    parts, _ = label(mask)
    part: np.ndarray = parts == parts.flat[seed]
    return part
