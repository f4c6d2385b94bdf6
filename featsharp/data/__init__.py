"""Images and views for training; knows no model."""

from featsharp.data.entries import WeightedPath, parse_data_dir
from featsharp.data.images import IMAGE_EXTENSIONS, Picture, decode_image, image_to_tensor, picture_to_tensor
from featsharp.data.mixture import ImageMixture, LoadedImage
from featsharp.data.pack import PackReport, pack_images
from featsharp.data.sources import ImageSource, open_source

__all__ = [
    "IMAGE_EXTENSIONS",
    "ImageMixture",
    "ImageSource",
    "LoadedImage",
    "PackReport",
    "Picture",
    "WeightedPath",
    "decode_image",
    "image_to_tensor",
    "open_source",
    "pack_images",
    "parse_data_dir",
    "picture_to_tensor",
]
