"""Whitening and native size, from the files that libraries keep beside their weights."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from featsharp.backbones.loading import pair
from featsharp.backbones.options import Options, parse_whitening
from featsharp.errors import ConfigError, first_line


def choose_whitening(options: Options, config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Mean and std of the options, else those of a configuration, else ImageNet's.

    Raises:
        ConfigError: For values in ``config`` that cannot be a whitening; the message names ``place``, where they lie.
    """
    chosen = {}
    for key, given, usual in (("mean", options.mean, IMAGENET_MEAN), ("std", options.std, IMAGENET_STD)):
        try:
            chosen[key] = given or parse_whitening(key, config.get(key) or usual)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}; mend it, or give option {key} where this backbone has it") from error
    return chosen


def read_image_processor(name: str, place: str, options: Options) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Read the image processor of a model of transformers; ``mean`` and ``std`` of the options go before its own.

    Args:
        name: The backbone, for messages.
        place: A directory or a name on the hub.
        options: Of these ``mean`` and ``std``.

    Returns:
        ``mean`` and ``std`` for pixels in [0, 1], and the (h, w) in pixels that it makes; None when it does not say.

    Raises:
        ConfigError: For a file that cannot be read, or no whitening.
    """
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        config = get_image_processor_config(place, local_files_only=os.path.isdir(place))
        size = _processor_size(config)
        whitening = None if options.mean and options.std else _processor_whitening(config)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{os.path.join(place, 'preprocessor_config.json')} cannot be read as that of an image processor "
            f"({first_line(error)}); save_pretrained of the processor writes one"
        ) from error
    mean, std = options.mean or (whitening and whitening[0]), options.std or (whitening and whitening[1])
    if mean is None or std is None:
        raise ConfigError(
            f"backbone {name!r} has no preprocessor_config.json with image_mean and image_std; say its whitening "
            f"as options, such as ?mean=0.485,0.456,0.406&std=0.229,0.224,0.225"
        )
    return {"mean": mean, "std": std}, size


def _processor_whitening(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of pixels in [0, 1]; None where the processor has none."""
    whitens = config.get("do_normalize", "image_mean" in config)
    if not config or (whitens and not ("image_mean" in config and "image_std" in config)):
        return None
    # The processor multiplies pixels from 0 to 255 first.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    mean, std = (config["image_mean"], config["image_std"]) if whitens else (0.0, 1.0)
    mean, std = parse_whitening("image_mean", mean), parse_whitening("image_std", std)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _processor_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the images that a processor makes: of its crop, or what it resizes to."""
    crops = config.get("do_center_crop", "crop_size" in config)
    size = (config.get("crop_size") if crops else None) or config.get("size")
    if isinstance(size, Mapping):
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        size = size.get("shortest_edge") or size.get("longest_edge")
    return None if size is None else pair(size)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's reports on what it loads, which list the language model that is left out on purpose."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
