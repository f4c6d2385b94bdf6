"""Linear CKA against its definition, and the task on backbones whose answer is known."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, InputError
from featsharp.evaluation.cka import CkaTask, cka_of_maps, fitting_sizes, linear_cka, maps_by_size, pool_cka
from featsharp.evaluation.runner import Subject, evaluate


class Colours(Backbone):
    """Random mixtures of the mean colour of each 8-pixel patch: about the same at every scale of a smooth picture."""

    def __init__(self) -> None:
        super().__init__("colours", patch_size=8, embed_dim=12, input_size=(32, 32))
        self.register_buffer("mix", torch.randn(12, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
        self.seen: list[tuple[int, ...]] = []
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        self.seen.append(tuple(images.shape[-2:]))
        return BackboneOutput(F.conv2d(F.avg_pool2d(images, 8), self.mix), None)


class Noise(Backbone):
    """Says something else at every size."""

    def __init__(self) -> None:
        super().__init__("noise", patch_size=8, embed_dim=48, input_size=(32, 32))
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        h, w = self.grid_size(images.shape[-2:])
        generator = torch.Generator().manual_seed(h * 1000 + int(images.abs().sum()))
        return BackboneOutput(torch.randn(len(images), 48, h, w, generator=generator), None)


def smooth_picture(seed: int, size: int = 128) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        smooth_picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(("n", "c", "d"), [(9, 5, 7), (9, 5, 30), (9, 20, 30)])
def test_definition_by_centred_gram_matrices(n, c, d):
    x, y = torch.randn(n, c, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    y[:, :3] += x[:, :3]
    gram_x, gram_y = (x @ x.T).numpy(), (y @ y.T).numpy()
    centring = np.eye(n) - 1 / n

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring)

    expected = hsic(gram_x, gram_y) / np.sqrt(hsic(gram_x, gram_x) * hsic(gram_y, gram_y))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "d"), [(9, 5, 7), (4, 5, 30), (9, 20, 30)])
def test_estimate_without_bias_by_its_formula(n, c, d):
    x, y = torch.randn(n, c, dtype=torch.float64) + 3, torch.randn(n, d, dtype=torch.float64) - 2
    y[:, :3] += x[:, :3]

    def hsic(a, b):  # Song et al., equation 5, on Gram matrices that are not centred
        k, m = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        one = np.ones(n)
        sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + sums - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    gram_x, gram_y = (x @ x.T).numpy(), (y @ y.T).numpy()
    expected = hsic(gram_x, gram_y) / np.sqrt(hsic(gram_x, gram_x) * hsic(gram_y, gram_y))
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_rotation_scale_and_shift_do_not_matter(debiased):
    x = torch.randn(30, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ rotation + 5, debiased=debiased) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x * torch.tensor([9.0, 1, 1, 1, 1, 1]), debiased=debiased) < 0.9


def test_few_tokens_of_many_channels_look_alike_but_for_the_debiased():
    outcome = [
        [linear_cka(x, y, debiased=debiased) for debiased in (False, True)]
        for x, y in (torch.randn(2, 16, 384) for _ in range(40))
    ]
    plain, debiased = np.mean(outcome, axis=0)
    assert plain > 0.9
    assert abs(debiased) < 0.05


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.randn(3, 5), torch.randn(3, 5)),
        (torch.randn(5, 5), torch.randn(6, 5)),
        (torch.ones(5, 5), torch.randn(5, 5)),
        (torch.full((5, 5), torch.nan), torch.randn(5, 5)),
    ],
)
def test_what_has_no_cka(x, y):
    with pytest.raises(InputError, match="CKA"):
        linear_cka(x, y)


def test_maps_are_matched_by_position():
    fine = torch.randn(1, 5, 12, 18)
    coarse = F.interpolate(fine, (4, 6), mode="bilinear", antialias=True)
    assert cka_of_maps(coarse, 2 * fine) == pytest.approx(1, abs=1e-6)
    assert cka_of_maps(coarse, fine.flip(3)) < 0.8


def test_pooling_by_hand():
    outcome = pool_cka([[0.1, 0.4, 0.7], [0.3, 0.4, 0.5]], [8, 16, 24])
    np.testing.assert_allclose(outcome["matrix"], [[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])
    assert {size: round(x.value, 6) for size, x in outcome["scale_summary"].items()} == {8: 0.3, 16: 0.4, 24: 0.5}
    assert outcome["cka"].value == pytest.approx(0.4)
    low, high = outcome["intervals"][1][0]
    assert (low, high) == pytest.approx((0.1, 0.3))
    assert outcome["intervals"][2][2] == [1, 1]


def test_sizes_are_those_of_the_low_resolution_pass():
    backbone = Colours()
    encoder = create_encoder(backbone, "bilinear", 3)
    maps = maps_by_size(encoder, smooth_picture(0), [16, 32, 64])
    assert backbone.seen == [(16, 16), (32, 32), (64, 64)]
    assert [tuple(x.shape[-2:]) for x in maps] == [(6, 6), (12, 12), (24, 24)]


@pytest.mark.parametrize(
    ("upsampler", "sizes"),
    # The smallest map of bilinear interpolation is too smooth to agree.
    [(("identity", 1), [32, 64, 128]), (("tile", 2), [32, 64, 128]), (("bilinear", 2), [64, 128])],
)
def test_what_does_not_depend_on_size_scores_1(folder, upsampler, sizes):
    task = CkaTask(data=folder, sizes=sizes)
    outcome = evaluate(task, [Subject("x", lambda: create_encoder(Colours(), *upsampler))], progress=False)["x"][
        "result"
    ]
    assert outcome["sizes"] == sizes
    assert np.min(outcome["matrix"]) > 0.95
    assert outcome["matrix_debiased"][0][-1] > 0.95
    np.testing.assert_allclose(outcome["matrix"], np.transpose(outcome["matrix"]))


def test_noise_scores_0_without_bias(folder):
    task = CkaTask(data=folder, sizes=(64, 128))
    outcome = evaluate(task, [Subject("x", lambda: create_encoder(Noise(), "identity", 1))], progress=False)["x"]
    assert abs(outcome["result"]["cka_debiased"]["value"]) < 0.1
    assert len(outcome["items"]["0.png"]["cka"]) == 1


def test_sizes_that_do_not_work():
    encoder = create_encoder(Colours(), "identity", 1)
    assert fitting_sizes(encoder, (30, 17, 64)) == [16, 32, 64]
    with pytest.raises(ConfigError, match=r"two different sizes .*\[32, 33\] become \[32\]"):
        fitting_sizes(encoder, (32, 33))
    with pytest.raises(ConfigError, match="take sizes from 16"):
        fitting_sizes(encoder, (8, 32))
    with pytest.raises(ConfigError, match="'toy-vit-fixed' takes one size only"):
        fitting_sizes(create_encoder("toy-vit-fixed", "identity", 1), (32, 64))


def test_command(folder, tmp_path, capsys):
    result = tmp_path / "cka.json"
    arguments = ["eval", "cka", "--data", str(folder), "--backbone", "toy-vit", "--upsampler", "bilinear-2x"]
    assert not main([*arguments, "--sizes", "32", "64", "--limit", "2", "--json", str(result), "--device", "cpu"])
    assert "cka_32" in capsys.readouterr().out
    content = json.loads(result.read_text())["encoders"]["bilinear-2x"]["result"]
    assert content["scale_summary"]["32"] == content["cka_32"]
