"""The page of ``featsharp demo``: a picture, its features at low and high resolution, and questions to them.

Gradio is imported inside the functions: it is an extra.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from featsharp.backbones import check_name, create_backbone, resolve_backbone
from featsharp.backbones.open_clip_text import TextTower, project_to_text
from featsharp.bench.choice import choose_upsampler
from featsharp.bench.workloads import list_ready
from featsharp.builder import load_from_file
from featsharp.data.images import decode_image, image_to_tensor
from featsharp.errors import InputError, MissingDependencyError, explain
from featsharp.evaluation.pareto import PHOTOGRAPHS
from featsharp.model import SharpEncoder
from featsharp.visualization.explore import (
    COLOURS,
    Exploration,
    cluster_pictures,
    explore,
    pca_pictures,
    show,
    similarity_pictures,
    vector_pictures,
)
from featsharp.visualization.panels import size_text

logger = logging.getLogger(__name__)

PCA, SIMILARITY, CLUSTERS, TEXT = "PCA", "similarity", "clusters", "text"
FACTORS = (2, 4, 8)
ENCODERS = 2  # that are kept loaded
LARGEST, SIDE = 2048, 640  # longer sides in pixels, of what is computed with and of the pictures on the page
STATE_SECONDS = 1800  # until the features of a page that nobody uses are dropped
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#status {min-height: 1.5em}
#status p {margin: 0}
footer {display: none !important}
"""
HELP = (
    "Drag the line in the picture: coarse features of the backbone at the left, sharp ones at the right, in one basis. "
    "Click into the picture for the features that are like the one there."
)


def import_gradio() -> Any:
    """Import gradio; raises MissingDependencyError with the command that installs it."""
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError('the demo needs: pip install "featsharp[demo]"') from error
    return gradio


def list_examples() -> dict[str, Path]:
    """List the photographs that installed packages bring, by name."""
    found = {}
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        for name in names if spec is not None and spec.origin is not None else ():
            path = Path(spec.origin).parent / name  # type: ignore[arg-type, union-attr]
            if path.exists():
                found[path.stem] = path
    return found


def list_methods(backbone: str, factor: float) -> list[str]:
    """List what needs no training, and the weights that ship for this backbone and factor."""
    ready = list_ready(backbone, factor)
    return [name.removesuffix(f"-{factor:g}x") for name in ready if "?" not in name]


def choose_method(backbone: str, factor: float) -> str:
    """Choose the best that is known for a backbone at factor 2, where it has this factor; otherwise the first."""
    methods = list_methods(backbone, factor)
    best = choose_upsampler(backbone).removesuffix("-2x")
    return best if best in methods else methods[0]


def list_views(backbone: str) -> list[str]:
    """List what can be shown of features: text needs a backbone that knows it."""
    return [PCA, SIMILARITY, CLUSTERS, *([TEXT] if resolve_backbone(backbone).prefix == "open_clip" else [])]


def with_text(function: Callable[..., tuple[Any, ...]], results: int) -> Callable[..., tuple[Any, ...]]:
    """Wrap a function of the page: errors become text in its last result, the others stay as they are on the page."""

    @functools.wraps(function)
    def call(*inputs: Any) -> tuple[Any, ...]:
        gradio = import_gradio()
        try:
            return function(*inputs)
        except Exception as error:
            reason = explain(error)
            if reason is None:
                logger.exception("the demo failed")
                reason = f"this should not happen ({type(error).__name__}: {error}); the terminal has the details"
            return (*[gradio.skip()] * (results - 1), f"**Error:** {reason}")

    return call


