"""The fit as an encoder of figures and measures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.backbones import create_backbone
from featsharp.cli.main import main
from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError
from featsharp.implicit import FitConfig, Fitter, load_encoder
from featsharp.visualization.encoders import feature_maps

QUICK = "implicit-2x?steps=3&views=6&dim=4"


def picture(height: int = 64, width: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_the_map_is_that_of_a_fit_to_the_picture():
    backbone = create_backbone("toy-vit")
    encoder = load_encoder(QUICK, featurizer=backbone)
    assert (encoder.factor, encoder.caption) == (2, "Implicit 2x")
    image = picture()
    whitened = encoder.input_conditioner(image_to_tensor(image)[None])
    with torch.inference_mode():
        out = encoder(torch.cat([whitened, whitened.flip(3)]), low_res_size=(32, 48))
    fitter = Fitter(backbone, image, FitConfig(views=6, dim=4), size=(32, 48))
    fitter.run(3)
    grid = out.low_res.shape[-2:]
    expected = fitter.fitted.features((2 * grid[0], 2 * grid[1]))
    torch.testing.assert_close(out.high_res[:1], expected)
    assert not torch.allclose(out.high_res[1:], expected)  # the other picture has its own


def test_figures_and_measures_know_it(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(128, 160).save(folder / "a.png")
    options = ["--backbone", "toy-vit", "--upsampler", "bilinear-2x", f"implicit={QUICK}"]
    assert main(["eval", "zoom", "--data", str(folder), *options, "--json", str(tmp_path / "zoom.json")]) == 0
    encoders = json.loads((tmp_path / "zoom.json").read_text(encoding="utf-8"))["encoders"]
    assert [one["upsampler"] for one in encoders.values()] == ["bilinear", "Implicit"]
    assert encoders["implicit"]["key"] != encoders["bilinear-2x"]["key"]
    assert main(["figure", "pca", str(folder / "a.png"), *options, "-o", str(tmp_path / "pca.png")]) == 0
    assert list(feature_maps(picture(), {"fit": load_encoder(QUICK, featurizer="toy-vit")})) == [
        "low resolution",
        "fit",
    ]


def test_settings_are_part_of_the_key_and_others_are_refused():
    first, second = (repr(load_encoder(f"implicit?steps={n}", featurizer="toy-vit").upsampler) for n in (3, 4))
    assert first != second
    with pytest.raises(ConfigError, match=r"implicit\?step=3: .*'step'; a fit has steps, views, dim"):
        load_encoder("implicit?step=3", featurizer="toy-vit")
    with pytest.raises(ConfigError, match="give it a backbone"):
        load_encoder("implicit-2x")
