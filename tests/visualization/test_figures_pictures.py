"""Figures of feature maps: one basis of colours, markers on the point, planted patterns found."""

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, InputError
from featsharp.evaluation.position_bias import explained_by_position
from featsharp.normalizers import FeatureStatistics
from featsharp.visualization.encoders import LOW_RES, feature_maps
from featsharp.visualization.figures.bias import Pattern, draw_bias, learned_pattern, mean_pattern
from featsharp.visualization.figures.pca import PCARow, draw_pca, pca_pictures, pca_row
from featsharp.visualization.figures.similarity import draw_similarity
from featsharp.visualization.grid import Row, picture_grid
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.similarity import self_similarity


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def toy_encoders(name: str = "toy-vit") -> dict:
    backbone = create_backbone(name)
    return {label: create_encoder(backbone, label, 2) for label in ("bilinear", "tile")}


# maps


def test_maps_are_those_of_backbone_and_encoders():
    image, encoders = photo(160, 80), toy_encoders()
    maps = feature_maps(image, encoders, real=True)
    assert list(maps) == [LOW_RES, "bilinear", "tile", "backbone at 2x"]
    # 64 x 64 pixels of area at an aspect ratio of 2 is 48 x 88 with whole patches of 8.
    assert maps[LOW_RES].shape == (1, 32, 6, 11)
    assert all(maps[name].shape == (1, 32, 12, 22) for name in list(maps)[1:])
    sharp = encoders["tile"].encode_image(image).high_res
    assert torch.allclose(maps["tile"], sharp, atol=1e-5)


def test_maps_share_the_space_of_a_normalizer_without_inverse():
    backbone = create_backbone("toy-vit")
    encoders = {
        "plain": create_encoder(backbone, "bilinear", 2),
        "layernorm": create_encoder(backbone, "bilinear", 2, normalizer="layernorm"),
    }
    maps = feature_maps(photo(64, 64), encoders, real=True)
    for caption in (LOW_RES, "backbone at 2x", "plain"):
        assert torch.allclose(maps[caption].mean(1), torch.zeros(()), atol=1e-5), caption
        assert torch.allclose(maps[caption].var(1, correction=0), torch.ones(()), atol=1e-3), caption


def test_no_encoder_is_an_error():
    with pytest.raises(ConfigError, match="at least one encoder"):
        feature_maps(photo(64, 64), {})


# pca


def test_a_vector_has_one_colour_in_every_column():
    torch.manual_seed(0)
    best = torch.randn(1, 12, 8, 8)
    low, other = torch.randn(1, 12, 4, 4), 5 * torch.randn(1, 12, 8, 8)
    low[0, :, 1, 2] = other[0, :, 7, 0] = best[0, :, 3, 4]
    pictures = pca_pictures({"low": low, "best": best, "other": other}, "best")
    assert torch.allclose(pictures["low"][:, 1, 2], pictures["best"][:, 3, 4], atol=1e-5)
    assert torch.allclose(pictures["other"][:, 7, 0], pictures["best"][:, 3, 4], atol=1e-5)
    # Basis and range are those of the best map: hardly anything of it is clipped, much of the larger one is.
    assert torch.equal(pictures["best"], FeaturePCA(best)(best)[0])
    clipped = {name: ((p <= 0) | (p >= 1)).float().mean().item() for name, p in pictures.items()}
    assert clipped["best"] < 0.1
    assert clipped["other"] > 0.3


def test_basis_is_that_of_the_real_map_else_of_the_last():
    assert pca_row(photo(64, 64), toy_encoders(), real=True).best == "backbone at 2x"
    assert pca_row(photo(64, 64), toy_encoders(), real=False).best == "tile"


def test_backbone_of_one_size_says_so_in_the_real_column():
    rows = [pca_row(photo(64, 48), toy_encoders(name), label=name) for name in ("toy-vit", "toy-vit-fixed")]
    assert rows[1].best == "tile"
    figure = draw_pca(rows)
    columns = ["image", LOW_RES, "bilinear", "tile", "backbone at 2x"]
    assert [axes.get_title() for axes in figure.axes[:5]] == columns
    assert [axes.get_ylabel() for axes in figure.axes[::5]] == ["toy-vit", "toy-vit-fixed"]
    real, absent = figure.axes[4], figure.axes[9]
    assert len(real.images) == 1
    assert not absent.images
    assert absent.texts[0].get_text() == "takes only\n64 x 64 pixels"


def test_drawn_pixels_are_those_of_the_pictures():
    maps = {LOW_RES: torch.randn(1, 8, 4, 6), "sharp": torch.randn(1, 8, 8, 12)}
    image = torch.rand(3, 20, 30)
    figure = draw_pca([PCARow(image, maps, "sharp")])
    expected = [image, *pca_pictures(maps, "sharp").values()]
    for axes, picture in zip(figure.axes, expected, strict=True):
        drawn = np.asarray(axes.images[0].get_array())
        assert np.allclose(drawn, picture.movedim(0, -1).numpy(), atol=1e-6)


