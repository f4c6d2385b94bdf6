"""The sharp features of a whole picture, as every task that is about pixels of pictures takes them."""

from PIL.Image import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.evaluation.samples import predict_raw
from featsharp.evaluation.sizes import find_low_res_size, shown_size
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize


def sharp_features(encoder: SharpEncoder, image: Image, low_res_size: tuple[int, int] | None = None) -> Tensor:
    """High-resolution features of an RGB picture, in the backbone's own space: [1, C, H, W], float32.

    The picture is scaled as a whole, whatever its aspect ratio, to the size of the low-resolution pass times the factor
    rounded up, at least 2: encoders of factors 1 and 2 see the same picture.

    Args:
        encoder: In eval mode.
        image: Of mode RGB.
        low_res_size: (h, w) in pixels; None: the backbone's native size.

    Raises:
        ConfigError: For a size that the backbone does not take.
    """
    low_res = find_low_res_size(encoder, low_res_size)
    pixels = resize(image_to_tensor(image)[None].to(encoder.device), shown_size(encoder, low_res))
    return predict_raw(encoder, encoder.input_conditioner(pixels), low_res, positional=False)
