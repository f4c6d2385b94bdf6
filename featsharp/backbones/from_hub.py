"""Modules of torch.hub repositories, by name: ``hub:OWNER/REPO[:REF]/ENTRY``, or ``hub:DIR/ENTRY`` for a local clone.

Such a repository is code that runs on this machine. It runs only when the name says ``?trust=true``, when it lies in
torch's hub cache already (nothing is fetched then), or when the name is a directory. A directory is a name that starts
with ``/``, ``./``, ``../`` or ``~``, or that has no owner in it.

A module is recognised by its methods: those of DINO, DINOv2 and DINOv3 (:class:`DinoBackbone`), those of RADIO
(:class:`RadioBackbone`); others are tried out, as :func:`featsharp.backbones.from_callable` does.

Not verified against the real repositories, whose code cannot be shipped: this follows their documented interfaces, and
tests run it on modules that have these. Every module is tried on a few images when it is built, so that a change of its
interface is an error there and not wrong features. In detail unverified: that RADIO's ``max_resolution`` holds for each
side, that its conditioner is a plain whitening (checked at run time), and that the blocks of DINOv3 keep ``attn.qkv``.
"""

import ast
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.adapters import FACETS, ModelBackbone, TokenBackbone, to_map
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from featsharp.backbones.from_callable import MIN_PROBE_GRID, Probe, check_grid_order, wrap_unknown
from featsharp.backbones.loading import (
    cannot_fetch,
    fill,
    find_weights,
    pair,
    seeded_weights,
    square_patch,
    whole_patches,
)
from featsharp.backbones.options import Options
from featsharp.checkpoint import read_state_dict
from featsharp.errors import ConfigError, MissingDependencyError, first_line, unknown_name
from featsharp.ops.resize import size_of

DEFAULT_SIZE = (224, 224)  # for modules that do not say theirs


def build(name: str, spec: str, options: Options) -> Backbone:
    """Build ``hub:OWNER/REPO[:REF]/ENTRY``.

    ``trust=true`` fetches and runs the code of the repository; ``version`` (for RADIO a local checkpoint too) and
    ``adaptor_names`` are handed to the entry; ``mean`` and ``std`` are the whitening where the module cannot say it,
    ImageNet's otherwise; ``pretrained=false`` and ``weights=FILE`` call the entry with ``pretrained=False``.

    Raises:
        ConfigError: For a repository that is not trusted, an unknown entry or option, or a module that cannot be
            understood.
        CheckpointError: For weights that do not fill the module exactly.
        MissingDependencyError: When the code, a package that it needs, or the weights cannot be had.
    """
    if PureWindowsPath(spec).drive:
        spec = PureWindowsPath(spec).as_posix()
    repository, slash, entry = spec.rpartition("/")
    if not (slash and entry):
        raise ConfigError(f"write hub:OWNER/REPO[:REF]/ENTRY or hub:DIR/ENTRY; got 'hub:{spec}'")
    arguments: dict[str, Any] = {}
    if options.version is not None:
        arguments["version"] = options.version
    if options.adaptor_names:
        arguments["adaptor_names"] = list(options.adaptor_names)
    if not options.pretrained or options.weights is not None:
        arguments["pretrained"] = False
    folder = _local_folder(repository)
    if folder is None and not options.trust:
        raise ConfigError(
            f"hub:{spec} runs code of the repository https://github.com/{repository.partition(':')[0]} on this "
            f"machine; if you trust it add ?trust=true, or clone it, look at it, and write hub:DIR/{entry}"
        )
    model = _load(name, repository, folder, entry, arguments)
    is_radio = callable(getattr(model, "make_preprocessor_external", None)) and hasattr(model, "patch_size")
    if is_radio and "pretrained" in arguments:
        raise ConfigError(f"hub:{spec} is a RADIO model, which takes its checkpoint as ?version=FILE, not as weights")
    if options.weights is not None:
        path = find_weights(options.weights, ("model.safetensors", "model.pth"))
        fill(model, read_state_dict(path), f"{path} is not a checkpoint of hub:{spec}")
    if is_radio:
        return RadioBackbone(name, model, options)
    # Transformers of timm share some of these methods.
    prepares = hasattr(model, "prepare_tokens") or hasattr(model, "prepare_tokens_with_masks")
    if prepares and hasattr(model, "get_intermediate_layers") and hasattr(model, "blocks"):
        return DinoBackbone(name, model, options)
    return wrap_unknown(
        name,
        model.forward_features if callable(getattr(model, "forward_features", None)) else model,
        options,
        input_size=options.img_size or DEFAULT_SIZE,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
    )


