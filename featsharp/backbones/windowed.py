"""A backbone of one size on images of any size: windows of its size, their features put together."""

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.backbones.wrapped import WrappedBackbone
from featsharp.errors import ConfigError
from featsharp.ops.resize import resize, size_of
from featsharp.ops.tiling import blend_windows, window_starts

# Part of a window that neighbours share at least, so that their seams can be blended.
OVERLAP = 0.25
# Windows that go through the backbone in one call: more are no faster, and SAM's take a gigabyte each.
WINDOWS_AT_ONCE = 8


class WindowedBackbone(WrappedBackbone):
    """Covers an image with the fewest windows of the native size, spread evenly, and blends them where they overlap.

    A few windows go through the backbone at a time, so that large images need no more memory than small ones but for
    the map. The summary is that of the whole image, resized. An image smaller than the native size is refused:
    :meth:`fit_size` names the size to enlarge it to.

    Args:
        backbone: One that takes its native size only.

    Raises:
        ConfigError: For a backbone that takes other sizes by itself.
    """

    def __init__(self, backbone: Backbone) -> None:
        if backbone.flexible:
            raise ConfigError(
                f"backbone {backbone.name!r} takes images of other sizes by itself; leave out other_sizes=tile"
            )
        super().__init__(backbone, flexible=True)
        self.embeds_patches = False  # a window would cut patches that were laid side by side

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest whole patches, at least the native size on each side."""
        fitted = Backbone.fit_size(self, height, width)
        return max(fitted[0], self.input_size[0]), max(fitted[1], self.input_size[1])

    def extract(self, images: Tensor) -> BackboneOutput:
        window, size = self.grid_size(self.input_size), self.grid_size(size_of(images))
        if size == window:
            return self.backbone(images)
        p, (height, width) = self.patch_size, self.input_size
        rows, cols = (
            window_starts(length, side, int(OVERLAP * side)) for length, side in zip(size, window, strict=True)
        )
        windows = [images[..., p * y : p * y + height, p * x : p * x + width] for y in rows for x in cols]
        batches = torch.stack(windows, 1).flatten(0, 1).split(WINDOWS_AT_ONCE)
        features = torch.cat([self.backbone(batch).features for batch in batches])
        summary = None
        if self.summary_dim is not None:
            summary = self.backbone(resize(images, self.input_size)).summary
        return BackboneOutput(blend_windows(features, (rows, cols), size), summary)
