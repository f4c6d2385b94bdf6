"""Sharp encoders as programs that run without this package: ONNX files and those of torch.export.

A program takes whitened images [B, 3, H, W] and returns the maps ``low_res`` and ``high_res``, and ``summary`` where
the backbone has one. The batch is open; with ``dynamic`` height and width are, in steps of :func:`size_step`. What was
recorded is looked at for fixed axes and operators of ours, and run on batches and sizes that it was not recorded with,
before the file is written.
"""

import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError, ExportError, FeatSharpError, MissingDependencyError
from featsharp.files import write_file
from featsharp.model import SharpEncoder
from featsharp.ops.resize import check_size

logger = logging.getLogger(__name__)

INPUT = "images"
OPSET = 20  # of ONNX; the first with antialiased resizing by all modes that is common
INSTALL = 'pip install "featsharp[onnx]"'
FEWEST_STEPS, MOST_STEPS = 3, 128  # of a side; torch records lengths of one by rules of their own, as half of two
MOST_BYTES = 2**31 - 2**20  # of a protocol buffer
# Largest error allowed when a program is run, in standard deviations of the map; a graph of one size is off by about 1.
TOLERANCE = 1e-3
# Where rounding grows (anyup divides by small deviations, loftup has high frequencies) more is allowed: so many times
# what the encoder's own maps change when every pixel changes by its last bit.
LAST_BITS = 10
# Methods of which ONNX Runtime computes something else, and why.
NO_ONNX = {"anyup": "it divides by small deviations, by which rounding grows to .04 standard deviations of the map"}
METADATA = "featsharp.json"  # in a file of torch.export

Program = Callable[[Tensor], list[Tensor]]


