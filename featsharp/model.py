"""The sharp encoder: image -> backbone -> normalizer -> bias buffer -> upsampler -> sharp features.

Convention:
    Images given to a sharp encoder are already whitened (``input_conditioner`` does it). Both feature maps cover the
    whole image whatever its size: nothing is cropped or padded, each axis is scaled on its own.
"""

import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.errors import ConfigError, InputError
from featsharp.layers.bias_buffer import BiasBuffer
from featsharp.memory import parse_memory
from featsharp.normalizers import Normalizer
from featsharp.ops.resize import resize, size_of
from featsharp.upsamplers.base import UpsampleFeatures, Upsampler, scale_length
from featsharp.upsamplers.chunked import Allocate, allocate_beside, upsample_within

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | PathLike[str] | Image

__all__ = ["InputConditioner", "SharpEncoder", "UpsampleFeatures"]


class InputConditioner(nn.Module):
    """Whitening of pixels in [0, 1], like torchvision's ``Normalize``: ``(x - mean) / std`` per channel.

    It warns once about input that looks whitened already (values outside of [0, 1]). It holds no tensors, so it works
    in the processes of a data loader whatever device the encoder is on.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self._warned = False

    def forward(self, images: Tensor) -> Tensor:
        """[..., 3, H, W] in [0, 1], floating point, to the same shape and dtype."""
        if not images.is_floating_point():
            raise InputError(f"input_conditioner takes pixels in [0, 1]; got {images.dtype}, divide by 255 first")
        # On a GPU the look at the values would make the host wait.
        if (
            not self._warned
            and images.device.type == "cpu"
            and images.numel()
            and (images.amin() < -0.01 or images.amax() > 1.01)
        ):
            warnings.warn(
                f"input_conditioner got values from {images.amin():.2f} to {images.amax():.2f}; it expects pixels in "
                "[0, 1]. Are the images already whitened, or in 0..255?",
                stacklevel=2,
            )
            self._warned = True
        return (images - self._constants(self.mean, images)) / self._constants(self.std, images)

    def invert(self, images: Tensor) -> Tensor:
        """Whitened images back to pixels in [0, 1]."""
        return images * self._constants(self.std, images) + self._constants(self.mean, images)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"

    @staticmethod
    def _constants(values: tuple[float, ...], images: Tensor) -> Tensor:
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]


class SharpEncoder(nn.Module):
    """A frozen backbone whose features come out sharp.

    Args:
        backbone: The frozen encoder.
        upsampler: Built for the backbone's ``embed_dim``.
        normalizer: Fitted, or to be fitted before use.
        bias_buffer: None for none.
        max_memory: See :attr:`max_memory`.
    """

    _anchor: Tensor

    def __init__(
        self,
        backbone: Backbone,
        upsampler: Upsampler,
        normalizer: Normalizer,
        bias_buffer: BiasBuffer | None = None,
        *,
        max_memory: int | str | None = None,
    ) -> None:
        super().__init__()
        self.max_memory = max_memory
        self._upsample_within = upsample_within
        if upsampler.embed_dim != backbone.embed_dim:
            raise ConfigError(
                f"the upsampler is for {upsampler.embed_dim} channels, but backbone {backbone.name!r} has "
                f"{backbone.embed_dim}; build it for this backbone"
            )
        grid = upsampler.high_res_grid(torch.empty(1, 1, *backbone.grid_size(backbone.input_size), device="meta"))
        if upsampler.window is not None and upsampler.window > 2 * max(grid) - 1:
            raise ConfigError(
                f"a window of {upsampler.window} is larger than the map: at the native size of backbone "
                f"{backbone.name!r} that is {grid[0]}x{grid[1]}, and a window of {2 * max(grid) - 1} sees all of it"
            )
        self.backbone = backbone
        self.normalizer = normalizer
        self.bias_buffer = bias_buffer
        self.upsampler = upsampler
        self.input_conditioner = InputConditioner(backbone.mean, backbone.std)
        # Moves with the module, so that the encoder knows its device even where nothing has parameters.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        # How a checkpoint rebuilds this encoder; builder.create_encoder fills it in.
        self.recipe: dict[str, Any] = {}

    @property
    def max_memory(self) -> int | None:
        """Bytes that encoding may take beside weights, inputs and results; None for no limit.

        Set it to bytes or to text like "2GiB". Tiles and rows are then processed in portions that fit, images one by
        one, without gradients, in eval mode; the features are the same up to rounding. Raises ConfigError for what is
        no amount; an amount that is too little shows when an image is encoded. Held against the system on Linux CPUs.
        """
        return self._max_memory

    @max_memory.setter
    def max_memory(self, amount: int | str | None) -> None:
        self._max_memory = None if amount is None else parse_memory(amount)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self._anchor.device

    @property
    def embed_dim(self) -> int:
        """Channels C of both feature maps."""
        return self.backbone.embed_dim

    @property
    def factor(self) -> float:
        """Gain of the high-resolution map over the low-resolution one, in each direction."""
        return self.upsampler.factor

    @property
    def patch_size(self) -> int:
        """Pixels per token of the backbone."""
        return self.backbone.patch_size

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) in pixels at which the low-resolution pass has the backbone's native size."""
        return self._image_size(self.backbone.input_size)

    def encode(self, images: Tensor, *, patch_stride: int | None = None) -> BackboneOutput:
        """Whitened images of a size that the backbone takes to normalised, de-biased features.

        Only the bias buffer gets a gradient.

        Args:
            images: [B, 3, h*p, w*p].
            patch_stride: Pixels from token to token, for backbones whose patches may overlap; None: the patch size.
        """
        backbone = self.backbone if patch_stride is None else self.backbone.with_patch_stride(patch_stride)
        with torch.no_grad():
            features, summary = backbone(images)
            features = self.normalizer(features)
        if self.bias_buffer is not None:
            features = self.bias_buffer(features)
        return BackboneOutput(features, summary)

    def forward(
        self,
        images: Tensor,
        *,
        denormalize: bool = False,
        return_summary: bool = False,
        low_res_size: tuple[int, int] | None = None,
        output_size: tuple[int, int] | None = None,
        allocate: Allocate | None = None,
    ) -> UpsampleFeatures:
        """Sharp features of whitened images.

        Args:
            images: [B, 3, H, W], whitened, any size from one patch upwards.
            denormalize: True returns features in the backbone's own space, False in normalised space (PHI-S: every
                channel has mean 0 and variance about 1).
            return_summary: Whether to return the backbone's summary (CLS or pooled token of the low-resolution pass,
                unchanged: upsampling does not improve it).
            low_res_size: (h, w) in pixels of the low-resolution pass. Default: the image size divided by
                ``upsampler.input_upsample_factor``, to whole patches, or the one size of a fixed-size backbone.
            output_size: (H, W) of ``high_res`` in cells, where the upsampler takes any size; None: by the factor.
            allocate: Called with ``low_res`` and the shape and dtype of ``high_res``, returns the tensor to write that
                to: see ``featsharp.extraction.MappedFeatures`` for one in a file. Only with :attr:`max_memory`.

        Returns:
            ``low_res`` [B, C, h, w], ``high_res`` [B, C, factor * h, factor * w] or of ``output_size`` (S2 has several
            maps of C channels on top of each other), ``summary`` [B, C_s] or None.

        Raises:
            InputError: For images that are no [B, 3, H, W] batch or too small, a summary that the backbone lacks, or an
                output size that the upsampler cannot make.
            InputError: When ``max_memory`` is too little for these images; it names the least that works.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"a sharp encoder takes whitened images [B, 3, H, W]; got {tuple(images.shape)}")
        if not len(images):
            raise InputError("a sharp encoder needs at least one image; got an empty batch")
        if not images.is_floating_point():
            raise InputError(
                f"whitened images are floating point; got {images.dtype}. Use input_conditioner(pixels / 255) first"
            )
        if return_summary and self.backbone.summary_dim is None:
            raise InputError(f"backbone {self.backbone.name!r} has no summary; call without return_summary")
        size = low_res_size or self.low_res_size(size_of(images))
        if self.max_memory is not None:
            low_res, high_res, summary = self._upsample_within(
                self.upsampler,
                images,
                self.encode,
                size,
                self.max_memory,
                output_size=output_size,
                finish=self.normalizer.denormalize if denormalize else nn.Identity(),
                allocate=allocate or allocate_beside,
            )
        elif allocate is not None:
            raise ConfigError("allocate= needs a limit on memory; set max_memory, for example to '2GiB'")
        else:
            low_res, high_res, summary = self.upsampler(images, self.encode, size, output_size)
            if denormalize:
                low_res, high_res = self.normalizer.denormalize(low_res), self._denormalize_maps(high_res)
        return UpsampleFeatures(low_res, high_res, summary if return_summary else None)

    def compile(self, **options: Any) -> None:
        """Compile :meth:`forward` in place with ``torch.compile``, for images of any size.

        The first images of some sizes take long; torch compiles one function for at most eight encoders of a process
        (``torch._dynamo.config.recompile_limit``). What runs under :attr:`max_memory` is not compiled.

        Args:
            options: Of ``torch.compile``. Default ``dynamic=True``: one graph serves many sizes; False makes a faster
                one for every size. ``backend="inductor"``, the default, needs a C++ compiler on CPUs.
        """
        # It looks at what it computes, which a graph cannot. Not done on import, which would load the compiler.
        self._upsample_within = torch.compiler.disable(upsample_within)
        super().compile(**({"dynamic": True} | options))

    def _denormalize_maps(self, high_res: Tensor) -> Tensor:
        """The inverse of the normalizer for every map of C channels."""
        if self.upsampler.num_maps == 1:
            return self.normalizer.denormalize(high_res)
        maps = high_res.unflatten(1, (self.upsampler.num_maps, -1)).flatten(0, 1)
        return self.normalizer.denormalize(maps).unflatten(0, (len(high_res), -1)).flatten(1, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not compiled."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_upsample_within": upsample_within}

    def low_res_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in pixels of the low-resolution pass for an image of ``image_size``."""
        return self._scaled_size(image_size, 1 / self.upsampler.input_upsample_factor)

    @overload
    def encode_image(
        self,
        image: "Picture",
        *,
        size: tuple[int, int] | None = None,
        output_size: tuple[int, int] | None = None,
        denormalize: bool | None = None,
        return_summary: bool = False,
        allocate: Allocate | None = None,
    ) -> UpsampleFeatures: ...

    @overload
    def encode_image(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        size: tuple[int, int] | None = None,
        output_size: tuple[int, int] | None = None,
        denormalize: bool | None = None,
        return_summary: bool = False,
    ) -> list[UpsampleFeatures]: ...

    @torch.no_grad()  # not inference mode: users train probes on these features
    def encode_image(
        self,
        image: "Picture | list[Any] | tuple[Any, ...]",
        *,
        size: tuple[int, int] | None = None,
        output_size: tuple[int, int] | None = None,
        denormalize: bool | None = None,
        return_summary: bool = False,
        allocate: Allocate | None = None,
    ) -> UpsampleFeatures | list[UpsampleFeatures]:
        """Sharp features of one picture or of several, lined up with their pixels.

        A picture is whitened, and scaled (never cropped or padded) so that the low-resolution pass has about as many
        tokens as at the backbone's native size, with the picture's aspect ratio. Cell (y, x) of an (h, w) map is
        centred at pixel ``((y + 0.5) * H / h, (x + 0.5) * W / w)`` of the H x W picture.

        Args:
            image: A file, or a PIL image; or a list of these, of any sizes: those that are scaled to one size go
                through the backbone as one batch, so give as many at once as memory holds.
            size: (h, w) in pixels to scale the picture to instead; the picture's own size keeps every detail.
            denormalize: As for :meth:`forward`; None: True wherever the normalizer has an inverse.
            output_size, return_summary, allocate: As for :meth:`forward`; ``allocate`` only for one picture.

        Returns:
            As :meth:`forward`, with B = 1, on the device of the encoder (``high_res`` where ``allocate`` puts it); a
            list in the order given for a list.
        """
        denormalize = self.normalizer.invertible if denormalize is None else denormalize
        if isinstance(image, list | tuple):
            if allocate is not None:
                raise ConfigError("allocate= makes room for one picture; call encode_image for each of the list")
            prepared = [self._prepare_picture(one, size) for one in image]
            results: dict[int, UpsampleFeatures] = {}
            groups: dict[Any, list[int]] = {}
            for index, (pixels, low_res_size) in enumerate(prepared):
                groups.setdefault((pixels.shape, low_res_size), []).append(index)
            for (_, low_res_size), group in groups.items():
                batch = torch.cat([prepared[index][0] for index in group])
                out = self(
                    batch,
                    denormalize=denormalize,
                    return_summary=return_summary,
                    low_res_size=low_res_size,
                    output_size=output_size,
                )
                parts = zip(
                    *(len(group) * [None] if x is None else [one.clone() for one in x.split(1)] for x in out),
                    strict=True,
                )
                results |= {index: UpsampleFeatures(*part) for index, part in zip(group, parts, strict=True)}
            return [results[index] for index in range(len(prepared))]
        pixels, low_res_size = self._prepare_picture(image, size)
        return self(
            pixels,
            denormalize=denormalize,
            return_summary=return_summary,
            low_res_size=low_res_size,
            output_size=output_size,
            allocate=allocate,
        )

    def _prepare_picture(self, image: "Picture", size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int] | None]:
        """Whitened pixels [1, 3, H, W] on the encoder's device, and the size of their low-resolution pass."""
        from featsharp.data.images import decode_image, image_to_tensor

        pixels = image_to_tensor(decode_image(image))[None]
        low_res_size = None
        if size is None:
            low_res_size = self.native_low_res_size(size_of(pixels))
            size = self._image_size(low_res_size)
        return self.input_conditioner(resize(pixels, size)).to(self._anchor), low_res_size

    def _image_size(self, low_res_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in pixels that the upsampler makes best use of beside a low-resolution pass of that size."""
        k = self.upsampler.input_upsample_factor
        if k == int(k):
            return low_res_size[0] * int(k), low_res_size[1] * int(k)
        # Tiles cover whole tokens; the grid of the result says how many.
        p = self.backbone.patch_size
        return p * scale_length(low_res_size[0] // p, k), p * scale_length(low_res_size[1] // p, k)

    def native_low_res_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in pixels with the aspect ratio of an image and about the area of the backbone's native size."""
        native_h, native_w = self.backbone.input_size
        return self._scaled_size(image_size, (native_h * native_w / (image_size[0] * image_size[1])) ** 0.5)

    def _scaled_size(self, image_size: tuple[int, int], scale: float) -> tuple[int, int]:
        """The size that the backbone takes nearest to ``scale`` times the image's, at least one patch per side."""
        self.backbone.fit_size(*image_size)  # refuses an image that is itself smaller than one patch
        height, width = (max(self.backbone.patch_size, side * scale) for side in image_size)
        return self.backbone.fit_size(height, width)
