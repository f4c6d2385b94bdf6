"""Which sizes an evaluation shows to an encoder: the same picture for all encoders of a table up to factor 2."""

import math

from featsharp.errors import ConfigError
from featsharp.model import SharpEncoder


def find_low_res_size(encoder: SharpEncoder, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) in pixels of the low-resolution pass: the wanted one, or the backbone's native size.

    Raises:
        ConfigError: For a size that the backbone does not take; the message has the nearest that it does.
    """
    backbone = encoder.backbone
    if wanted is None:
        return backbone.input_size
    fitting = backbone.fit_size(*(max(side, backbone.patch_size) for side in wanted))
    if fitting != tuple(wanted):
        raise ConfigError(
            f"low_res_size {wanted[0]}x{wanted[1]} is no size that backbone {backbone.name!r} takes; the nearest is "
            f"{fitting[0]}x{fitting[1]}"
        )
    return fitting


def shown_size(encoder: SharpEncoder, low_res: tuple[int, int]) -> tuple[int, int]:
    """(h, w) in pixels of the picture: twice the low-resolution pass, or its factor rounded up where that is more."""
    times = max(2, math.ceil(encoder.factor))
    return low_res[0] * times, low_res[1] * times
