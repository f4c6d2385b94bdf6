"""Feature maps as pictures: three principal components, in one basis for all maps to be compared."""

import torch
from torch import Tensor

from featsharp.errors import InputError


class FeaturePCA:
    """Projection of C-channel maps to RGB, fitted on [B, C, h, w] with C >= 3 and at least 4 positions, all finite.

    The basis and the colour range are those of the map it is fitted on, so colours of other maps are comparable. The
    range spans the 1st to 99th percentile of each component; the sign makes each component's largest weight positive.
    A component that varies by no more than rounding does, as on the map of a blank image, is drawn as 0.5.
    """

    def __init__(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] < 3 or features[:, 0].numel() < 4:
            raise InputError(f"PCA needs a [B, C, h, w] map with C >= 3 and 4 positions; got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise InputError("cannot draw features with NaN or infinite values")
        rows = features.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        self.mean = rows.mean(0)
        _, _, components = torch.linalg.svd(rows - self.mean, full_matrices=False)
        components = components[:3]
        strongest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components = components * strongest.sign()
        projected = (rows - self.mean) @ self.components.T
        self.low, self.high = torch.quantile(projected, rows.new_tensor([0.01, 0.99]), dim=0)
        # A component is a sum over channels, less the same sum over the mean.
        rounding = torch.finfo(rows.dtype).eps * rows.shape[1] ** 0.5 * rows.norm(dim=1).max()
        self.flat = self.high - self.low <= 8 * rounding

    def __call__(self, features: Tensor) -> Tensor:
        """Project [B, C, h, w] to RGB [B, 3, h, w] in [0, 1]."""
        # The mean is subtracted afterwards, without a copy of a map that may be large.
        projected = torch.einsum("bchw,kc->bkhw", features.detach().float(), self.components)
        projected -= (self.components @ self.mean)[:, None, None]
        spread = (self.high - self.low).clamp(min=1e-12)
        colours = ((projected - self.low[:, None, None]) / spread[:, None, None]).clamp(0, 1)
        colours[:, self.flat] = 0.5
        return colours
