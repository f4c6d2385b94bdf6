"""The fixed validation samples of a training run: the same images and views every time."""

from dataclasses import replace

import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.data.sources import first_images, parse_data_dir
from featsharp.data.streams import ShardStream
from featsharp.data.views import Views, base_view, cut_canvas
from featsharp.evaluation.fidelity import EVAL_VIEWS, FidelityMeter, default_eval_size
from featsharp.evaluation.samples import ImageSet
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.training.objectives import Objective
from featsharp.training.trainer import Validation
from featsharp.visualization.panels import panel
from featsharp.visualization.pca import FeaturePCA

# Side of one picture of a panel, in pixels.
CELL = 224


class ValidationSamples:
    """The first images of ``val_data_dir`` by name (of streamed shards: as they are stored), drawn and scored.

    Args:
        data_dir: As ``val_data_dir`` in the configuration; of several sources the first is used.
        count: Images.
    """

    def __init__(self, data_dir: object, count: int) -> None:
        path = parse_data_dir(data_dir)[0].path
        if isinstance(path, str):
            self.images = [image for _, image in first_images(ShardStream(path), count)]
        else:
            self.images = [image for _, image in ImageSet(path, limit=count)]

    def __call__(self, encoder: SharpEncoder, objective: Objective) -> Validation:
        """Fidelity over the samples (area pooling decides the best checkpoint), a PCA panel of each, the bias."""
        own = {} if objective.downsampler is None else {"own": objective.downsampler}
        meter = FidelityMeter(encoder, downsamplers=own, views=replace(EVAL_VIEWS, num_views=4))
        for image in self.images:
            meter.add(image)
        found = meter.result()
        scalars = {f"val/fidelity_{name}": found[name].value for name in ("area", *own)}
        scalars["val/cosine"] = found["cosine"].value
        pictures = {f"val/features_{i}": feature_panel(encoder, image) for i, image in enumerate(self.images)}
        if encoder.bias_buffer is not None and encoder.bias_buffer.buffer.abs().max() > 0:
            bias = encoder.bias_buffer.buffer.detach()
            pictures["val/bias"] = panel([FeaturePCA(bias)(bias)[0]], (CELL, CELL))
        return Validation(found["area"].value, scalars, pictures)


@torch.no_grad()
def feature_panel(encoder: SharpEncoder, image: Image) -> Tensor:
    """Image, low resolution, bilinear and sharp features in a row, in one PCA basis: [3, CELL, 4 * CELL]."""
    size = default_eval_size(encoder)
    canvas, mask = cut_canvas(image, size)
    base = base_view(Views(canvas[None], mask[None], torch.empty(0)))[0].to(encoder.device)
    out = encoder(encoder.input_conditioner(base), low_res_size=encoder.backbone.input_size)
    colours = FeaturePCA(out.low_res)
    bilinear = resize(out.low_res, (out.high_res.shape[-2], out.high_res.shape[-1]))
    maps = [colours(x)[0] for x in (out.low_res, bilinear, out.high_res)]
    return panel([base[0], *maps], (CELL, CELL))
