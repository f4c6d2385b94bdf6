"""The transformer of ``vits14-focus``, in plain torch: timm, which has it too, takes two seconds to import.

Shapes:
    tokens [B, 1 + h * w, C]: the class token, then patches row by row. Names of parameters are those of timm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.ops.resize import size_of

PATCH_SIZE, WIDTH, DEPTH, NUM_HEADS = 14, 384, 12, 6
GRID = (37, 37)  # of the position table


class FocusBackbone(Backbone):
    """DINOv2 ViT-S/14 (arXiv 2304.07193): final-norm patch tokens as features, the class token as summary.

    Args:
        name: A label.
        model: With its weights.
        input_size: Native (h, w) in pixels.
    """

    num_prefix_tokens = 1
    embeds_patches = True

    def __init__(self, name: str, model: "FocusViT", input_size: tuple[int, int]) -> None:
        super().__init__(name, patch_size=PATCH_SIZE, embed_dim=WIDTH, input_size=input_size, summary_dim=WIDTH)
        self.model = model
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        tokens = self.model(images)
        return BackboneOutput(tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid_size(size_of(images))), tokens[:, 0])


class FocusViT(nn.Module):
    """Images [B, 3, h * 14, w * 14] to tokens after the final norm [B, 1 + h * w, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + GRID[0] * GRID[1], WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH_SIZE, PATCH_SIZE)})
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        positions = self.positions(size_of(patches))
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = self.norm(self.blocks(tokens + positions))
        assert isinstance(tokens, Tensor)
        return tokens

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of tokens, [1, 1 + h * w, 384].

        It is resized as during the training of these weights: bicubic *without* antialiasing. timm antialiases; from
        37x37 to 16x16 positions that moves single tokens to cosine 0.98 of what the weights learnt.
        """
        if grid == GRID:
            return self.pos_embed
        table = self.pos_embed[:, 1:].float().transpose(1, 2).unflatten(2, GRID)
        resized = F.interpolate(table, grid, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], resized.to(self.pos_embed.dtype)], dim=1)


class _Block(nn.Module):
    """Pre-norm attention and MLP with layer scale, tokens [B, N, C] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = _Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(WIDTH)}) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens)) * self.ls1["gamma"]
        hidden = F.gelu(self.mlp["fc1"](self.norm2(tokens)))
        return tokens + self.mlp["fc2"](hidden) * self.ls2["gamma"]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