def export_encoder(
    encoder: SharpEncoder,
    path: Path,
    form: str,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write an encoder as a program; an earlier file is replaced when the new one is whole and was run.

    Args:
        encoder: On the CPU, in eval mode, without ``max_memory``.
        path: Of the file.
        form: "onnx" or "torch-export".
        dynamic: Whether height and width are open beside the batch.
        size: (h, w) in pixels of the images of a program that has one size; None: ``encoder.input_size``.

    Returns:
        What the file says of itself, as :func:`describe`; "error" is the largest difference from the encoder when the
        program was run, in standard deviations of the map, None where onnxruntime is not installed.

    Raises:
        ConfigError: For an unknown form, or a method or backbone that has one size.
        ExportError: For an encoder that cannot be recorded, or whose program fixes an axis or computes something else.
        MissingDependencyError: Without onnx and onnxscript, or with a torch that is too old.
    """
    if form not in ("onnx", "torch-export"):
        raise ConfigError(f"unknown form {form!r} of programs; use 'onnx' or 'torch-export'")
    _check_packages(form)
    reason = NO_ONNX.get(str(encoder.recipe.get("upsampler"))) if form == "onnx" else None
    if reason is not None:
        raise ExportError(f"{encoder.caption} is not written as ONNX: {reason}; use --format torch-export")
    if encoder.max_memory is not None:
        raise ConfigError("a program has no limit on memory; set max_memory to None before exporting")
    if dynamic and not encoder.backbone.flexible:
        raise ConfigError(
            f"backbone {encoder.backbone.name!r} takes images of one size; export it without dynamic (--dynamic)"
        )
    if dynamic and size is not None:
        raise ConfigError("size= is for a program of one size; leave it out with dynamic=True")
    step = size_step(encoder)
    fixed = None if dynamic else check_size("size", size or encoder.input_size, "pixels")
    about = describe(encoder, form, fixed)
    module = _Maps(encoder, fixed).eval()
    samples = [(2, (4 * step, 3 * step)), (1, (3 * step, 5 * step)), (3, (5 * step, 3 * step))]
    if fixed is not None:
        samples = [(2, fixed), (1, fixed), (3, fixed)]
    images = [torch.randn(batch, 3, *side, generator=torch.Generator().manual_seed(0)) for batch, side in samples]
    images = [image.to(encoder.dtype) for image in images]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _record(module, images[0], step if dynamic else None, encoder.caption)
        content, run = (_to_onnx if form == "onnx" else _to_archive)(program, about, encoder.caption)
        about["error"] = None if run is None else max(_compare(module, run, image, encoder) for image in images[1:])
    write_file(path, content)
    return about


def size_step(encoder: SharpEncoder) -> int:
    """Compute the step in pixels of open sides: an even number of whole patches of both passes."""
    factor = encoder.upsampler.input_upsample_factor
    return encoder.patch_size * math.lcm(2, int(factor) if factor == int(factor) else 2)


def describe(encoder: SharpEncoder, form: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Describe what whoever runs a program has to know, as JSON values; ``size`` (h, w) is None where it is open."""
    from featsharp import __version__

    outputs = ["low_res", "high_res", *(["summary"] if encoder.backbone.summary_dim is not None else [])]
    return {
        "featsharp": __version__,
        "backbone": encoder.backbone.name,
        "upsampler": encoder.caption,
        "factor": encoder.factor,
        "mean": list(encoder.backbone.mean),
        "std": list(encoder.backbone.std),
        "patch_size": encoder.patch_size,
        "space": "backbone" if encoder.normalizer.invertible else type(encoder.normalizer).__name__,
        "input": INPUT,
        "outputs": outputs,
        "input_size": list(encoder.input_size if size is None else size),
        "size_step": size_step(encoder) if size is None else None,
        **({"opset": OPSET} if form == "onnx" else {"torch": torch.__version__}),
    }


class _Maps(nn.Module):
    """An encoder whose results are a plain tuple, and whose sizes are whole numbers of steps."""

    def __init__(self, encoder: SharpEncoder, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size
        factor = encoder.upsampler.input_upsample_factor
        if size is None and factor != int(factor):
            raise ExportError(
                f"{encoder.caption} places tiles by the size of the picture, since its factor is not whole; export it "
                "for one size (without --dynamic)"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder, low_res_size = self.encoder, None
        if self.size is None:  # as the encoder does, without rounding
            factor = int(encoder.upsampler.input_upsample_factor)
            low_res_size = images.shape[2] // factor, images.shape[3] // factor
        out = encoder(
            images,
            denormalize=encoder.normalizer.invertible,
            return_summary=encoder.backbone.summary_dim is not None,
            low_res_size=low_res_size,
        )
        return tuple(x for x in out if x is not None)


def _record(module: nn.Module, images: Tensor, step: int | None, caption: str) -> Any:
    """Record a program with an open batch and, given a step, open sides."""
    from torch.export import Dim, export

    axes: dict[int, Any] = {0: Dim("batch", min=1, max=1024)}
    if step is not None:
        steps = {"min": FEWEST_STEPS, "max": MOST_STEPS}
        axes |= {axis: step * Dim(name, **steps) for axis, name in ((2, "rows"), (3, "columns"))}
    try:
        program = export(module, (images,), dynamic_shapes=(axes,), strict=False)
    except ConfigError as error:  # of a method that has one size
        raise ConfigError(f"{caption} cannot be recorded: {error}") from error
    except FeatSharpError:
        raise
    except Exception as error:  # of many classes, for all that a graph cannot say
        raise _cannot(caption, "recorded with an open batch" + (" and open sizes" if step else ""), error) from error
    ours = {str(node.target) for node in program.graph.nodes if "featsharp" in str(node.target)}
    if ours:
        raise ExportError(
            f"the program of {caption} needs operators of this package ({', '.join(sorted(ours))}); export it outside "
            "of use_backend()"
        )
    return program


def _to_archive(program: Any, about: dict[str, Any], caption: str) -> tuple[bytes, Program]:
    """Save a program for ``torch.export.load``: the bytes, and a function that runs it."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(about)})
    module = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda images: list(module(images))


def _to_onnx(program: Any, about: dict[str, Any], caption: str) -> tuple[bytes, Program | None]:
    """Translate a program to ONNX: the bytes, and a function that runs it where onnxruntime is installed."""
    try:
        model = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=about["outputs"],
            verbose=False,
        ).model_proto  # type: ignore[union-attr]
    except Exception as error:
        is_open = about["size_step"] is not None
        what = "translated to ONNX" + (" with open height and width" if is_open else "")
        advice = "write one size (--size, without --dynamic), or " if is_open else ""
        raise _cannot(caption, what, error, f"; {advice}use --format torch-export") from error
    for name, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    if fixed := list(_fixed_axes(model, is_open=about["size_step"] is not None)):
        raise ExportError(f"the ONNX graph of {caption} fixes {', '.join(fixed)}, which should be open")
    if model.ByteSize() > MOST_BYTES:
        raise ExportError(f"{caption} has more than 2 GiB, too much for one ONNX file; use --format torch-export")
    content = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        logger.warning("onnxruntime is not installed, so the program was not run: %s", INSTALL)
        return content, None
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _cannot(caption, "loaded by ONNX Runtime", error) from error
    return content, lambda images: [torch.from_numpy(x) for x in session.run(None, {INPUT: images.numpy()})]


def _fixed_axes(model: Any, *, is_open: bool) -> Iterator[str]:
    """Yield axes of inputs and outputs that a graph fixes though they should be open."""
    for value in (*model.graph.input, *model.graph.output):
        names = ("batch", None, "height", "width") if is_open else ("batch",)
        for name, axis in zip(names, value.type.tensor_type.shape.dim, strict=False):
            if name is not None and not axis.dim_param:
                yield f"{name} of {value.name} at {axis.dim_value}"


def _compare(module: nn.Module, run: Program, images: Tensor, encoder: SharpEncoder) -> float:
    """Run a program and compare it with the encoder: the largest error, in standard deviations of the map."""
    shape = "x".join(map(str, images.shape))
    try:
        found = run(images)
    except Exception as error:
        raise _cannot(encoder.caption, f"run on other images ({shape}) than it was recorded with", error) from error
    wanted = module(images)
    for out, expected in zip(found, wanted, strict=True):
        if out.shape != expected.shape:
            raise ExportError(
                f"the program of {encoder.caption} gives maps {tuple(out.shape)} instead of {tuple(expected.shape)} of "
                f"images {shape}; it holds for the size that it was recorded with"
            )
    worst, limit = _distance(found, wanted), TOLERANCE
    if not worst <= limit:
        signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        nearby = module(images * (1 + signs.to(images.dtype) * torch.finfo(images.dtype).eps))
        limit = max(limit, LAST_BITS * _distance(nearby, wanted))
    if not worst <= limit:
        raise ExportError(
            f"the program of {encoder.caption} differs from the encoder by {worst:.1e} standard deviations of its map "
            f"on images {shape}, at most {limit:.1e} is allowed; nothing was written"
        )
    return worst


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute the largest difference of maps, in standard deviations of the expected map; nan where a value is."""
    differences = [
        (out.float() - wanted.float()).abs().max() / wanted.float().std(correction=0).clamp(min=1e-6)
        for out, wanted in zip(found, expected, strict=True)
    ]
    return torch.stack(differences).max().item()


def _cannot(caption: str, what: str, error: Exception, advice: str = "") -> ExportError:
    """Make the error for an encoder that cannot be exported, with the innermost reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Torch's exporter lists causes, the innermost first.
    reason = next(
        (line.partition(">: ")[2] for line in lines if line.startswith("<class ") and ">: " in line), lines[0]
    )
    return ExportError(f"{caption} cannot be {what}: {reason[:200]}{advice}")


def _check_packages(form: str) -> None:
    if not hasattr(torch.compiler, "is_exporting"):
        raise MissingDependencyError(f"programs need torch 2.7 or newer, this is {torch.__version__}; upgrade torch")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        raise MissingDependencyError(f"ONNX files need {' and '.join(missing)}, not installed; run: {INSTALL}")
