"""Names in text are taken apart in one way, wherever they are written."""

import re

import pytest
import torch
from PIL import Image

from featsharp import UpsampleLayer, create_backbone, create_encoder, create_upsampler, load_from_file
from featsharp.bench.workloads import list_workloads
from featsharp.cli.main import main
from featsharp.configs.compose import compose
from featsharp.errors import ConfigError
from featsharp.names import BackboneName, label_encoders, parse_backbone, parse_upsampler
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.registration import resolve_upsampler


@pytest.mark.parametrize(
    ("text", "model", "prefix", "options"),
    [
        ("dinov2-l", "dinov2-l", "", {}),
        ("timm:a_b.c?layer=-2&facet=key", "timm:a_b.c", "timm", {"layer": "-2", "facet": "key"}),
        ("hf:/a%20b?weights=/c%26d+e", "hf:/a%20b", "hf", {"weights": "/c&d+e"}),
        ("hub:o/r:main/entry?version=", "hub:o/r:main/entry", "hub", {"version": ""}),
    ],
)
def test_backbones(text, model, prefix, options):
    name = parse_backbone(text)
    assert name == BackboneName(model, options)
    assert name.prefix == prefix
    assert parse_backbone(str(name)) == name


def test_options_are_arguments_and_go_into_the_name():
    name = parse_backbone("m?facet=key").with_options(layer=[3, -1], pretrained=False, dtype=torch.bfloat16, mean=None)
    assert str(name) == "m?facet=key&layer=3,-1&pretrained=false&dtype=bfloat16"
    with pytest.raises(ConfigError, match=r"option facet of .* is given twice"):
        parse_backbone("m?facet=key").with_options(facet="key")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bilinear", ("bilinear", None, {})),
        ("bilinear-2x", ("bilinear", 2, {})),
        ("featsharp-jafar-12x", ("featsharp-jafar", 12, {})),
        ("my.module:function-1.5x", ("my.module:function", 1.5, {})),
        ("tile--1x", ("tile", -1, {})),
        ("tile-x", ("tile-x", None, {})),
        ("tile-2X", ("tile-2X", None, {})),
        ("views-2x?passes=4&views=hr-dv2", ("views", 2, {"passes": 4, "views": "hr-dv2"})),
    ],
)
def test_upsamplers(text, expected):
    assert parse_upsampler(text) == expected


def test_a_known_name_stays_whole():
    assert parse_upsampler("mine-2x", known=["mine-2x"]) == ("mine-2x", None, {})


def test_a_factor_is_given_once():
    assert resolve_upsampler("tile", 2) == resolve_upsampler("tile-2x") == resolve_upsampler("tile-2x", 2)
    with pytest.raises(ConfigError, match="'tile-2x' has factor 2, but factor=3 is given too"):
        resolve_upsampler("tile-2x", 3)
    with pytest.raises(ConfigError, match="unknown upsampler 'tiel'; did you mean 'tile'"):
        resolve_upsampler("tiel")


def test_bilinear_with_its_factor_is_taken_everywhere(tmp_path, capsys):
    backbone = create_backbone("toy-vit")
    assert create_encoder(backbone, "bilinear-3x").factor == create_encoder(backbone, "bilinear", 3).factor == 3
    assert create_encoder(backbone, "bilinear-3x").recipe == create_encoder(backbone, "bilinear", 3).recipe
    assert create_upsampler("bilinear-3x", backbone).factor == create_upsampler("bilinear", backbone, 3).factor == 3
    assert load_from_file("bilinear-3x", featurizer=backbone).factor == 3
    assert compose(["+model=toy-vit", "+upsampler=bilinear-3x", "train_data_dir=x"]).upsampler.factor == 3
    assert UpsampleLayer("bilinear-3x", 32).upsampler.factor == UpsampleLayer("bilinear", 32, 3).upsampler.factor == 3


def test_options_in_a_name_are_taken_everywhere():
    backbone, name, options = create_backbone("toy-vit"), "views-2x?passes=4&views=hr-dv2", {"passes": 4}
    options["views"] = "hr-dv2"
    recipe = create_encoder(backbone, "views", 2, upsampler_options=options).recipe
    assert create_encoder(backbone, name).recipe == load_from_file(name, featurizer=backbone).recipe == recipe
    assert (
        create_upsampler("views-2x?passes=2", backbone).views
        == create_upsampler("views", backbone, 2, options={"passes": 2}).views
    )
    assert compose(["+model=toy-vit", f"+upsampler={name}", "train_data_dir=x"]).upsampler.options == options
    assert UpsampleLayer("jafar-2x?image_kernel=1", 32).upsampler.image_encoder[0].kernel_size == (1, 1)
    points, _ = list_workloads(backbone, ["views-2x?passes=2", "views?passes=4"], [2], torch.device("cpu"))
    assert [(point.curve, point.recipe["options"]) for point in points] == [
        ("views?passes=2", {"passes": 2}),
        ("views?passes=4", {"passes": 4}),
    ]


