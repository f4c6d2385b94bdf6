"""Position bias: the fraction of a backbone's features that depends on the position of a token, not on the image.

Position embeddings and padded borders leave a fixed pattern in the features, which the bias buffer of FeatSharp (arXiv
2502.16025, figure 11) learns and removes. Over images whose content is the same everywhere on average, the mean feature
map is that pattern. With x[i, p] the features of image i at position p, averages over a subscript written as a dot:

    pattern   b[p] = x[., p] - x[., .]
    residual  e[i, p] = x[i, p] - x[i, .] - x[., p] + x[., .]
    strength  (mean of b^2 - var(e) / n) / mean of (x - x[., .])^2

with squares summed over channels, var(e) the residual's variance (degrees of freedom (n - 1)(P - 1)) and n images of P
positions. The mean of n images still has 1/n of the residual in it, which var(e) / n subtracts, as in a two-way
analysis of variance. 0: features do not depend on the position; 1: on nothing else. It is larger for images with less
content, so compare only strengths from the same kind of images.
"""

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.device import usual_defaults
from featsharp.errors import ConfigError, InputError


@torch.inference_mode()
@usual_defaults()
def position_bias(
    backbone: Backbone, *, num_images: int = 16, size: tuple[int, int] | None = None, seed: int = 0
) -> float:
    """Measure the strength of a backbone's position bias, from 0 to 1, on :func:`random_images`.

    Args:
        backbone: On any device.
        num_images: At least 2; encoded one by one.
        size: (h, w) in pixels; None: the native size.
        seed: Of the images; the global random state stays as it is.

    Raises:
        ConfigError: For fewer than two images.
    """
    if num_images < 2:
        raise ConfigError(
            f"position bias is separated from content by several images; got num_images={num_images}, take 16"
        )
    like = next((value for value in backbone.state_dict().values() if value.is_floating_point()), torch.empty(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    images = (random_images(num_images, size or backbone.input_size, seed) - mean) / std
    features = [backbone(image[None].to(like)).features.float().cpu() for image in images]
    return explained_by_position(torch.cat(features))


def explained_by_position(features: Tensor) -> float:
    """Compute the strength of the pattern that maps [n, C, h, w] of n images have in common, from 0 to 1.

    Raises:
        InputError: For fewer than two images or positions.
    """
    x = features.flatten(2).double()  # [n, C, P]
    images, _, positions = x.shape
    if images < 2 or positions < 2:
        raise InputError(f"position bias needs at least two images and two positions; got {tuple(features.shape)}")
    x = x - x.mean((0, 2), keepdim=True)
    pattern = x.mean(0, keepdim=True)
    residual = x - pattern - x.mean(2, keepdim=True)
    noise = residual.square().sum() / ((images - 1) * (positions - 1))
    explained = pattern.square().sum() / positions - noise / images
    total = x.square().sum() / (images * positions)
    return (explained / total).clamp(0, 1).item() if total > 0 else 0.0


@usual_defaults()
def random_images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Draw images [count, 3, h, w] in [0, 1] of noise with the spectrum of photographs, amplitude 1 / frequency.

    They are periodic, so that no position differs from another, and the amplitude is the same below four periods per
    image: large structures would take many images to average out.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    frequencies = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    frequencies = frequencies.clamp(min=4 / min(size))
    spectrum = torch.fft.rfft2(torch.randn(count, 3, height, width, generator=generator)) / frequencies
    spectrum[..., 0, 0] = 0  # no constant
    noise = torch.fft.irfft2(spectrum, s=size)
    return (0.5 + 0.2 * noise / noise.std((2, 3), keepdim=True)).clamp(0, 1)
