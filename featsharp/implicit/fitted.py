"""A fit, finished or not: features of its image at any resolution, and its file."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.checkpoint import FileKind, read_checkpoint, restoring
from featsharp.device import usual_defaults
from featsharp.errors import CheckpointError, InputError
from featsharp.implicit.network import ImplicitNetwork
from featsharp.implicit.projection import Projection
from featsharp.ops.resize import resize, size_of

FIT_FILE = FileKind(
    "featsharp-fit", 1, ("backbone", "picture", "settings", "model", "training"), "a fit to one image", "featsharp fit"
)

# Points that the network evaluates at once: about 60 MB.
POINTS_AT_ONCE = 2**14


class ImplicitFeatures(nn.Module):
    """Sharp features of one image, as a function that can be evaluated at any size.

    Args:
        network: Fitted to the image.
        projection: Of the backbone's channels to those of the network.
        image: [3, H, W] uint8, the image as it was fitted.
        base: [1, K, h, w] that the network adds to: the projected features of the backbone, or zeros.
        render: Cells per token and axis of the map that is fitted.
    """

    image: Tensor
    base: Tensor

    def __init__(
        self, network: ImplicitNetwork, projection: Projection, image: Tensor, base: Tensor, render: int
    ) -> None:
        super().__init__()
        self.render = render
        self.network = network
        self.projection = projection
        self.register_buffer("image", image)
        self.register_buffer("base", base)

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels at which the image was fitted."""
        return self.image.shape[-2], self.image.shape[-1]

    @property
    def fitted_size(self) -> tuple[int, int]:
        """(h, w) in cells of the map that is fitted."""
        return self.base.shape[-2] * self.render, self.base.shape[-1] * self.render

    def guide(self, size: tuple[int, int]) -> Tensor:
        """Resize the image: [1, 3, h, w] in [0, 1]."""
        return resize(self.image[None].float() / 255, size)

    def components(self, guide: Tensor) -> Tensor:
        """Compute the map before it is projected back: [1, K, H, W], for the image ``guide`` [1, 3, H, W] in [0, 1]."""
        return self.network(guide) + resize(self.base, size_of(guide))

    @torch.no_grad()
    def features(self, size: tuple[int, int] | None = None, points: int = POINTS_AT_ONCE) -> Tensor:
        """Compute the features of the whole image, in the backbone's space.

        Args:
            size: (H, W) in cells; None: one per pixel of the fitted image. Spatial detail ends at the fitted
                resolution: a larger map is smoother, not sharper, except along edges of colour.
            points: Cells that the network evaluates at once.

        Returns:
            [1, C, H, W] float32, on the device of the module.
        """
        size = size or self.image_size
        if min(size) < 1:
            raise InputError(f"a map has at least 1x1 cells; got {size[0]}x{size[1]}")
        # Evaluated at its cells, a small map would be a sampling of a finer one without antialias: shrink that instead.
        height, width = (max(pair) for pair in zip(size, self.fitted_size, strict=True))
        guide = self.guide((height, width))
        components = resize(self.base, (height, width))
        if components is self.base:
            components = components.clone()
        rows = max(1, points // width)
        training = self.network.training
        self.network.eval()
        for top in range(0, height, rows):
            components[:, :, top : top + rows] += self.network(guide[:, :, top : top + rows], top, height)
        self.network.train(training)
        return self.projection.restore(resize(components, size))

    def model_state(self) -> dict[str, Tensor]:
        """Collect all tensors, on the CPU."""
        return {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], render: int) -> "ImplicitFeatures":
        """Rebuild from :meth:`model_state`; a tensor that is missing, misshapen or not finite is a ValueError."""
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{key} is no tensor")
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{key} holds NaN or infinite values")
        try:
            network = ImplicitNetwork(
                len(state["network.layer_out.bias"]), state["network.frequencies"], state["network.colour_range"]
            )
            projection = Projection(state["projection.mean"], state["projection.basis"], state["projection.scale"])
            fitted = cls(network, projection, state["image"], state["base"], render)
            fitted.load_state_dict(state)
        except KeyError as error:
            raise ValueError(f"it lacks {error.args[0]}") from error
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[-1].strip()) from error
        return fitted


def load_fit(path: str | PathLike[str]) -> ImplicitFeatures:
    """Load NAME.pth of ``featsharp fit``; the backbone is not needed.

    Returns:
        The fit on the CPU, without gradients.

    Raises:
        CheckpointError: When the file is missing, damaged, of another kind, or unsafe.

    Example:
        >>> load_fit("fits/photo.pth").features((512, 512))  # doctest: +SKIP
    """
    with restoring(path):
        return build_fitted(read_checkpoint(path, FIT_FILE), path).eval()


@usual_defaults()
def build_fitted(content: Mapping[str, Any], path: object) -> ImplicitFeatures:
    """Build the fit from the content of a file."""
    try:
        # Initial weights, which are replaced, must not change the caller's random state.
        with torch.random.fork_rng(devices=[]):
            return ImplicitFeatures.from_state(content["model"], content["settings"]["render"]).requires_grad_(False)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the fit {path} is damaged: {error}") from error
