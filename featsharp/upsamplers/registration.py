"""The table of upsamplers: a name, a factory (embed_dim, factor, **options) and a line for ``featsharp ls``."""

from featsharp.registry import Registry
from featsharp.upsamplers.base import Upsampler

UPSAMPLERS: Registry[Upsampler] = Registry("upsampler")
register_upsampler = UPSAMPLERS.register
