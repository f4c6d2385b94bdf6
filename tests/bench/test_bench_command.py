"""``featsharp bench``: what it prints and writes."""

import json
import re

import pytest
import torch

from featsharp.backbones import create_backbone
from featsharp.bench.counting import count_cost
from featsharp.cli.main import main
from featsharp.upsamplers import create_upsampler


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_cost_of_an_upsampler_is_that_of_its_products():
    """One JBU level: two 1x1 convolutions and 49 products of keys and of values per cell, beside one pass."""
    cost = count_cost(create_upsampler("featup", create_backbone("vits14-focus"), 2))
    cells, pass_ = 32 * 32, 12 * (24 * 256 * 384**2 + 4 * 256**2 * 384)
    own = cells * (2 * (3 * 32 + 32 * 32) + 2 * 49 * (32 + 384))
    assert (cost.parameters, cost.passes) == (1186, 1)
    assert cost.relative == pytest.approx(1 + own / pass_)
    assert count_cost(create_upsampler("tile", create_backbone("vits14-focus"), 3)).relative == pytest.approx(10)


@pytest.mark.parametrize(("factor", "passes"), [(1, 2), pytest.param(2, 5, marks=pytest.mark.full)])
def test_bench_writes_what_it_prints(factor, passes, tmp_path, capsys):
    file = tmp_path / "new" / "ops.json"
    arguments = ("--factors", factor, "--repeat", "2", "--backbone", "toy-vit", "--no-scaling", "--json", file)
    assert run("bench", "ops", *arguments) == 0
    printed, content = capsys.readouterr().out, json.loads(file.read_text())
    names = {row["name"] for row in content["ops"]}
    assert {"bilinear", "FeatUp JBU", "JAFAR", "FeatSharp block, lean", "FeatSharp block, published"} <= names
    assert {f"local_attention of {op}: {b}" for op in ("JBU", "FeatSharp") for b in ("blocked", "reference")} <= names
    assert all(name in printed for name in names)
    assert content["ops"][0]["name"] == f"{passes} passes of toy-vit"
    for row in content["ops"][1:]:
        assert row["output_bytes"] == (16 * factor) ** 2 * (768 if "of FeatSharp" in row["name"] else 384) * 4
        # At factor 1 these two have nothing to compute.
        assert row["peak_bytes"] > 0 or (factor == 1 and row["name"] in ("bilinear", "FeatUp JBU"))
        assert row["forward"]["low"] <= row["forward"]["median"] <= row["forward"]["high"]
        assert row["backward"]["median"] > 0
    assert "scaling" not in content
    assert content["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_bench_of_an_encoder(tmp_path, capsys):
    file = tmp_path / "encode.json"
    arguments = ("bench", "encode", "--backbone", "toy-vit", "--factors", "1", "2", "--repeat", "2", "--json", file)
    assert run(*arguments) == 0
    rows = json.loads(file.read_text())["encode"]
    assert {(row["upsampler"], row["factor"], row["passes"]) for row in rows} >= {
        ("identity", 1, 1), ("bilinear", 2, 1), ("tile", 2, 5), ("featup", 2, 1), ("jafar", 2, 1), ("featsharp", 2, 5),
    }  # fmt: skip
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16 autocast"}
    assert "featsharp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ops", "--repeat", "1"), "--repeat must be at least 2"),
        (("ops", "--factors", "0"), "--factors and --threads at least 1"),
        (("ops", "--threads", "0"), "--factors and --threads at least 1"),
        (("encode", "--backbone", "toy-vitt", "--factors", "2"), "did you mean 'toy-vit'"),
    ],
)
def test_bench_of_what_does_not_exist(arguments, said, capsys):
    assert run("bench", *arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_passes_of_every_upsampler_are_counted(capsys):
    names = ("bilinear", "tile", "s2", "featsharp-progressive", "native-highres", "stride")
    assert (
        run("bench", "encode", "--backbone", "toy-vit", "--factors", "4", "--repeat", "2", "--upsamplers", *names) == 0
    )
    found = re.findall(r"^(\S+) +4x float32 +\d+ +\S+ - \S+ +(\d+) ", capsys.readouterr().out, re.M)
    assert dict(found) == dict(zip(names, ("1", "17", "17", "21", "2", "2"), strict=True))
