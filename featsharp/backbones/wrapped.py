"""Wrappers of backbones that change only how features are computed."""

from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput


class WrappedBackbone(Backbone):
    """A backbone with the features, sizes, name and hash of another.

    Args:
        backbone: The other one.
        flexible: Whether other sizes than the native one are taken; None: as it does.
    """

    def __init__(self, backbone: Backbone, *, flexible: bool | None = None) -> None:
        super().__init__(
            backbone.name,
            patch_size=backbone.patch_size,
            embed_dim=backbone.embed_dim,
            input_size=backbone.input_size,
            mean=backbone.mean,
            std=backbone.std,
            summary_dim=backbone.summary_dim,
            flexible=backbone.flexible if flexible is None else flexible,
        )
        self.backbone = backbone
        self.autocast_dtype = backbone.autocast_dtype
        self.embeds_patches = backbone.embeds_patches
        self.feature_options = dict(backbone.feature_options)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return self.backbone.extract(images)

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """See :meth:`Backbone.fit_size`."""
        return self.backbone.fit_size(height, width)

    def weights_hash(self) -> str:
        """Return the hash of the wrapped backbone."""
        return self.backbone.weights_hash()