class DinoBackbone(TokenBackbone):
    """A transformer with the methods of DINO or DINOv2; features are patch tokens after the final norm.

    The two differ in what they return: DINOv2 (and DINOv3, which kept the methods) gives ``forward_features`` as a
    mapping with ``x_norm_patchtokens`` and ``x_norm_clstoken``; DINO gives ``get_intermediate_layers(x, n)`` as all
    tokens of the last n blocks. Both norm what they return, and resample positions at other sizes by themselves.

    The summary is the final class token. Facets are the output of the packed projection ``blocks[i].attn.qkv``.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The module, native at the size of its ``patch_embed``.
        options: Layers, facet, summary and whitening, which is else ImageNet's, with which they were trained.
    """

    def __init__(self, name: str, model: Any, options: Options) -> None:
        patch_size, width = square_patch(name, model.patch_embed.patch_size), model.embed_dim
        super().__init__(
            name,
            model,
            options,
            _flat(model.blocks),
            width=width,
            summaries={"cls": width},
            patch_size=patch_size,
            input_size=whole_patches(model.patch_embed.img_size, patch_size),
            mean=options.mean or IMAGENET_MEAN,
            std=options.std or IMAGENET_STD,
        )
        self.gives_mapping = hasattr(model, "prepare_tokens_with_masks")
        _self_test(self)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        if self.gives_mapping:
            named = self.model.forward_features(images)
            return named["x_norm_patchtokens"], named["x_norm_clstoken"]
        tokens = self.model.get_intermediate_layers(images, 1)[0]
        return tokens, tokens[:, 0]

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def source(self, block: Any) -> nn.Module:
        packed = getattr(getattr(block, "attn", None), "qkv", None)
        if packed is None:
            raise ConfigError(
                f"the blocks of backbone {self.name!r} have no attn.qkv, from which a facet could be taken"
            )
        return packed

    def take(self, block: Any, tensor: Any, grid: tuple[int, int]) -> Tensor:
        tokens = tensor[0] if isinstance(tensor, list) else tensor  # DINOv3 hands on lists of one
        return tokens if self.options.facet == "token" else tokens.chunk(3, -1)[FACETS.index(self.options.facet)]

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return output


class RadioBackbone(ModelBackbone):
    """A module with the interface of NVIDIA's RADIO: images in [0, 1] to (summary, spatial features).

    Its conditioner is taken out with ``make_preprocessor_external()`` and becomes ``mean`` and ``std``. It skips class
    and register tokens by itself, and at other sizes, non-square ones too, crops its position table (CPE). Sizes are
    multiples of ``min_resolution_step`` up to ``max_resolution``; ``preferred_resolution`` is the native one.

    With ``adaptor_names`` it returns a mapping, of which the features and summaries of the named adaptors are taken,
    concatenated on the channel axis.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The module.
        options: The summary ("default", the model's own; "mean" or "none") and ``adaptor_names``.
    """

    def __init__(self, name: str, model: Any, options: Options) -> None:
        if options.inner:
            raise ConfigError(
                f"backbone {name!r} shows its final features only; leave out layer and facet, or take a RADIO model of "
                f"timm (timm.list_models('*radio*'))"
            )
        if options.mean or options.std:
            given = " and ".join(key for key in ("mean", "std") if getattr(options, key))
            raise ConfigError(f"backbone {name!r} brings its own whitening; leave out {given}")
        mean, std = _whitening_of(name, model.make_preprocessor_external())
        patch_size = pair(model.patch_size)[0]
        step = getattr(model, "min_resolution_step", None) or patch_size
        limit = getattr(model, "max_resolution", None)
        super().__init__(
            name,
            model,
            options,
            summaries={"default": 0},
            step=step,
            patch_size=patch_size,
            embed_dim=0,  # measured below, as is the width of the summary: adaptors and versions differ
            input_size=_resolution(model.preferred_resolution),
            mean=mean,
            std=std,
        )
        self.max_side = None if limit is None else min(_resolution(limit)) // step * step
        size = self.fit_size(MIN_PROBE_GRID * patch_size, (MIN_PROBE_GRID + 1) * patch_size)
        with torch.no_grad():
            features, summary = self.extract(Probe(model, name, size, None).images(size))
        self.embed_dim, self.summary_dim = features.shape[1], None if summary is None else summary.shape[1]
        _self_test(self)

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest multiples of the model's step, none above its maximum."""
        rows, columns = super().fit_size(height, width)
        return (rows, columns) if self.max_side is None else (min(rows, self.max_side), min(columns, self.max_side))

    def encode(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        raw = self.model(images)
        # Without adaptors it is the pair itself, with them a mapping from names to pairs.
        pairs = [raw[name] for name in self.options.adaptor_names] or [raw]
        grid = self.grid_size(size_of(images))
        maps = [tokens if tokens.ndim == 4 else to_map(tokens, grid) for _, tokens in pairs]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1), [summary for summary, _ in pairs], None

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        return torch.cat(end, 1)