class Demo:
    """Functions that the page calls; of encoders the last few are kept.

    Args:
        backbones: Names to choose from; a page never loads others, nor files.
        device: For the encoders.

    Raises:
        ConfigError: For an unknown backbone.
    """

    def __init__(self, backbones: Sequence[str], device: Any) -> None:
        for name in backbones:
            check_name(name)
        self.backbones, self.device, self.examples = list(backbones), device, list_examples()
        self._encoder = functools.lru_cache(ENCODERS)(self._load)
        self._text = functools.lru_cache(1)(lambda backbone: TextTower(create_backbone(backbone)))

    def read_example(self, name: str) -> tuple[Any, ...]:
        """Read an example; returns picture, no features, and text."""
        if name not in self.examples:
            raise InputError(f"there is no example {name!r}")
        return self._take(self.examples[name].read_bytes(), name)

    def read_upload(self, content: bytes) -> tuple[Any, ...]:
        """Read an uploaded file; as :meth:`read_example`."""
        return self._take(content, "the uploaded file")

    def compute(self, image: Any, backbone: str, method: str, factor: float) -> tuple[Any, ...]:
        """Compute features and draw their PCA; returns features, slider, view and text."""
        if image is None:
            raise InputError("there is no picture yet; upload one or choose an example")
        features = explore(self._encoder(backbone, method, factor), decode_image(image))
        text = (
            f"{size_text(features.low_res)} features of `{backbone}` in {features.low_res_cost}; "
            f"{size_text(features.high_res)} by `{method}` {factor:g}x in {features.high_res_cost}, backbone included"
        )
        view = import_gradio().update(choices=list_views(backbone), value=PCA)
        return features, self._slider(features, pca_pictures(features)), view, text

    def look(
        self, features: Exploration | None, view: str, point: tuple[float, float] | None, count: int, text: str
    ) -> tuple[Any, Any]:
        """Draw features; returns slider and text."""
        if features is None:
            raise InputError("there are no features yet; press Compute")
        if view == SIMILARITY:
            if point is None:
                return self._slider(features, pca_pictures(features)), "Click into the picture to choose a point."
            pair = similarity_pictures(features, point)
            words = f"Cosine with the feature at x {point[1]:.2f}, y {point[0]:.2f} of the picture: dark 0, bright 1."
        elif view == CLUSTERS:
            pair, words = cluster_pictures(features, int(count)), f"{count} clusters of the coarse features (k-means)."
        elif view == TEXT:
            vector = self._text(features.backbone)([text])[0]
            pair, (least, most) = vector_pictures(features, vector)
            words = f"Cosine with “{text}”: dark {least:.3f}, bright {most:.3f}."
        else:
            pair, words = pca_pictures(features), "Three principal components of the coarse features as colours."
        return self._slider(features, pair), words

    def _take(self, content: bytes, name: str) -> tuple[Any, ...]:
        image = decode_image(content, name=name)
        text = f"{image.width} x {image.height} pixels"
        if max(image.size) > LARGEST:
            image.thumbnail((LARGEST, LARGEST))
            text += f", scaled down to {image.width} x {image.height} for this page"
        return to_pixels(image_to_tensor(image)), None, None, None, f"{text}. Press Compute."

    def _load(self, backbone: str, method: str, factor: float) -> SharpEncoder:
        if backbone not in self.backbones:
            raise InputError(f"this page has no backbone {backbone!r}; start it with --backbone {backbone}")
        if method not in list_methods(backbone, factor):
            raise InputError(f"{method} has no {factor:g}x for {backbone}; choose another factor or method")
        name = f"{method}-{factor:g}x"
        encoder = load_from_file(name, featurizer=project_to_text(backbone)).to(self.device).eval()
        explore(encoder, Image.new("RGB", encoder.backbone.input_size[::-1]))  # the first time takes longer
        return encoder

    def _slider(self, features: Exploration, pair: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        low_res, high_res = (to_pixels(show(picture, features.image, SIDE)) for picture in pair)
        return low_res, high_res


def to_pixels(picture: Tensor) -> Any:
    """Convert [3, H, W] in [0, 1] to an array [H, W, 3] of uint8."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def build_page(demo: Demo, *, max_upload: str) -> Any:
    """Build the page: a ``gradio.Blocks``."""
    gr = import_gradio()
    first = demo.backbones[0]
    with gr.Blocks(title="featsharp", analytics_enabled=False, delete_cache=(60, STATE_SECONDS)) as page:
        gr.Markdown(f"## featsharp\n{HELP}")
        features = gr.State(time_to_live=STATE_SECONDS)
        point = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(label="Picture", interactive=False, buttons=[], elem_id="picture", format="png")
                upload = gr.UploadButton(
                    f"Upload a picture (at most {max_upload})", type="binary", elem_id="upload", size="md"
                )
                example = gr.Dropdown(
                    list(demo.examples),
                    value=None,
                    label="or an example",
                    visible=bool(demo.examples),
                    elem_id="example",
                )
                backbone = gr.Dropdown(demo.backbones, value=first, label="Backbone", elem_id="backbone")
                with gr.Row():
                    methods = list_methods(first, FACTORS[0])
                    method = gr.Dropdown(
                        methods, value=choose_method(first, FACTORS[0]), label="Method", scale=3, min_width=200
                    )
                    factor = gr.Dropdown(list(FACTORS), value=FACTORS[0], label="Factor", scale=1, min_width=60)
                compute = gr.Button("Compute", variant="primary", elem_id="compute")
            with gr.Column(scale=3, min_width=300):
                slider = gr.ImageSlider(
                    label="Coarse | sharp",
                    interactive=False,
                    buttons=[],
                    elem_id="slider",
                    max_height=SIDE,
                    format="png",
                )
                status = gr.Markdown(elem_id="status")
                view = gr.Radio([PCA, SIMILARITY, CLUSTERS], value=PCA, label="Show", elem_id="view")
                with gr.Row():
                    count = gr.Slider(2, len(COLOURS), value=6, step=1, label="Clusters", min_width=200, visible=False)
                    words = gr.Textbox(label="Text", min_width=200, visible=False, elem_id="text", submit_btn="Look")
        shown = [features, view, point, count, words]
        # One computation at a time: each takes all cores, or the GPU.
        work = {"concurrency_limit": 1, "concurrency_id": "work", "api_visibility": "private"}
        light = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        taken = [picture, features, point, slider, status]
        upload.upload(with_text(demo.read_upload, 5), upload, taken, **work)
        example.input(with_text(demo.read_example, 5), example, taken, **work)
        compute.click(
            with_text(demo.compute, 4), [picture, backbone, method, factor], [features, slider, view, status], **work
        )
        drawn = {"fn": with_text(demo.look, 2), "inputs": shown, "outputs": [slider, status], **work}
        view.change(
            lambda chosen: (gr.update(visible=chosen == CLUSTERS), gr.update(visible=chosen == TEXT)),
            view,
            [count, words],
            **light,
        )
        view.input(**drawn)
        count.release(**drawn)
        words.submit(**drawn)

        def click(image: Any, event: gr.SelectData) -> tuple[Any, str]:  # type: ignore[name-defined]
            x, y = event.index
            height, width = image.shape[:2]
            return (min(max((y + 0.5) / height, 0), 1), min(max((x + 0.5) / width, 0), 1)), SIMILARITY

        picture.select(click, picture, [point, view], **light).then(**drawn)

        def choose(name: str, times: float, old: str) -> Any:
            names = list_methods(name, times)
            value = old if old in names else choose_method(name, times)
            return gr.update(choices=names, value=value)

        for part in (backbone, factor):
            part.input(choose, [backbone, factor, method], method, **light)
    return page