def test_an_option_is_given_once():
    with pytest.raises(ConfigError, match="option passes of upsampler 'views\\?passes=4' is given twice"):
        create_encoder("toy-vit", "views?passes=4", upsampler_options={"passes": 2})
    with pytest.raises(ConfigError, match=r"upsampler.options.passes=2 give one option twice"):
        compose(["+model=toy-vit", "+upsampler=views?passes=4", "upsampler.options.passes=2", "train_data_dir=x"])


def test_curves_read_as_they_are_written():
    for text in ("views?passes=4&views=hr-dv2", 'a?b=[1, 2]&c=%2B&d="4"&e=true', "module:function"):
        assert parse_upsampler(parse_upsampler(text).curve) == parse_upsampler(text)


def test_labels_are_the_shortest_ends_of_paths(tmp_path):
    assert label_encoders(["a/x.pth", "b/x.pth", "a/y.pth"]) == {"a/x": "a/x.pth", "b/x": "b/x.pth", "y": "a/y.pth"}
    # One path is the end of another.
    assert list(label_encoders(["x.pth", "a/x.pth", "/b/a/x.pth"])) == ["x", "a/x", "b/a/x"]
    # What has a label needs no room.
    assert label_encoders(["mine=a/x.pth", "b/x.pth"]) == {"mine": "a/x.pth", "x": "b/x.pth"}
    assert label_encoders(["runs/lr=1e-3/x.pth"]) == {"x": "runs/lr=1e-3/x.pth"}
    assert list(label_encoders(["vits14-focus/featsharp-2x", "tile-1.5x"])) == [
        "vits14-focus/featsharp-2x",
        "tile-1.5x",
    ]
    assert label_encoders([]) == {}
    for same in (["a/x.pth", "a/x.pth"], ["x=a.pth", "x=b.pth"], ["x=a.pth", "b/x.pth"], ["x.pth", "x.safetensors"]):
        with pytest.raises(ConfigError, match=r"two encoders are called .*LABEL="):
            label_encoders(same)


@pytest.mark.parametrize(
    ("name", "factor"), [("bilinear", 2), ("bilinear-2x", 2), ("identity", 1), ("identity-1x", 1), ("s2-pooled", 1)]
)
def test_a_name_without_a_factor_has_the_same_one_everywhere(name, factor):
    backbone = create_backbone("toy-vit")
    assert create_encoder(backbone, name).recipe == create_encoder(backbone, name, factor).recipe
    assert create_encoder(backbone, name).factor == factor
    assert create_upsampler(name, backbone).factor == factor
    assert load_from_file(name, featurizer=backbone).factor == factor
    assert compose(["+model=toy-vit", f"+upsampler={name}", "train_data_dir=x"]).upsampler.factor == factor
    if name != "s2-pooled":  # needs tiles
        assert UpsampleLayer(name, 32).upsampler.factor == factor


@pytest.mark.parametrize("name", sorted({*UPSAMPLERS} - {"custom", "super-resolution"}))  # need a function
def test_every_method_has_its_default_factor(name):
    assert create_upsampler(name, create_backbone("toy-vit")).factor == resolve_upsampler(name)[1]


@pytest.mark.parametrize("name", ["bilinear", pytest.param("bilinear-2x", marks=pytest.mark.slow)])
def test_commands_take_bilinear_and_bilinear_2x_alike(name, tmp_path, capsys):
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "a.png")
    photo, out, encoder = str(tmp_path / "a.png"), str(tmp_path / "out"), ["--backbone", "toy-vit", "--upsampler", name]
    assert main(["upsample", photo, "--backbone", "toy-vit", "--checkpoint", name, "-o", out]) == 0
    assert main(["eval", "zoom", *encoder, "--data", str(tmp_path)]) == 0
    assert main(["figure", "pca", photo, *encoder, "--no-real", "-o", f"{out}/figure.png"]) == 0
    assert main(["eval", "recommend", *encoder, "--repeat", "2"]) == 0
    assert (
        main(["bench", "encode", "--backbone", "toy-vit", "--upsamplers", name, "--factors", "2", "--repeat", "2"]) == 0
    )
    assert re.search(r"^bilinear +2x float32", capsys.readouterr().out, re.M)
    assert main(["eval", "recommend", *encoder, "--factor", "3"]) == ("-2x" in name)