def test_a_grid_without_rows_is_an_error():
    with pytest.raises(InputError, match="at least one row"):
        picture_grid([])


def test_long_captions_stay_above_their_own_pictures():
    captions = ["image", "FeatSharp, 450 steps, batch 1, CPU", "FeatSharp without bias buffer 2x", "tile"]
    rows = [
        Row({caption: torch.rand(3, 2, 3) for caption in captions}, 2 / 3, "a backbone with a long name, fixed")
    ] * 2
    figure, lines = picture_grid(rows)
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in lines[0].values()]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[i + 1 :])
    labels = [line["image"].yaxis.label.get_window_extent() for line in lines]
    assert not labels[0].overlaps(labels[1])


def test_rows_may_lack_a_column():
    _, (first, second) = picture_grid([Row({"a": torch.rand(3, 2, 2)}, 1.0), Row({"b": torch.rand(3, 2, 2)}, 1.0)])
    assert list(first) == list(second) == ["a", "b"]
    assert [len(axes.images) for axes in (first["a"], first["b"], second["a"], second["b"])] == [1, 0, 0, 1]


# similarity


@pytest.mark.parametrize("at", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.3, 0.9)])
def test_similarity_is_the_cosine_with_the_cell_of_the_point(at):
    features = torch.randn(1, 6, 3, 5)
    row, column = min(int(at[0] * 3), 2), min(int(at[1] * 5), 4)
    found = self_similarity(features, at)
    query = features[0, :, row, column]
    for y in range(3):
        for x in range(5):
            other = features[0, :, y, x]
            assert found[y, x] == pytest.approx((query @ other / (query.norm() * other.norm())).item(), abs=1e-6)
    assert found[row, column] == pytest.approx(1)


def test_marker_lies_on_the_point_in_every_column():
    maps = {LOW_RES: torch.randn(1, 6, 3, 5), "sharp": torch.randn(1, 6, 6, 10)}
    at = (0.2, 0.7)
    figure = draw_similarity(torch.rand(3, 30, 50), maps, at=at)
    for axes, size in zip(figure.axes, [(30, 50), (3, 5), (6, 10)], strict=False):
        assert axes.images[0].get_array().shape[:2] == size
        ((x, y),) = axes.lines[0].get_xydata()
        left, right, bottom, top = axes.images[0].get_extent()
        assert (x - left) / (right - left) == pytest.approx(at[1])
        assert (y - top) / (bottom - top) == pytest.approx(at[0])


def test_similarity_is_clipped_to_0_1_and_says_so():
    features = torch.zeros(1, 2, 1, 3)
    features[0, 0] = torch.tensor([1.0, 1.0, -1.0])
    figure = draw_similarity(torch.rand(3, 10, 30), {LOW_RES: features})
    assert np.allclose(figure.axes[1].images[0].get_array(), [[1, 1, 0]])
    assert figure.axes[1].images[0].get_clim() == (0, 1)
    bar = figure.axes[1].child_axes[0]
    assert "clipped to [0, 1]" in bar.get_ylabel()


def test_points_outside_and_bad_maps_are_refused():
    with pytest.raises(ConfigError, match=r"got 1\.5,0\.5"):
        self_similarity(torch.randn(1, 4, 2, 2), (1.5, 0.5))
    with pytest.raises(InputError, match=r"\(2, 4, 2, 2\)"):
        self_similarity(torch.randn(2, 4, 2, 2))
    with pytest.raises(InputError, match="NaN"):
        self_similarity(torch.full((1, 4, 2, 2), float("nan")))


# bias


class Planted(Backbone):
    """Colour of each 8-pixel patch in eight channels, plus ``gain`` times a cross in three more directions."""

    def __init__(self, gain: float) -> None:
        super().__init__(f"planted-{gain:g}", patch_size=8, embed_dim=8, input_size=(64, 64))
        self.gain = gain
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mix", torch.randn(8, 3, generator=generator))
        cross = torch.zeros(8, 8, 8)
        cross[0, 3:5], cross[1, :, 3:5], cross[2, 0] = 1, 1, 1
        self.register_buffer("cross", cross - cross.mean((1, 2), keepdim=True))
        self.freeze()

    def extract(self, images: torch.Tensor) -> BackboneOutput:
        colours = torch.nn.functional.avg_pool2d(images, 8)
        return BackboneOutput(torch.einsum("kc,bchw->bkhw", self.mix, colours) + self.gain * self.cross, None)


