"""The one class of ``vits14-focus`` that needs timm at import."""

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


class FocusViT(VisionTransformer):
    """ViT-S/14 whose position embedding is resized as during its training: bicubic *without* antialiasing.

    timm antialiases; from 37x37 to 16x16 positions that moves single tokens to cosine 0.98 of what the weights learnt.
    """

    def __init__(self) -> None:
        super().__init__(
            img_size=518,
            patch_size=14,
            embed_dim=384,
            depth=12,
            num_heads=6,
            init_values=1.0,
            num_classes=0,
            dynamic_img_size=True,
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        # x: [B, h, w, C]. Resizing takes half a millisecond of the 80 that a 224-pixel image needs: not worth a cache.
        positions = resample_abs_pos_embed(
            self.pos_embed, new_size=list(x.shape[1:3]), old_size=list(self.patch_embed.grid_size), antialias=False
        )
        assert self.cls_token is not None
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + positions
