"""The sharp encoder: image -> backbone -> normalizer -> bias buffer -> upsampler -> sharp features.

FeatSharp (arXiv 2502.16025), figure 2.

Convention:
    Images given to a sharp encoder are already whitened (``input_conditioner`` does it). Both feature maps cover the
    whole image whatever its size: nothing is cropped or padded, each axis is scaled on its own.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.device import check_autocast
from featsharp.errors import ConfigError, InputError
from featsharp.layers.bias_buffer import BiasBuffer
from featsharp.layers.input_conditioner import InputConditioner
from featsharp.memory import parse_memory
from featsharp.normalizers import Normalizer
from featsharp.ops.recording import is_tracing
from featsharp.ops.resize import check_size, resize, size_of
from featsharp.upsamplers.base import UpsampleFeatures, Upsampler, differentiable, scale_length, weight_dtype
from featsharp.upsamplers.chunked import Allocate, allocate_beside, upsample_within

if TYPE_CHECKING:
    from featsharp.data.images import Picture

__all__ = ["InputConditioner", "SharpEncoder", "UpsampleFeatures"]

# (H, W) in cells, or a cell for each pixel of the picture that was given.
OutputSize: TypeAlias = tuple[int, int] | Literal["pixels"]


class PreparedImage(NamedTuple):
    """A picture that was read and scaled: pixels [1, 3, H, W] in [0, 1] on the CPU, not whitened yet."""

    pixels: Tensor
    low_res_size: tuple[int, int] | None  # (h, w) in pixels of the low-resolution pass; None: as of the pixels
    image_size: tuple[int, int]  # (h, w) in pixels before it was scaled


def _check_window(window: int, upsampler: Upsampler, backbone: Backbone) -> None:
    """Raise ConfigError for a window that is larger than the map at the native size of the backbone."""
    tokens = backbone.grid_size(backbone.input_size)
    grid = upsampler.high_res_grid(torch.empty(1, 1, *tokens, dtype=torch.float32, device="meta"))
    if window > 2 * max(grid) - 1:
        raise ConfigError(
            f"a window of {window} is larger than the map: at the native size of backbone {backbone.name!r} "
            f"that is {grid[0]}x{grid[1]}, and a window of {2 * max(grid) - 1} sees all of it"
        )


class SharpEncoder(nn.Module):
    """A frozen backbone with an upsampler of its features.

    Args:
        backbone: The frozen encoder.
        upsampler: Built for the backbone's ``embed_dim``.
        normalizer: Fitted, or to be fitted before use.
        bias_buffer: None for none.
        max_memory: See :attr:`max_memory`.

    Types:
        Images may have any floating-point type. Every part computes in the type of its weights, so
        ``encoder.to(torch.bfloat16)`` or ``encoder.backbone.to(torch.bfloat16)`` is all it needs; a ``torch.autocast``
        around the call applies to backbone and upsampler alike. ``low_res``, ``high_res`` and ``summary`` have one
        type, that of the encoder's weights (:attr:`dtype`), under autocast too.
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
        if upsampler.embed_dim != backbone.embed_dim:
            raise ConfigError(
                f"the upsampler is for {upsampler.embed_dim} channels, but backbone {backbone.name!r} has "
                f"{backbone.embed_dim}; build it for this backbone"
            )
        if upsampler.window is not None:
            _check_window(upsampler.window, upsampler, backbone)
        self.backbone = backbone
        self.normalizer = normalizer
        self.bias_buffer = bias_buffer
        self.upsampler = upsampler
        self.input_conditioner = InputConditioner(backbone.mean, backbone.std)
        # Has the type that the encoder was cast to even where nothing has parameters; normalizers stay float32.
        self.register_buffer("_anchor", torch.empty(0, dtype=torch.float32), persistent=False)
        # Arguments by which a checkpoint rebuilds this encoder; builder.create_encoder fills them in.
        self.recipe: dict[str, Any] = {}

    @property
    def max_memory(self) -> int | None:
        """Bytes that encoding may take beside weights, inputs and results; None for no limit.

        Set it to bytes or to text like "2GiB". Tiles and cells are then processed in chunks that fit, images one by
        one, without gradients, in eval mode; the features are the same up to rounding. Raises ConfigError for text
        that is no amount; a limit that is too low is an InputError when an image is encoded. Tested on Linux CPUs.
        """
        return self._max_memory

    @max_memory.setter
    def max_memory(self, amount: int | str | None) -> None:
        self._max_memory = None if amount is None else parse_memory(amount)

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return self.normalizer.alpha.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features: of the upsampler's weights or, without any, the one to which the encoder was cast."""
        return weight_dtype(self.upsampler) or self._anchor.dtype

    @property
    def embed_dim(self) -> int:
        """Channels C of both feature maps."""
        return self.backbone.embed_dim

    @property
    def factor(self) -> float:
        """Size of the high-resolution map over that of the low-resolution one, in each direction."""
        return self.upsampler.factor

    @property
    def caption(self) -> str:
        """Upsampler and factor for pictures and tables, such as "tile 2x" or "featsharp, linear 2x"."""
        name = self.recipe.get("upsampler") or type(self.upsampler).__name__
        return f"{', '.join(filter(None, (name, self.upsampler.variant)))} {self.factor:g}x"

    @property
    def patch_size(self) -> int:
        """Pixels per token of the backbone."""
        return self.backbone.patch_size

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) in pixels at which the low-resolution pass has the backbone's native size."""
        return self._image_size(self.backbone.input_size)

    def encode(self, images: Tensor, *, patch_stride: int | None = None) -> BackboneOutput:
        """Encode whitened images of a size that the backbone takes to normalised, de-biased features.

        Only the bias buffer gets a gradient.

        Args:
            images: [B, 3, h*p, w*p], of any floating-point type.
            patch_stride: Pixels from token to token, for backbones whose patches may overlap; None: the patch size.

        Returns:
            Features [B, C, h, w] and the summary [B, C_s] or None, of type :attr:`dtype`.
        """
        backbone = self.backbone if patch_stride is None else self.backbone.with_patch_stride(patch_stride)
        with torch.no_grad():
            features, summary = backbone(images)
            features = self.normalizer(features.to(self.dtype))
        if self.bias_buffer is not None:
            features = self.bias_buffer(features)
        return BackboneOutput(features, None if summary is None else summary.to(self.dtype))

    def forward(
        self,
        images: Tensor,
        denormalize: bool = False,
        return_summary: bool = False,
        low_res_size: tuple[int, int] | None = None,
        output_size: OutputSize | None = None,
        allocate: Allocate | None = None,
    ) -> UpsampleFeatures:
        """Compute sharp features of whitened images.

        Args:
            images: [B, 3, H, W], whitened, floating point, any size from one patch upwards. They are resized to
                ``low_res_size`` for the low-resolution pass, and by upsamplers that encode tiles or larger images to
                ``upsampler.input_upsample_factor`` times that: more pixels than this add no detail.
            denormalize: Whether to return features in the backbone's space instead of normalised space (PHI-S: every
                channel has mean 0 and variance about 1).
            return_summary: Whether to return the backbone's summary (CLS or pooled token of the low-resolution pass,
                unchanged: upsampling does not improve it).
            low_res_size: (h, w) in pixels of the low-resolution pass. Default: the image size divided by
                ``upsampler.input_upsample_factor``, rounded to whole patches, or the size of a fixed-size backbone.
            output_size: (H, W) of ``high_res`` in cells, where the upsampler takes any size; "pixels" for that of the
                images; None: by the factor.
            allocate: Called with ``low_res`` and the shape and dtype of ``high_res``, returns the tensor for the
                latter: see ``featsharp.extraction.MappedFeatures`` for one in a file. Only with :attr:`max_memory`.

        Returns:
            ``low_res`` [B, C, h, w], ``high_res`` [B, C, factor * h, factor * w] or of ``output_size`` (S2 has several
            maps of C channels on top of each other), ``summary`` [B, C_s] or None, all of type :attr:`dtype`. The maps
            are contiguous and share no memory.

        Raises:
            InputError: For images that are no [B, 3, H, W] batch or too small, a summary that the backbone lacks, an
                output size that the upsampler cannot make, or a ``max_memory`` that is too low for these images (the
                message gives the least that works).
        """
        self._check(images, return_summary)
        image_size = size_of(images)
        if output_size == "pixels":
            output_size = image_size
        images = differentiable(images.to(self.dtype))
        if low_res_size is None:
            low_res_size = self.low_res_size(image_size)
        size = check_size("low_res_size", low_res_size, "pixels")
        if self.max_memory is not None:
            low_res, high_res, summary = upsample_within(
                self.upsampler,
                images,
                self.encode,
                size,
                self.max_memory,
                output_size=output_size,
                finish=lambda features: self._finish(features, denormalize),
                allocate=allocate or allocate_beside,
            )
        elif allocate is not None:
            raise ConfigError("allocate= needs a limit on memory; set max_memory, for example to '2GiB'")
        else:
            low_res, high_res, summary = self.upsampler(images, self.encode, size, output_size)
            if high_res is low_res:  # of factor 1; what changes one in place must not change the other
                high_res = low_res.clone()
            low_res, high_res = self._finish(low_res, denormalize), self._finish(high_res, denormalize)
        low_res, high_res = low_res.contiguous(), high_res.contiguous()  # safetensors takes no others
        if is_tracing() and not return_summary:
            return (low_res, high_res)  # type: ignore[return-value]  # a traced program cannot say None
        out = UpsampleFeatures(low_res, high_res, summary if return_summary else None)
        return out.of_picture(image_size)

    def _check(self, images: Tensor, return_summary: bool) -> None:
        if not isinstance(images, Tensor):
            raise InputError(
                f"a sharp encoder takes whitened images, a tensor [B, 3, H, W]; got {type(images).__name__}. "
                "encode_image takes pictures"
            )
        weight = next(self.parameters(), None)
        if weight is not None and weight.device.type != images.device.type:
            raise InputError(f"the images are on {images.device}, this encoder on {weight.device}; move one with .to()")
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"a sharp encoder takes whitened images [B, 3, H, W]; got {tuple(images.shape)}")
        if images.shape[0] == 0:
            raise InputError("a sharp encoder needs at least one image; got an empty batch")
        if not images.is_floating_point():
            raise InputError(
                f"whitened images are floating point; got {images.dtype}. Use input_conditioner(pixels / 255) first"
            )
        check_autocast(self.dtype, images, "this encoder")
        if return_summary and self.backbone.summary_dim is None:
            raise InputError(f"backbone {self.backbone.name!r} has no summary; call without return_summary")

    def _finish(self, features: Tensor, denormalize: bool) -> Tensor:
        """Cast maps of the upsampler [B, n C, H, W] to :attr:`dtype`, and denormalise them where requested."""
        features = features.to(self.dtype)
        if denormalize:
            maps = features.unflatten(1, (-1, self.embed_dim)).flatten(0, 1)  # S2 has several on top of each other
            features = self.normalizer.denormalize(maps).unflatten(0, (features.shape[0], -1)).flatten(1, 2)
        return features

    def compile(self, **options: Any) -> None:
        """Compile backbone, normalizer and upsampler in place with ``torch.compile``, for images of any size.

        The first images of some sizes take long; torch compiles one function for at most eight encoders of a process
        (``torch._dynamo.config.recompile_limit``). Under :attr:`max_memory` the compiled code is not used.

        Args:
            options: Of ``torch.compile``. Default ``dynamic=True``: one graph for many sizes; False makes a faster
                one for every size. ``backend="inductor"``, the default, needs a C++ compiler on CPUs.
        """
        # The upsampler's graph includes backbone and normalizer, which it calls as `encode`.
        self.upsampler.compile(**({"dynamic": True} | options))

    def __repr__(self) -> str:
        """Show a line for each part, without the modules inside."""
        lines = [
            f"  ({name}): {type(module).__name__}({module.extra_repr()})" for name, module in self.named_children()
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def low_res_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Compute (h, w) in pixels of the low-resolution pass for an image of ``image_size``."""
        return self._scaled_size(image_size, 1 / self.upsampler.input_upsample_factor)

    @overload
    def encode_image(
        self,
        image: "Picture",
        *,
        size: tuple[int, int] | None = None,
        output_size: OutputSize | None = None,
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
        output_size: OutputSize | None = None,
        denormalize: bool | None = None,
        return_summary: bool = False,
    ) -> list[UpsampleFeatures]: ...

    @torch.no_grad()  # not inference mode: users train probes on these features
    def encode_image(
        self,
        image: "Picture | list[Any] | tuple[Any, ...]",
        *,
        size: tuple[int, int] | None = None,
        output_size: OutputSize | None = None,
        denormalize: bool | None = None,
        return_summary: bool = False,
        allocate: Allocate | None = None,
    ) -> UpsampleFeatures | list[UpsampleFeatures]:
        """Compute sharp features of one or several pictures, aligned with their pixels.

        A picture of any size is whitened and scaled (never cropped or padded) so that the low-resolution pass has about
        as many tokens as at the backbone's native size, with the picture's aspect ratio; ``high_res`` has ``factor``
        times as many cells in each direction. For more, give ``size=``: twice the height and width make four times the
        tokens. Cell (y, x) of an (h, w) map is centred at pixel ``((y + 0.5) * H / h, (x + 0.5) * W / w)`` of the
        H x W picture.

        Args:
            image: The path or content of an image file, an open file, a PIL image, or an array or tensor of pixels that
                are not whitened (``featsharp.data.decode_image`` has the shapes and types); or a list of these, of any
                sizes: those that are scaled to one size are one batch for the backbone, so give as many at once as
                memory holds.
            size: (h, w) in pixels to scale the picture to instead, at least one patch per side; the size of the
                picture keeps every detail.
            output_size: As for :meth:`forward`; "pixels" for the size of the picture before it is scaled: C numbers for
                each pixel, which with :attr:`max_memory` and ``allocate`` go to a file.
            denormalize: As for :meth:`forward`; None: True wherever the normalizer has an inverse.
            return_summary: As for :meth:`forward`.
            allocate: As for :meth:`forward`; only for one picture.

        Returns:
            As :meth:`forward`, with B = 1, on the device of the encoder (``high_res`` where ``allocate`` puts it); a
            list in the order given for a list. ``image_size`` is that of the picture before it is scaled, so that
            ``at`` takes its pixels.

        Raises:
            DataError: For a file that is missing, damaged or of pixels that are not read.
            InputError: For an object that is no picture, and as :meth:`forward`.
        """
        denormalize = self.normalizer.invertible if denormalize is None else denormalize
        if isinstance(image, list | tuple):
            if allocate is not None:
                raise ConfigError("allocate= makes room for one picture; call encode_image for each of the list")
            prepared = [self.prepare_image(one, size) for one in image]
            results: dict[int, UpsampleFeatures] = {}
            groups: dict[Any, list[int]] = {}
            for index, (pixels, low_res_size, image_size) in enumerate(prepared):
                cells = image_size if output_size == "pixels" else output_size
                groups.setdefault((pixels.shape, low_res_size, cells), []).append(index)
            for (_, low_res_size, cells), group in groups.items():
                batch = self._whiten(torch.cat([prepared[index].pixels for index in group]))
                out = self(
                    batch,
                    denormalize=denormalize,
                    return_summary=return_summary,
                    low_res_size=low_res_size,
                    output_size=cells,
                )
                for row, index in enumerate(group):
                    # Views would keep the memory of the whole batch.
                    one = (None if x is None else x[row : row + 1].clone() for x in out)
                    results[index] = UpsampleFeatures(*one).of_picture(prepared[index].image_size)  # type: ignore[arg-type]
            return [results[index] for index in range(len(prepared))]
        pixels, low_res_size, image_size = self.prepare_image(image, size)
        out = self(
            self._whiten(pixels),
            denormalize=denormalize,
            return_summary=return_summary,
            low_res_size=low_res_size,
            output_size=image_size if output_size == "pixels" else output_size,
            allocate=allocate,
        )
        return out.of_picture(image_size)

    def prepare_image(self, image: "Picture", size: tuple[int, int] | None = None) -> PreparedImage:
        """Read and scale a picture as :meth:`encode_image` does; safe in threads beside the encoder's work."""
        from featsharp.data.images import picture_to_tensor

        if size is not None:
            size = check_size("size", size, "pixels")
            self.backbone.fit_size(*size)  # refuses one smaller than a patch before a picture is scaled to it
        pixels = picture_to_tensor(image)[None]
        image_size, low_res_size = size_of(pixels), None
        if size is None:
            low_res_size = self.native_low_res_size(image_size)
            size = self._image_size(low_res_size)
        return PreparedImage(resize(pixels, size), low_res_size, image_size)

    def _whiten(self, pixels: Tensor) -> Tensor:
        """Whiten pixels [B, 3, H, W] in [0, 1], on the encoder's device, in its type."""
        return self.input_conditioner(pixels).to(self.device, self._anchor.dtype)

    def _image_size(self, low_res_size: tuple[int, int]) -> tuple[int, int]:
        """Compute the (h, w) of the image in pixels from which the upsampler needs no more detail."""
        k = self.upsampler.input_upsample_factor
        if k == int(k):
            return low_res_size[0] * int(k), low_res_size[1] * int(k)
        # Tiles cover whole tokens, as many as the result has cells.
        p = self.backbone.patch_size
        return p * scale_length(low_res_size[0] // p, k), p * scale_length(low_res_size[1] // p, k)

    def native_low_res_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Compute (h, w) in pixels with the aspect ratio of an image and about the area of the native size."""
        native_h, native_w = self.backbone.input_size
        return self._scaled_size(image_size, (native_h * native_w / (image_size[0] * image_size[1])) ** 0.5)

    def _scaled_size(self, image_size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Compute the backbone's input size nearest to ``scale`` times the image's, at least one patch per side."""
        self.backbone.fit_size(*image_size)  # refuses an image that is itself smaller than one patch
        height, width = (max(self.backbone.patch_size, side * scale) for side in image_size)
        return self.backbone.fit_size(height, width)
