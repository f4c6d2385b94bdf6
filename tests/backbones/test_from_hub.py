"""torch.hub repositories: a local one with modules of the interfaces of DINO, DINOv2 and RADIO, loaded by name.

The real repositories are not on this machine, and no test opens a connection.
"""

import copy
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from featsharp.train import main

timm = pytest.importorskip("timm")

HUBCONF = '''
"""Modules with the documented interfaces of DINO, DINOv2 and RADIO; the transformers inside are timm's."""

from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import Identity as _Identity

dependencies = ["torch", "timm"]


def _vit(patch_size, registers=0):
    vit = VisionTransformer(
        img_size=4 * patch_size, patch_size=patch_size, embed_dim=48, depth=4, num_heads=4, num_classes=0,
        reg_tokens=registers, dynamic_img_size=True, global_pool="token",
    )
    nn.init.normal_(vit.pos_embed, std=0.5)
    return vit


class _Shared(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.embed_dim = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]

    blocks = property(lambda self: self.vit.blocks)
    norm = property(lambda self: self.vit.norm)

    def _all(self, x):
        """The outputs of all blocks."""
        x = self._start(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def _start(self, x):
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(x))))


class DinoVisionTransformer(_Shared):
    """As in DINOv2."""

    patch_embed = property(lambda self: self.vit.patch_embed)
    num_register_tokens = property(lambda self: self.vit.num_prefix_tokens - 1)

    def prepare_tokens_with_masks(self, x, masks=None):
        return self._start(x)

    def forward_features(self, x, masks=None):
        x = self._all(x)[-1]
        normed = self.norm(x)
        first = 1 + self.num_register_tokens
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
        return tuple(zip(outputs, class_tokens)) if return_class_token else tuple(outputs)

    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"]


class _Grouped(DinoVisionTransformer):
    """With the blocks in chunks, as DINOv2 has them after FSDP training."""

    @property
    def blocks(self):
        first, second, third, fourth = self.vit.blocks
        return nn.ModuleList([nn.ModuleList([first, second]), nn.ModuleList([_Identity(), _Identity(), third, fourth])])

    def _all(self, x):
        x, outputs = self._start(x), []
        for block in self.vit.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class _PatchEmbed(nn.Module):
    """As in DINO: sizes are whole numbers."""

    def __init__(self, inner):
        super().__init__()
        self.img_size, self.patch_size = inner.img_size[0], inner.patch_size[0]
        self.proj = inner.proj


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


def dinov2_tiny(pretrained=True, **kwargs):
    if pretrained:
        raise URLError("no route to the weights")
    return DinoVisionTransformer(_vit(14, registers=4))


def dinov2_tiny_grouped(pretrained=False):
    return _Grouped(_vit(14, registers=4))


def dino_tiny8(pretrained=True, **kwargs):
    return DinoOne(_vit(8))


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


class _Squaring(_Conditioner):
    def forward(self, x):
        return super().forward(x) ** 2


class _RadioOutput(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor


class RadioModel(nn.Module):
    """Images in [0, 1] to (summary, features); 2 class tokens and 3 registers; cropped position embeddings."""

    patch_size, min_resolution_step = 16, 32
    preferred_resolution, max_resolution = _Resolution(96, 96), 256

    def __init__(self, adaptor_names, conditioner=_Conditioner):
        super().__init__()
        self.input_conditioner = conditioner()
        self.embed = nn.Conv2d(3, 48, 16, 16)
        self.prefix = nn.Parameter(torch.randn(1, 5, 48))
        self.table = nn.Parameter(0.5 * torch.randn(1, 48, 16, 16))
        self.block = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
        self.adaptors = nn.ModuleDict({name: nn.Linear(48, 20 + 4 * i) for i, name in enumerate(adaptor_names)})

    def make_preprocessor_external(self):
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def _positions(self, h, w):
        side = max(h, w)
        return F.interpolate(self.table, (side, side), mode="bilinear")[..., :h, :w]

    def forward(self, x, feature_fmt="NLC"):
        if x.shape[-2] % self.min_resolution_step or x.shape[-1] % self.min_resolution_step:
            raise ValueError("The input resolution must be a multiple of `self.min_resolution_step`")
        x = self.embed(self.input_conditioner(x))
        h, w = x.shape[-2:]
        x = (x + self._positions(h, w)).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1))
        summary, features = x[:, :2].flatten(1), x[:, 5:]
        if feature_fmt == "NCHW":
            features = features.transpose(1, 2).unflatten(2, (h, w))
        base = _RadioOutput(summary, features)
        if not self.adaptors:
            return base
        heads = {name: _RadioOutput(head(x[:, 0]), head(x[:, 5:])) for name, head in self.adaptors.items()}
        return {"backbone": base, **heads}


def radio_model(version="", progress=True, adaptor_names=None):
    names = [adaptor_names] if isinstance(adaptor_names, str) else adaptor_names or []
    if version == "radio_squaring":
        return RadioModel(names, _Squaring)
    if version not in ("", "radio_v2.5-l"):
        raise ValueError(f"unknown version {version}")
    return RadioModel(names)


def radio_of_any_argument(**kwargs):
    return RadioModel([])


def plain_cnn(pretrained=True):
    return nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1))


def turned_around(pretrained=True):
    """A DINO whose patches came into another order."""
    model = DinoOne(_vit(8))
    whole = model.get_intermediate_layers

    def reversed_patches(x, n=1):
        return [torch.cat([out[:, :1], out[:, 1:].flip(1)], 1) for out in whole(x, n)]

    model.get_intermediate_layers = reversed_patches
    return model


def of_another_kind(pretrained=True):
    """Changed its interface since."""
    model = DinoVisionTransformer(_vit(14))
    model.forward_features = lambda x: tuple(model._all(x))
    return model


def not_a_module():
    return {"model": 1}
'''


