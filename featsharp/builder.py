"""From names and files to sharp encoders, and back to files and the Hub."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from featsharp.backbones import create_backbone, runs_code
from featsharp.backbones.base import Backbone
from featsharp.card import MADE, write_card
from featsharp.checkpoint import (
    ENCODER_FILE,
    WEIGHTS_SUFFIX,
    describe_mismatch,
    read_checkpoint,
    restoring,
    write_checkpoint,
)
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError, shorten, unknown_name
from featsharp.files import write_file
from featsharp.layers.bias_buffer import BiasBuffer
from featsharp.layers.spectral import folded_state
from featsharp.model import SharpEncoder as Model
from featsharp.names import is_function_name, parse_upsampler, plain_value
from featsharp.normalizers import NORMALIZERS
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import Upsampler
from featsharp.upsamplers.registration import create_upsampler, read_trait, resolve_upsampler
from featsharp.weights import HOME, hub, list_weights
from featsharp.weights.published import refuse_published


class SharpEncoder(Model):
    """The sharp encoder of ``featsharp.model`` that is built here, so that it can be loaded and saved by name.

    Attributes:
        facts: Record of its training in its file: ``config``, ``step``, or ``card`` for weights that ship; else empty.
    """

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.facts: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> "SharpEncoder":
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote; only safetensors are read.

        Args:
            name: A folder, or "owner/name" of a repository of the Hub, whose files go to the Hub's cache.
            revision: Branch, tag or commit; None: the main branch.
            token: Of the Hub; None: the one of ``hf auth login``.
            cache_dir: In place of the Hub's cache.
            force_download: Whether to fetch what is in the cache, too.
            local_files_only: Whether to look in the cache alone, as HF_HUB_OFFLINE=1 makes all calls do.
            options: Of :func:`load_from_file`: featurizer, max_memory, allow_functions.

        Raises:
            CheckpointError: When it cannot be fetched, or as for :func:`load_from_file`.
            MissingDependencyError: For a repository, without huggingface_hub.
        """
        path = Path(name) / hub.WEIGHTS_FILE
        if not Path(name).is_dir():
            path = hub.fetch_file(
                str(name),
                hub.WEIGHTS_FILE,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        return load_from_file(path, **options)

    def save_pretrained(
        self, folder: str | PathLike[str], *, licence: str | None = None, sections: Mapping[str, str] | None = None
    ) -> None:
        """Write weights as :func:`save_weights` does, ``config.json``, and a model card from what is known of them.

        Args:
            folder: Is made; files in it of these names are replaced, but for a card that was not made here.
            licence: SPDX identifier of the weights, such as "apache-2.0", for the card.
            sections: Text of the card below headings such as "Data", "Recipe" and "Figures". What the file that this
                encoder was loaded from says of its training is there already.

        Raises:
            CheckpointError: As for :func:`save_weights`.
            FeatSharpError: When the folder cannot be written.
        """
        folder = Path(folder)
        save_weights(self, folder / hub.WEIGHTS_FILE)
        config = {"library": "featsharp", "version": ENCODER_FILE.version, **_describe(self)}
        write_file(folder / hub.CONFIG_FILE, f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
        card = folder / hub.CARD_FILE
        if not card.exists() or MADE.encode() in card.read_bytes():
            write_file(card, write_card(self, self.facts, sections or {}, licence=licence).encode())

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Sharp encoder",
        licence: str | None = None,
        sections: Mapping[str, str] | None = None,
    ) -> str:
        """Push what :meth:`save_pretrained` writes to a repository of the Hub, made where it does not exist.

        Args:
            repository: "owner/name".
            private: Of a new repository; None: as its owner has set.
            token: With the right to write; None: the one of ``hf auth login``.
            message: Of the commit, whose address is returned.
            licence: See :meth:`save_pretrained`.
            sections: See :meth:`save_pretrained`.

        Raises:
            CheckpointError: When that fails.
            MissingDependencyError: Without huggingface_hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, licence=licence, sections=sections)
            return hub.push_folder(Path(folder), repository, message=message, private=private, token=token)


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def create_encoder(
    backbone: str | Backbone,
    upsampler: str | Upsampler,
    factor: float | None = None,
    *,
    upsampler_options: Mapping[str, Any] | None = None,
    normalizer: str = "none",
    bias_buffer: bool = False,
    max_memory: int | str | None = None,
) -> SharpEncoder:
    """Build an untrained sharp encoder from names or objects.

    Args:
        backbone: A name of ``list_backbones()`` or a backbone (see ``from_callable`` for your own model).
        upsampler: A name of ``list_upsamplers()``, also with its factor and options as "views-2x?passes=4", or an
            upsampler built for that backbone.
        factor: Factor in each direction, at least 1, fractions for methods that allow them; None: that of the name,
            else 2 (1 for methods that have no other). Refused if it contradicts the name or the object.
        upsampler_options: Keyword arguments of the upsampler's class; only with a name.
        normalizer: "none", or one of ``featsharp.normalizers.list_normalizers()``, to be fitted before use.
        bias_buffer: Whether to add a bias buffer (zero until trained).
        max_memory: Limit of the memory that encoding takes, in bytes or as "2GiB"; see ``SharpEncoder.max_memory``.

    Returns:
        The encoder in eval mode, on the CPU.

    Example:
        >>> encoder = create_encoder("toy-vit", "bilinear", 2)
        >>> encoder(torch.randn(1, 3, 96, 64)).high_res.shape
        torch.Size([1, 32, 24, 16])
    """
    backbone = create_backbone(backbone)
    options = plain_value(upsampler_options or {})
    if isinstance(upsampler, Upsampler):
        if options or factor not in (None, upsampler.factor):
            raise ConfigError(
                f"an upsampler object brings its own factor ({upsampler.factor}) and options; leave them out"
            )
        module, name = upsampler, None
    else:
        name, factor, options = resolve_upsampler(upsampler, factor, options)
        module = create_upsampler(name, backbone, factor, options=options)
    grid = backbone.grid_size(backbone.input_size)
    encoder = SharpEncoder(
        backbone,
        module,
        NORMALIZERS[normalizer].factory(backbone.embed_dim),
        BiasBuffer(backbone.embed_dim, grid) if bias_buffer else None,
        max_memory=max_memory,
    )
    encoder.recipe = {
        "upsampler": name,
        "factor": module.factor,
        "options": options,
        "normalizer": normalizer,
        "bias_buffer": bias_buffer,
    }
    return encoder.eval()


def load_from_file(
    path: str | PathLike[str],
    *,
    featurizer: str | Backbone | None = None,
    max_memory: int | str | None = None,
    allow_functions: bool = False,
) -> SharpEncoder:
    """Load a sharp encoder from a checkpoint, or build a training-free one from a pseudo-path.

    Args:
        path: A checkpoint file, or an upsampler that needs no training with its factor and options: ``"tile-2x"``,
            ``"bilinear-1.5x"`` (``"bilinear"`` is 2x), ``"views-2x?passes=4"``, or your function
            ``"package.module:function-2x"`` (see :func:`featsharp.upsamplers.from_function`), which is imported.
            Weights that come with the package have names such as ``"vits14-focus/featsharp-2x"``, beside its backbone
            ``"featsharp-2x"``; ``featsharp.weights.list_weights()`` has them all.
        featurizer: The backbone. Needed for pseudo-paths and for checkpoints of a backbone that cannot be built by
            name; otherwise the checkpoint's backbone is built. One that the checkpoint was not trained for is refused.
        max_memory: Limit of the memory that encoding takes, in bytes or as "2GiB"; see ``SharpEncoder.max_memory``.
        allow_functions: Whether a checkpoint may name functions to import ("custom" and "super-resolution" do), or a
            backbone whose repository runs code ("hub:", "trust=true"). Only for files that you trust.

    Returns:
        The encoder in eval mode, on the CPU, without gradients; ``encoder.upsampler.requires_grad_()`` turns them on
        for fine-tuning.

    Raises:
        CheckpointError: When the file is missing, damaged or unsafe, or its tensors do not fit.
        BackboneMismatchError: When ``featurizer`` is not the backbone that the checkpoint was trained for.
    """
    if isinstance(featurizer, str) and f"{featurizer}/{path}" in list_weights():
        path = f"{featurizer}/{path}"
    if not Path(path).exists() and _is_upsampler(str(path)):
        if featurizer is None:
            raise ConfigError(
                f"{path} is no file but an untrained upsampler; give it a backbone: featurizer='vits14-focus' "
                "(--backbone on the command line)"
            )
        return _untrained_encoder(featurizer, str(path), max_memory)
    if torch.get_default_device().type == "meta":
        raise ConfigError(
            f"{path} cannot be loaded under torch's default device meta, which holds no values; load it outside, or "
            "build with create_encoder there and load its state_dict after to_empty()"
        )
    path = _find_file(path)
    content = read_checkpoint(path)
    with restoring(path):
        saved = content["encoder"]
        if featurizer is None and runs_code(saved["backbone"]["name"]) and not allow_functions:
            raise CheckpointError(
                f"checkpoint {path} was trained for backbone {saved['backbone']['name']!r}, whose repository would run "
                "code of its own; pass featurizer= (--backbone on the command line), or allow_functions=True"
            )
        backbone = _backbone_for(saved["backbone"], featurizer, path)
        recipe = saved["recipe"]
        if not allow_functions:
            _refuse_functions(recipe, path)
        encoder = create_encoder(
            backbone,
            recipe["upsampler"],
            recipe["factor"],
            upsampler_options=recipe["options"],
            normalizer=recipe["normalizer"],
            bias_buffer=recipe["bias_buffer"],
            max_memory=max_memory,
        )
        load_model_state(encoder, content["model"], path)
        encoder.facts = _read_facts(content, path)
    return encoder.eval().requires_grad_(False)


def _read_facts(content: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Any]:
    """Collect the record of the training from a file."""
    facts = {"config": content["config"], "step": (content["training"] or {}).get("step")}
    card = Path(path).with_suffix(".md")
    if HOME in Path(path).parents and card.is_file():
        facts["card"] = card.read_text(encoding="utf-8")
    return {key: value for key, value in facts.items() if value is not None}


def _find_file(path: str | PathLike[str]) -> str | PathLike[str]:
    """Return the path itself, or that of shipped weights of this name."""
    if Path(path).is_file():
        return path
    shipped = HOME / f"{path}{WEIGHTS_SUFFIX}"
    if shipped.is_file():
        return shipped
    if Path(path).suffix not in (".pth", WEIGHTS_SUFFIX):
        refuse_published(str(path))
        unknown = unknown_name("upsampler", parse_upsampler(str(path)).name, [*UPSAMPLERS, *list_weights()])
        raise CheckpointError(f"checkpoint {path} does not exist; {unknown}")
    return path


def _is_upsampler(text: str) -> bool:
    """Return whether a pseudo-path names an upsampler, or a function with a factor."""
    parsed = parse_upsampler(text, UPSAMPLERS)
    return parsed.name in UPSAMPLERS or (is_function_name(parsed.name) and parsed.factor is not None)


def _untrained_encoder(featurizer: str | Backbone, text: str, max_memory: int | str | None) -> SharpEncoder:
    """Build the encoder of a pseudo-path."""
    name, factor, options = resolve_upsampler(text, functions=True)
    if read_trait(name, "trainable"):
        raise ConfigError(
            f"{name} has to be trained; give a checkpoint of it, or build it untrained: "
            f"create_encoder(backbone, {name!r}, {factor:g})"
        )
    return create_encoder(featurizer, name, factor, upsampler_options=options, max_memory=max_memory)


def _refuse_functions(recipe: Mapping[str, Any], path: object) -> None:
    """Raise CheckpointError where a recipe would import code."""
    options = read_trait(recipe["upsampler"], "function_options")
    named = [f"{key}={recipe['options'][key]!r}" for key in options if key in recipe["options"]]
    if named:
        raise CheckpointError(
            f"checkpoint {path} would import code: {', '.join(named)}. If you trust it, load it with "
            "allow_functions=True (--allow-functions on the command line)"
        )


def save_checkpoint(
    encoder: Model,
    path: str | PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that rebuilds the encoder; of the backbone's weights it has only the hash.

    Args:
        encoder: Built by :func:`create_encoder` with an upsampler named in the registry.
        path: An existing file is replaced atomically.
        config: The configuration it was trained with, plain values.
        training: Optimiser and other states for a resumed run.
    """
    encoder = _unwrapped(encoder)
    content = {
        "encoder": _describe(encoder),
        "model": model_state(encoder),
        "config": None if config is None else dict(config),
        "training": None if training is None else dict(training),
    }
    write_checkpoint(path, content)


def save_weights(encoder: Model, path: str | PathLike[str]) -> None:
    """Write a small file for inference: no training state, and the upsampler in half precision.

    :func:`load_from_file` reads it like a checkpoint, in float32. Normalizer and bias buffer stay in float32: their
    rounding would directly change the features.

    Args:
        encoder: As for :func:`save_checkpoint`.
        path: Ends in ".safetensors"; an existing file is replaced atomically.

    Raises:
        CheckpointError: For another suffix, or weights beyond the range of half precision.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != WEIGHTS_SUFFIX:
        raise CheckpointError(f"weights go to a file that ends in {WEIGHTS_SUFFIX}; got {path.name}")
    encoder = _unwrapped(encoder)
    header = {"format": ENCODER_FILE.format, "version": str(ENCODER_FILE.version)}
    header["encoder"] = json.dumps(_describe(encoder))
    state = model_state(encoder)
    for name, tensor in state.items():
        if name.startswith("upsampler.") and tensor.is_floating_point():
            state[name] = tensor.half()
            if not state[name].isfinite().all():
                raise CheckpointError(f"{name} has values that half precision cannot hold; keep the checkpoint")
    write_file(path, save(state, header))


def _unwrapped(encoder: Any) -> Model:
    """Return the encoder in a DataParallel, DistributedDataParallel or compiled module, or itself."""
    for wrapper in ("module", "_orig_mod"):
        encoder = getattr(encoder, wrapper, encoder)
    if not isinstance(encoder, Model):
        raise CheckpointError(f"checkpoints hold sharp encoders, from create_encoder; got {type(encoder).__name__}")
    return encoder


def _describe(encoder: Model) -> dict[str, Any]:
    """Describe how to rebuild an encoder, as JSON values; CheckpointError where that is not possible."""
    if encoder.recipe.get("upsampler") is None:
        raise CheckpointError(
            "this encoder was built from an upsampler object, which no file can name; register its class with "
            "@register_upsampler and build it by name"
        )
    objects = [key for key, value in encoder.recipe["options"].items() if not _is_plain(value)]
    if objects:
        raise CheckpointError(
            f"option {objects[0]} of this encoder is a Python object, which no file can hold; build it with plain "
            "values, a function by its name 'module:function'"
        )
    return {"backbone": encoder.backbone.describe(), "recipe": encoder.recipe}


def _is_plain(value: object) -> bool:
    """Check that a value consists of JSON types, which a checkpoint can hold."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    return value is None or type(value) in (bool, int, float, str)


def model_state(encoder: Model) -> dict[str, torch.Tensor]:
    """Collect the tensors of an encoder but its backbone's, on the CPU, with spectral factors folded into weights.

    The names are those of parts that are not compiled.
    """
    state = {f"upsampler.{key}": value for key, value in folded_state(encoder.upsampler).items()}
    state |= {f"normalizer.{key}": value for key, value in encoder.normalizer.state_dict().items()}
    if encoder.bias_buffer is not None:
        state |= {f"bias_buffer.{key}": value for key, value in encoder.bias_buffer.state_dict().items()}
    return {key.replace("_orig_mod.", ""): value.detach().cpu().contiguous() for key, value in state.items()}


def content_key(encoder: Model) -> str:
    """Hash all that determines an encoder's features: its backbone with weights, its recipe, its other weights.

    Encoders of one key give the same features, except under autocast. Code of the user is not part of it.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    recipe = encoder.recipe | {"upsampler": encoder.recipe.get("upsampler") or repr(encoder.upsampler)}
    digest.update(json.dumps([encoder.backbone.describe(), recipe], sort_keys=True, default=str).encode())
    for name, value in sorted(model_state(encoder).items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model_state(encoder: Model, state: Mapping[str, torch.Tensor], source: object) -> None:
    """Load :func:`model_state` into an encoder; missing, surplus, misshapen and NaN tensors are errors."""
    expected = {key: value for key, value in encoder.state_dict().items() if not key.startswith("backbone.")}
    if problems := describe_mismatch(state, expected):
        raise CheckpointError(f"checkpoint {source} {problems}")
    types = [
        f"{key} {state[key].dtype} instead of {expected[key].dtype}"
        for key in sorted(state)
        if expected[key].is_floating_point() != state[key].is_floating_point()
    ]
    diverged = [key for key, value in sorted(state.items()) if not value.isfinite().all()]
    for problem, keys in (("has other types:", types), ("holds NaN or infinite values in", diverged)):
        if keys:
            raise CheckpointError(f"checkpoint {source} {problem} {shorten(keys)}")
    encoder.load_state_dict(state, strict=False)


def _backbone_for(saved: Mapping[str, Any], featurizer: str | Backbone | None, path: object) -> Backbone:
    """Build the checkpoint's backbone, or take the given one, and check that it is the same."""
    try:
        backbone = create_backbone(saved["name"] if featurizer is None else featurizer)
    except ConfigError as error:
        if featurizer is not None:
            raise
        raise CheckpointError(
            f"checkpoint {path} was trained for backbone {saved['name']!r}, which cannot be built by name; pass the "
            "same backbone as featurizer="
        ) from error
    check_backbone(backbone, saved, path)
    return backbone


def check_backbone(backbone: Backbone, saved: Mapping[str, Any], path: object) -> None:
    """Raise BackboneMismatchError unless ``backbone`` is the one that the checkpoint at ``path`` describes."""
    present = backbone.describe()
    # The name is not compared: two wrappers of one model may have different ones.
    different = [
        f"{key} {_short(present[key])} instead of {_short(saved[key])}"
        for key in ("patch_size", "embed_dim", "input_size", "mean", "std", "features", "weights_sha256")
        if key in saved and present[key] != saved[key]
    ]
    if different:
        raise BackboneMismatchError(
            f"checkpoint {path} was trained for backbone {saved['name']!r}, not for this {present['name']!r}: "
            + "; ".join(different)
        )


def _short(value: object) -> str:
    """Shorten a hash to its first digits."""
    return value[:12] if isinstance(value, str) else str(value)