def test_planted_pattern_is_what_images_have_in_common():
    backbone = Planted(2.0)
    features = backbone(torch.randn(200, 3, 64, 64) * 0.5).features
    pattern = mean_pattern(features)
    assert torch.allclose(pattern.mean((2, 3)), torch.zeros(()), atol=1e-5)
    assert torch.allclose(pattern[0], 2.0 * backbone.cross, atol=0.05)


def test_models_are_sorted_by_the_strength_of_what_was_planted():
    patterns, strengths = [], {}
    for gain in (0.0, 2.0, 0.5):
        backbone = Planted(gain)
        features = backbone(torch.randn(100, 3, 64, 64)).features
        planted = (gain * backbone.cross).square().sum(0).mean()
        content = (features - gain * backbone.cross).square().sum(1).mean()
        strengths[backbone.name] = explained_by_position(features)
        assert strengths[backbone.name] == pytest.approx((planted / (planted + content)).item(), abs=0.02)
        patterns.append(Pattern(backbone.name, mean_pattern(features), {"position bias": strengths[backbone.name]}))
    titles = [axes.get_title() for axes in draw_bias({"measured": patterns}).axes]
    assert titles == ["planted-2", "planted-0.5", "planted-0"]


@pytest.mark.parametrize("normalizer", ["none", "phi-s"])
def test_strength_of_a_buffer_is_relative_to_the_features(normalizer):
    """A buffer of rms r beside features of rms spread s has strength r / s, in whatever space it is."""
    backbone = Planted(0.0)
    images = torch.randn(64, 3, 64, 64)
    features = 7 * backbone(images).features
    encoder = create_encoder(backbone, "bilinear", 2, normalizer=normalizer, bias_buffer=True)
    statistics = FeatureStatistics(8)
    statistics.update(features)
    encoder.normalizer.fit(statistics)
    planted = torch.randn(1, 8, 8, 8)
    encoder.bias_buffer.buffer.data.copy_(planted + 3)  # a constant is no pattern
    pattern, strength = learned_pattern(encoder, features)
    expected = planted - planted.mean((2, 3), keepdim=True)
    assert torch.allclose(pattern, expected, atol=1e-5)
    spread = features.transpose(0, 1).flatten(1).var(1).mean().sqrt() if normalizer == "none" else torch.ones(())
    assert strength == pytest.approx((expected.square().mean().sqrt() / spread).item(), rel=1e-3)


def test_without_a_fitted_normalizer_the_given_features_are_the_scale():
    backbone = Planted(0.0)
    features = 3 * torch.randn(16, 8, 8, 8)
    encoder = create_encoder(backbone, "bilinear", 2, bias_buffer=True)
    encoder.bias_buffer.buffer.data.normal_()
    pattern, strength = learned_pattern(encoder, features)
    spread = (features - features.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    assert strength == pytest.approx((pattern.square().mean().sqrt() / spread).item(), rel=1e-5)


def test_an_encoder_without_a_buffer_is_refused():
    with pytest.raises(ConfigError, match="no bias buffer"):
        learned_pattern(create_encoder("toy-vit", "bilinear", 2), torch.randn(2, 32, 8, 8))


def test_strongest_model_comes_first_with_its_numbers():
    patterns = [Pattern(f"m{value}", torch.randn(1, 4, 5, 5), {"strength": value}) for value in (0.1, 0.7, 0.3)]
    figure = draw_bias({"learned": patterns, "nothing": []})
    assert [axes.get_title() for axes in figure.axes] == ["m0.7", "m0.3", "m0.1"]
    assert figure.axes[0].get_xlabel() == "strength 0.700"
    assert all(axes.images[0].get_array().shape == (5, 5, 3) for axes in figure.axes)


def test_a_strong_pattern_is_seen_in_its_picture():
    """Cells of the planted row differ in colour from all others by far."""
    figure = draw_bias({"measured": [Pattern("planted", Planted(1.0).cross[None], {"position bias": 1.0})]})
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    row, rest = pixels[0, [0, 1, 2, 5, 6, 7]], pixels[1:3, [0, 1, 2, 5, 6, 7]].reshape(-1, 3)
    assert np.abs(row - row[0]).max() < 1e-5
    assert np.abs(rest - rest[0]).max() < 1e-5
    assert np.abs(row[0] - rest[0]).max() > 0.5


def test_texts_of_biases_stay_apart():
    """Headings, wrapped labels and numbers overlap neither one another nor the pictures, which are square."""
    label = "another quite long label of a checkpoint"
    patterns = [Pattern(f"{label} {n}", torch.randn(1, 4, 5, 5), {"strength": n, "position bias": 1}) for n in range(8)]
    figure = draw_bias({"learned": patterns, "measured": patterns[:1]})
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["learned", "measured"]
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()] + [axes.bbox for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(axes.bbox.width == pytest.approx(axes.bbox.height) for axes in figure.axes)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(InputError, match="no pattern"):
        draw_bias({"learned": []})