def _self_test(backbone: Backbone) -> None:
    """Foreign code can change under its name: shapes, finite values and the order of the grid are tried once."""
    p = backbone.patch_size
    size = backbone.fit_size(MIN_PROBE_GRID * p, (MIN_PROBE_GRID + 1) * p)
    model = backbone.model
    assert isinstance(model, nn.Module)
    images = Probe(model, backbone.name, size, None).images(size)
    try:
        check_grid_order(backbone, images)
    except ConfigError:
        raise
    except Exception as error:  # whatever foreign code raises, the message has to say what was tried
        raise ConfigError(
            f"{backbone.name!r} does not answer as modules of its kind do, on images of {size[0]}x{size[1]} pixels "
            f"({first_line(error)}); load it with torch.hub and wrap it with featsharp.backbones.from_callable"
        ) from error


def _whitening_of(name: str, conditioner: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a conditioner that whitens each channel; computed from its results for 0 and 1."""
    exact = copy.deepcopy(conditioner).double()
    pixels = torch.linspace(0, 1, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
    with torch.no_grad():
        black, white = (exact(torch.full_like(pixels, level))[0, :, 0, 0] for level in (0.0, 1.0))
        std = 1 / (white - black)
        mean = -black * std
        whitened = (pixels - mean[:, None, None]) / std[:, None, None]
        if not torch.allclose(exact(pixels), whitened, atol=1e-6):
            raise ConfigError(
                f"the conditioner of backbone {name!r} does more than to whiten each channel; wrap the module with "
                f"featsharp.backbones.from_callable"
            )
    return tuple(mean.tolist()), tuple(std.tolist())


def _flat(blocks: nn.ModuleList) -> list[Any]:
    """The blocks; DINOv2 in training groups them into lists that are padded with identities."""
    if not any(isinstance(block, nn.ModuleList) for block in blocks):
        return list(blocks)
    chunks: list[Any] = list(blocks)
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def _resolution(value: Any) -> tuple[int, int]:
    """An int, a pair, or RADIO's object with height and width."""
    return (value.height, value.width) if hasattr(value, "height") else pair(value)


def _local_folder(repository: str) -> Path | None:
    """The directory with the code: the one that is named, or that of torch's hub cache; None when it is not here."""
    named = re.fullmatch(r"([\w.-]+)/([\w.-]+)(?::(.+))?", repository)
    if repository.startswith(("/", "./", "../", "~")) or named is None:
        folder = Path(repository).expanduser()
        if not (folder / "hubconf.py").is_file():
            raise ConfigError(f"{folder} is no torch.hub repository: there is no hubconf.py in it")
        return folder
    owner, project, ref = named.groups()
    for branch in [ref] if ref else ["main", "master"]:
        folder = Path(torch.hub.get_dir()) / f"{owner}_{project}_{branch.replace('/', '_')}"
        if (folder / "hubconf.py").is_file():
            return folder
    return None


def _load(name: str, repository: str, folder: Path | None, entry: str, arguments: dict[str, Any]) -> Any:
    """Call the entry; random weights are the same at every call."""
    with _explained(name, repository, folder, entry, arguments), seeded_weights():
        if folder is None:
            model = torch.hub.load(repository, entry, trust_repo=True, **arguments)
        else:  # the cache too: by its name torch would ask the network for the branch
            model = torch.hub.load(str(folder), entry, source="local", **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"backbone {name!r} returns a {type(model).__name__}, not a module")
    return model.eval()


@contextmanager
def _explained(
    name: str, repository: str, folder: Path | None, entry: str, arguments: dict[str, Any]
) -> Iterator[None]:
    """Turn errors of foreign code into errors of the package, with the remedy."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"the code of {name!r} needs a package ({error}); install it") from error
    except Exception as error:
        # Where it cannot ask for a branch, torch raises a RuntimeError from the URLError.
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            command = f"python -c \"import torch; torch.hub.load('{repository}', '{entry}')\""
            raise cannot_fetch(name, error, command) from error
        if str(error).startswith("Missing dependencies"):  # torch, about the list of that name in hubconf.py
            raise MissingDependencyError(f"the code of {name!r} needs packages; {first_line(error)}") from error
        if str(error).startswith("Cannot find callable") and folder is not None:
            raise unknown_name(f"entry of {folder}:", entry, _entries(folder)) from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise ConfigError(
            f"the entry {entry!r} of {repository} fails with {given}: {first_line(error)}; not every entry takes "
            f"pretrained (RADIO takes its checkpoint as ?version=FILE) or version"
        ) from error


def _entries(folder: Path) -> list[str]:
    """Names that hubconf.py defines or imports for others, read without running it."""
    names: list[str] = []
    for node in ast.parse((folder / "hubconf.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return [name for name in names if not name.startswith("_")]