@pytest.fixture(autouse=True)
def no_connections(monkeypatch):
    """Whatever asks a network is refused at once, by a port that nobody listens to."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    urllib.request.install_opener(None)  # the opener of the process reads the environment once
    yield
    urllib.request.install_opener(None)


@pytest.fixture
def repository(tmp_path) -> str:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return f"hub:{folder}"


def pictures(count: int, size: tuple[int, int]) -> Tensor:
    return F.interpolate(torch.randn(count, 3, 7, 9), size, mode="bicubic")


def grid_of(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


KINDS = {
    "dinov2": ("dinov2_tiny?pretrained=false", 14, 48, 48),
    "dino": ("dino_tiny8", 8, 48, 48),
    "radio": ("radio_model?version=radio_v2.5-l", 16, 48, 96),
}


@pytest.fixture(params=list(KINDS))
def kind(request, repository):
    entry, *facts = KINDS[request.param]
    return create_backbone(f"{repository}/{entry}"), *facts


# Every kind


def test_facts(kind):
    backbone, patch_size, width, summary_dim = kind
    assert (backbone.patch_size, backbone.embed_dim, backbone.summary_dim) == (patch_size, width, summary_dim)
    assert backbone.flexible
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_grid_order_batches_and_gradient(kind):
    backbone, p, width, summary_dim = kind
    images = pictures(2, (6 * p, 10 * p)).requires_grad_()
    out = backbone(images)
    assert out.features.shape == (2, width, 6, 10)
    assert out.summary.shape == (2, summary_dim)
    torch.testing.assert_close(backbone(images[1:]).features, out.features[1:], atol=1e-4, rtol=1e-4)
    changed = images.detach().clone()
    changed[0, :, 3 * p : 4 * p, 7 * p : 8 * p] *= -2
    difference = (backbone(changed).features - out.features)[0].norm(dim=0)
    assert divmod(int(difference.argmax()), 10) == (3, 7)
    out.features.square().mean().backward()
    assert images.grad.abs().sum() > 0


def test_half_types(kind):
    backbone, p, _, _ = kind
    images = pictures(2, (4 * p, 6 * p))
    exact = backbone(images).features
    cast = copy.deepcopy(backbone).bfloat16()(images.bfloat16())
    assert cast.features.dtype == torch.bfloat16
    assert F.cosine_similarity(cast.features.float(), exact).mean() > 0.99
    backbone.autocast_dtype = torch.bfloat16
    assert F.cosine_similarity(backbone(images).features, exact).mean() > 0.99


def test_the_same_weights_at_every_call_and_no_global_randomness(kind):
    backbone = kind[0]
    state = torch.get_rng_state()
    assert create_backbone(backbone.name).weights_hash() == backbone.weights_hash()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("summary", ["mean", "none"])
def test_summaries_by_name(kind, summary):
    backbone, p, _, _ = kind
    images = pictures(2, (4 * p, 4 * p))
    chosen = create_backbone(backbone.name, summary=summary)
    features, given = chosen(images)
    assert torch.equal(features, backbone(images).features)
    if summary == "none":
        assert given is None
        assert chosen.summary_dim is None
    else:
        torch.testing.assert_close(given, features.flatten(2).mean(2))
        assert chosen.summary_dim == chosen.embed_dim
    with pytest.raises(ConfigError, match=r"has no summary 'pool'; it has (cls|default), mean, none"):
        create_backbone(backbone.name, summary="pool")


# DINO and DINOv2, against the methods of the module


def test_dinov2(repository):
    backbone = create_backbone(f"{repository}/dinov2_tiny?pretrained=false")
    assert backbone.input_size == (56, 56)
    assert backbone.mean == (0.485, 0.456, 0.406)
    for grid in ((4, 4), (3, 5)):
        images = pictures(2, (14 * grid[0], 14 * grid[1]))
        named = backbone.model.forward_features(images)
        out = backbone(images)
        assert torch.equal(out.features, grid_of(named["x_norm_patchtokens"], grid))
        assert torch.equal(out.summary, named["x_norm_clstoken"])


@pytest.mark.parametrize("entry", ["dinov2_tiny?pretrained=false", "dinov2_tiny_grouped"])
def test_layers_of_dinov2(repository, entry):
    images = pictures(2, (42, 70))
    backbone = create_backbone(f"{repository}/{entry}", layer=[2, -4, 2])
    assert backbone.embed_dim == 3 * 48
    model = backbone.model
    first, third = model.get_intermediate_layers(images, [0, 2], reshape=False)
    out = backbone(images)
    assert torch.equal(out.features, grid_of(torch.cat([third, first, third], -1), (3, 5)))
    assert torch.equal(out.summary, model.forward_features(images)["x_norm_clstoken"])


def test_dino(repository):
    backbone = create_backbone(f"{repository}/dino_tiny8")
    assert backbone.input_size == (32, 32)
    images = pictures(2, (24, 56))
    tokens = backbone.model.get_intermediate_layers(images, n=4)
    out = backbone(images)
    assert torch.equal(out.features, grid_of(tokens[3][:, 1:], (3, 7)))
    assert torch.equal(out.summary, backbone.model(images))
    several = create_backbone(f"{repository}/dino_tiny8", layer=[3, 1])(images)
    assert torch.equal(several.features, grid_of(torch.cat([tokens[3], tokens[1]], -1)[:, 1:], (3, 7)))
    assert torch.equal(several.summary, out.summary)


@pytest.mark.parametrize("entry", ["dinov2_tiny?pretrained=false", "dinov2_tiny_grouped", "dino_tiny8"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_facets_against_the_projection(repository, entry, part):
    facet = ("query", "key", "value")[part]
    backbone = create_backbone(f"{repository}/{entry}", facet=facet, layer=[-1, 0])
    vit, p = backbone.model.vit, backbone.patch_size
    images = pictures(2, (3 * p, 5 * p))
    entering = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda module, given: entering.append(given[0]))
    vit.forward_features(images)

    def wanted(number: int) -> Tensor:
        block = vit.blocks[number]
        packed = block.norm1(entering[number]) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        return grid_of(packed[:, vit.num_prefix_tokens :, 48 * part : 48 * part + 48], (3, 5))

    expected = torch.cat([wanted(3), wanted(0)], 1)
    found = backbone(images)
    torch.testing.assert_close(found.features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.summary, backbone.model(images))


def test_patches_can_overlap(repository):
    backbone = create_backbone(f"{repository}/dino_tiny8")
    assert backbone.with_patch_stride(4)(pictures(1, (32, 40))).features.shape == (1, 48, 7, 9)


# RADIO


def test_radio_against_the_module(repository):
    name = f"{repository}/radio_model?version=radio_v2.5-l"
    backbone = create_backbone(name)
    assert backbone.input_size == (96, 96)
    assert backbone.mean == pytest.approx((0.48, 0.46, 0.41), abs=1e-7)
    assert backbone.std == pytest.approx((0.27, 0.26, 0.28), abs=1e-7)
    torch.manual_seed(0)
    whole = torch.hub.load(repository.removeprefix("hub:"), "radio_model", source="local").eval()
    pixels = torch.rand(2, 3, 64, 128)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        out, wanted = backbone((pixels - mean) / std), whole(pixels, feature_fmt="NCHW")
    torch.testing.assert_close(out.features, wanted.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.summary, wanted.summary, atol=1e-5, rtol=1e-5)


def test_radio_takes_whole_steps_up_to_its_maximum(repository):
    backbone = create_backbone(f"{repository}/radio_model")
    assert backbone.fit_size(100, 70) == (96, 64)
    assert backbone.fit_size(20, 5000) == (32, 256)
    with pytest.raises(InputError, match="got 80x64, the nearest is 64x64"):
        backbone(torch.zeros(1, 3, 80, 64))
    assert backbone(torch.zeros(1, 3, 32, 256)).features.shape == (1, 48, 2, 16)


def test_radio_adaptors(repository):
    one = create_backbone(f"{repository}/radio_model?adaptor_names=clip")
    both = create_backbone(f"{repository}/radio_model?adaptor_names=clip,siglip")
    assert (one.embed_dim, one.summary_dim, both.embed_dim, both.summary_dim) == (20, 20, 44, 44)
    images = pictures(2, (64, 96))
    raw = both.model(images)
    out = both(images)
    assert torch.equal(out.features, grid_of(torch.cat([raw["clip"][1], raw["siglip"][1]], -1), (4, 6)))
    assert torch.equal(out.summary, torch.cat([raw["clip"][0], raw["siglip"][0]], -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "final features only"),
        ({"facet": "key"}, "final features only"),
        ({"mean": "0.5,0.5,0.5"}, "brings its own whitening; leave out mean"),
        ({"version": "radio_squaring"}, "does more than to whiten"),
        ({"version": "radio_v9"}, r"fails with version='radio_v9': unknown version radio_v9"),
        ({"pretrained": False}, r"fails with pretrained=False.*RADIO takes its checkpoint as \?version=FILE"),
        ({"img_size": 80}, "the nearest is 64x64"),
    ],
)
def test_what_radio_does_not_have(repository, options, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"{repository}/radio_model", **options)


def test_radio_takes_its_checkpoint_as_a_version(repository, tmp_path):
    """Its entry swallows arguments that it does not know."""
    torch.save({}, tmp_path / "w.pth")
    for option in ({"pretrained": False}, {"weights": tmp_path / "w.pth"}):
        with pytest.raises(ConfigError, match=r"takes its checkpoint as \?version=FILE, not as weights"):
            create_backbone(f"{repository}/radio_of_any_argument", **option)


# Other modules


def test_a_module_of_no_known_kind_is_tried_out(repository):
    backbone = create_backbone(f"{repository}/plain_cnn?img_size=64&mean=0.5,0.4,0.3&std=0.2,0.2,0.1")
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (8, 10, (64, 64))
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    with pytest.raises(ConfigError, match=r"insides of .*plain_cnn.* are not known; leave out layer.*from_callable"):
        create_backbone(f"{repository}/plain_cnn?layer=0")


def test_modules_that_do_not_keep_their_word(repository):
    with pytest.raises(ConfigError, match="the grid runs in another order"):
        create_backbone(f"{repository}/turned_around")
    with pytest.raises(ConfigError, match=r"does not answer as modules of its kind do.*from_callable"):
        create_backbone(f"{repository}/of_another_kind")
    with pytest.raises(ConfigError, match="returns a dict, not a module"):
        create_backbone(f"{repository}/not_a_module")


# Trust, code and weights


def test_code_is_not_run_without_trust(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for extra in ("", "?trust=false", "?version=x"):
        with pytest.raises(
            ConfigError, match=r"github.com/someone/models on this machine.*add \?trust=true.*hub:DIR/v"
        ):
            create_backbone(f"hub:someone/models:dev/vit{extra}")
    with pytest.raises(ConfigError, match="true or false; got 'yes'"):
        create_backbone("hub:someone/models/vit?trust=yes")


@pytest.mark.parametrize(
    ("folder", "spec"),
    [("someone_models_main", "someone/models"), ("someone_models_a_b", "someone/models:a/b")],
)
def test_what_is_in_the_cache_runs_without_network_and_trust(monkeypatch, tmp_path, folder, spec):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / folder
    place.mkdir(parents=True)
    (place / "hubconf.py").write_text(HUBCONF)
    assert create_backbone(f"hub:{spec}/dino_tiny8").patch_size == 8
    with pytest.raises(ConfigError, match=r"add .trust=true"):
        create_backbone("hub:someone/models:other/dino_tiny8")


def test_no_network(monkeypatch, tmp_path, repository):
    with pytest.raises(
        MissingDependencyError, match=r"no route to the weights.*torch.hub.load.*weights=FILE.*pretrained=false"
    ):
        create_backbone(f"{repository}/dinov2_tiny")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for spec, entry in (("someone/models", "vit"), ("someone/models:dev/branch", "dino_tiny8")):
        with pytest.raises(MissingDependencyError, match=rf"cannot be fetched.*torch.hub.load\('{spec}', '{entry}'\)"):
            create_backbone(f"hub:{spec}/{entry}?trust=true")


@pytest.mark.parametrize("wrapped", ["plain", "teacher", "safetensors"])
def test_weights_from_a_file(repository, tmp_path, wrapped):
    torch.manual_seed(5)
    folder = repository.removeprefix("hub:")
    model = torch.hub.load(folder, "dinov2_tiny", source="local", pretrained=False).eval()
    path = tmp_path / ("w.safetensors" if wrapped == "safetensors" else "w.pth")
    if wrapped == "safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        state = model.state_dict()
        torch.save({"teacher": state} if wrapped == "teacher" else state, path)
    backbone = create_backbone(f"{repository}/dinov2_tiny?weights={path}")
    images = pictures(1, (28, 42))
    wanted = model.requires_grad_(False).forward_features(images)["x_norm_patchtokens"]
    assert torch.equal(backbone(images).features, grid_of(wanted, (2, 3)))


def test_wrong_weights(repository, tmp_path):
    folder = repository.removeprefix("hub:")
    other = torch.hub.load(folder, "dino_tiny8", source="local")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"lacks vit.reg_token; has unknown patch_embed.*has other shapes: "):
        create_backbone(f"{repository}/dinov2_tiny?weights={tmp_path}/other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        create_backbone(f"{repository}/dinov2_tiny?weights={tmp_path}/list.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"junk.pth cannot be read as a state dict"):
        create_backbone(f"{repository}/dinov2_tiny?weights={tmp_path}/junk.pth")
    with pytest.raises(ConfigError, match=r"no file or directory '/nowhere\.pth'"):
        create_backbone(f"{repository}/dinov2_tiny?weights=/nowhere.pth")


def test_missing_packages(tmp_path):
    (tmp_path / "hubconf.py").write_text("dependencies = ['a_package_that_is_not_there']\ndef vit(): pass\n")
    with pytest.raises(MissingDependencyError, match="needs packages; Missing dependencies: a_package_that_is_not"):
        create_backbone(f"hub:{tmp_path}/vit")
    (tmp_path / "hubconf.py").write_text("import another_package_that_is_not_there\n")
    with pytest.raises(MissingDependencyError, match=r"another_package_that_is_not_there.*install it"):
        create_backbone(f"hub:{tmp_path}/vit")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("/dinov3_tiny", "unknown entry of .*'dinov3_tiny'; did you mean 'dinov2_tiny'"),
        ("/dino_tiny8?layer=4", "4 blocks, 0 to 3; got layer=4"),
        ("/dino_tiny8?project=true", "has no option 'project'"),
        ("/dino_tiny8?mean=0.5,1", "three with commas"),
        ("/dino_tiny8?mean=0.5,nan,0.5", "three with commas, finite"),
        ("/dino_tiny8?pretrained=false&weights=w.pth", "leave out it or weights"),
        ("/dino_tiny8?std=1,1,0", "three with commas"),
        ("/dino_tiny8?img_size=30", "whole patches of 8; got img_size=30x30, the nearest is 32x32"),
        ("-not-there/dino_tiny8", "there is no hubconf.py in it"),
    ],
)
def test_wrong_names_and_options(repository, end, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"{repository}{end}")


def test_a_name_without_an_entry():
    with pytest.raises(ConfigError, match="write hub:OWNER/REPO"):
        create_backbone("hub:dinov2")


def test_it_trains(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    photos = Path("photos")
    photos.mkdir()
    for number in range(4):
        pixels = (torch.rand(120, 160, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(photos / f"{number}.png")
    overrides = [
        *("+model=toy-vit", "+upsampler=featsharp-2x", f"model.name='{repository}/dino_tiny8'"),
        *(f"train_data_dir={photos}", "batch_size=2", "num_workers=0", "num_training_steps=2", "log_frequency=1"),
        *("normalizer.num_samples=8", "normalizer.batch_size=4", "viz.num_images=1", "viz.type=none"),
        *("progress=false", "output_base=out"),
    ]
    assert main(overrides) == 0
    assert list(Path("out").rglob("last.pth"))
