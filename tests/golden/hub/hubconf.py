"""Modules with the documented interfaces of DINO, DINOv2 and RADIO, for the recorded runs of torch.hub repositories."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from golden_base import fill
from timm.models.vision_transformer import VisionTransformer
from torch import nn

dependencies = ["torch", "timm"]


def _vit(patch_size, registers=0):
    return VisionTransformer(
        img_size=4 * patch_size, patch_size=patch_size, embed_dim=48, depth=3, num_heads=4, num_classes=0,
        reg_tokens=registers, dynamic_img_size=True, global_pool="token",
    )  # fmt: skip


class _Shared(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit, self.embed_dim, self.patch_size = vit, vit.embed_dim, vit.patch_embed.patch_size[0]
        fill(self)

    blocks = property(lambda self: self.vit.blocks)
    norm = property(lambda self: self.vit.norm)

    def _start(self, x):
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(x))))

    def _all(self, x):
        x, outputs = self._start(x), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class DinoVisionTransformer(_Shared):
    """As in DINOv2."""

    patch_embed = property(lambda self: self.vit.patch_embed)
    num_register_tokens = property(lambda self: self.vit.num_prefix_tokens - 1)

    def prepare_tokens_with_masks(self, x, masks=None):
        return self._start(x)

    def forward_features(self, x, masks=None):
        x = self._all(x)[-1]
        normed, first = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        outputs = self._all(x)
        outputs = outputs[-n:] if isinstance(n, int) else [outputs[i] for i in range(len(outputs)) if i in n]
        outputs = [self.norm(out) for out in outputs] if norm else outputs
        class_tokens = [out[:, 0] for out in outputs]
        outputs = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        return tuple(zip(outputs, class_tokens, strict=True)) if return_class_token else tuple(outputs)

    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"]


class _PatchEmbed(nn.Module):
    """As in DINO: sizes are whole numbers."""

    def __init__(self, inner):
        super().__init__()
        self.img_size, self.patch_size, self.proj = inner.img_size[0], inner.patch_size[0], inner.proj


class DinoOne(_Shared):
    """As in the first DINO."""

    def __init__(self, vit):
        super().__init__(vit)
        self.patch_embed = _PatchEmbed(vit.patch_embed)

    def prepare_tokens(self, x):
        return self._start(x)

    def forward(self, x):
        return self.norm(self._all(x)[-1])[:, 0]

    def get_intermediate_layers(self, x, n=1):
        return [self.norm(out) for out in self._all(x)[-n:]]


class _Resolution(NamedTuple):
    height: int
    width: int


class _Conditioner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor([0.48, 0.46, 0.41])[:, None, None])
        self.register_buffer("norm_std", torch.tensor([0.27, 0.26, 0.28])[:, None, None])

    def forward(self, x):
        return (x - self.norm_mean) / self.norm_std


class _RadioOutput(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor


class RadioModel(nn.Module):
    """Images in [0, 1] to (summary, features); 2 class tokens and 3 registers; cropped position embeddings."""

    patch_size, min_resolution_step = 16, 16
    preferred_resolution, max_resolution = _Resolution(96, 96), 256

    def __init__(self):
        super().__init__()
        self.input_conditioner = _Conditioner()
        self.embed = nn.Conv2d(3, 48, 16, 16)
        self.prefix_tokens = nn.Parameter(torch.empty(1, 5, 48))
        self.pos_table = nn.Parameter(torch.empty(1, 48, 16, 16))
        self.block = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
        fill(self)

    def make_preprocessor_external(self):
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def forward(self, x, feature_fmt="NLC"):
        x = self.embed(self.input_conditioner(x))
        h, w = x.shape[-2:]
        positions = F.interpolate(self.pos_table, (max(h, w),) * 2, mode="bilinear")[..., :h, :w]
        x = (x + positions).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.prefix_tokens.expand(len(x), -1, -1), x], 1))
        features = x[:, 5:]
        if feature_fmt == "NCHW":
            features = features.transpose(1, 2).unflatten(2, (h, w))
        return _RadioOutput(x[:, :2].flatten(1), features)


def dinov2_tiny(pretrained=True):
    return DinoVisionTransformer(_vit(14, registers=4))


def dino_tiny8(pretrained=True):
    return DinoOne(_vit(8))


def radio_model(version="", progress=True, adaptor_names=None):
    return RadioModel()


def plain_cnn(pretrained=True):
    model = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1))
    fill(model)
    return model
