"""Every configuration file composes with every other, and a mistake in one key is answered at once and in one line."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from featsharp.backbones import MODELS
from featsharp.configs.compose import GROUPS, compose, options_of
from featsharp.errors import ConfigError
from featsharp.normalizers import NORMALIZERS
from featsharp.train import main
from featsharp.training.config import RunConfig, UpsamplerConfig, flatten, to_yaml
from featsharp.training.downsamplers import DOWNSAMPLERS
from featsharp.training.loggers import WRITERS
from featsharp.training.objectives import config_type
from featsharp.training.objectives.multi_view import DISTANCES
from featsharp.upsamplers import UPSAMPLERS

CONFIGS = Path(compose.__code__.co_filename).parent
DIFFERENCES = Path(__file__).resolve().parents[1] / "docs" / "upsamplers.md"
# What has to be given to upsamplers that are a function of the user's.
OWN_FUNCTIONS = {
    "custom": {"function": lambda image, features, size: features},
    "super-resolution": {"enlarge": lambda image: image},
}
BASE = ["+model=toy-vit", "+upsampler=featsharp-2x", "train_data_dir=photos"]


# Composition


# Every name once at least: composing takes a while.
NAMES = [options_of(group) for group in ("model", "upsampler", "normalizer")]
TOGETHER = [*itertools.islice(zip(*map(itertools.cycle, NAMES), strict=True), max(map(len, NAMES)))]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "upsampler", "normalizer"), TOGETHER)
def test_every_name_composes_and_exists(model, upsampler, normalizer):
    factor = 1 if upsampler in ("identity", "s2-pooled") else 4
    groups = (f"+model={model}", f"+upsampler={upsampler}-{factor}x", f"normalizer={normalizer}")
    config = compose([*groups, "train_data_dir=x"])
    assert config.model.name == model
    assert config.output_root == f"outputs/{MODELS[model].folder}"
    assert config.normalizer.name == normalizer
    assert normalizer in NORMALIZERS
    assert config.upsampler.name in UPSAMPLERS
    assert config.upsampler.factor == factor
    options = {**OWN_FUNCTIONS.get(upsampler, {}), **config.upsampler.options}
    module = UPSAMPLERS[config.upsampler.name].factory(32, config.upsampler.factor, **options)
    assert module.factor == factor
    assert module.trainable == (sum(p.numel() for p in module.parameters()) > 0)
    assert type(config.objective) is config_type(config.objective.name)
    if config.objective.name == "multi-view":
        assert config.objective.downsampler in DOWNSAMPLERS
        assert config.objective.distance in DISTANCES
    assert config.viz.type in WRITERS


def test_every_short_name_is_a_model_with_a_folder_of_its_own():
    """Names of the published configurations share that of the name that means the same."""
    models = options_of("model")
    assert models == {name: f"{model.description}." for name, model in sorted(MODELS.items())}
    folders = {model.folder for name, model in MODELS.items() if not name.endswith("px")}
    assert len(folders) == len(MODELS) - 3


@pytest.mark.slow
def test_a_model_given_twice_or_beside_its_keys():
    config = compose([*BASE, "model.name=timm:vit_tiny_patch16_224", "output_subdir=mine"])
    assert (config.model.name, config.output_subdir) == ("timm:vit_tiny_patch16_224", "mine")
    assert compose([*BASE, "model=siglip2"]).output_subdir == MODELS["siglip2"].folder
    assert compose(["model=vit", "model=siglip2", *BASE[1:]]).model.name == "siglip2"
    assert compose(["++model=siglip2", *BASE[1:]]).model.name == "siglip2"
    with pytest.raises(ConfigError, match="Multiple values for model"):
        compose([*BASE, "+model=siglip2"])


@pytest.mark.slow
def test_any_factor_can_be_named():
    def factor(*overrides):
        return compose(["+model=toy-vit", *overrides, "train_data_dir=x"]).upsampler.factor

    assert factor("+upsampler=tile") == 2
    assert factor("+upsampler=tile-1.5x") == 1.5
    assert factor("+upsampler=featsharp-jafar-12x") == 12
    assert factor("+upsampler=tile", "upsampler.factor=3.5") == 3.5
    assert factor("+upsampler=tile-3x", "upsampler.factor=3") == 3
    with pytest.raises(ConfigError, match=r"\+upsampler=tile-3x and upsampler.factor=3.5 differ; give one factor"):
        factor("+upsampler=tile-3x", "upsampler.factor=3.5")


def test_no_upsampler_writes_what_a_model_does():
    for file in (CONFIGS / "upsampler").iterdir():
        assert not set(flatten(yaml.safe_load(file.read_text()))) & {"model.name", "output_subdir"}


@pytest.mark.slow
def test_an_upsampler_given_twice_or_beside_its_keys():
    assert compose([*BASE, "upsampler.name=tile"]).upsampler.name == "tile"
    assert compose([*BASE, "upsampler=tile"]).upsampler.name == "tile"
    assert compose(
        ["+model=toy-vit", "+upsampler=featsharp-linear", "upsampler=tile-4x", "train_data_dir=x"]
    ).upsampler == (UpsamplerConfig("tile", 4))
    linear = compose([*BASE, "upsampler=featsharp-linear-2x"])
    assert linear == compose(["+model=toy-vit", "+upsampler=featsharp-linear-2x", "train_data_dir=photos"])
    with pytest.raises(ConfigError, match="Multiple values for upsampler"):
        compose([*BASE, "+upsampler=tile-2x"])


@pytest.mark.slow
def test_a_preset_builds_on_another(tmp_path):
    """A new file of ``configs/upsampler``, in a copy of the package."""
    shutil.copytree(CONFIGS.parent, tmp_path / "featsharp", ignore=shutil.ignore_patterns("*.safetensors", "*.pyc"))
    header = "# @package _global_\n# Mine.\n"
    for name, base in (("mine", "featsharp"), ("mine-wide", "mine"), ("tile", "featsharp-linear")):
        text = f"{header}defaults: [{base}, _self_]\nupsampler: {{options: {{{name.replace('-', '_')}: 1}}}}\n"
        (tmp_path / "featsharp" / "configs" / "upsampler" / f"{name}.yaml").write_text(text)
    code = (
        "from featsharp.configs.compose import compose, options_of\n"
        "for name in ('mine', 'mine-wide-3x', 'tile'):\n"
        "    chosen = compose(['+model=toy-vit', '+upsampler=' + name, 'train_data_dir=x']).upsampler\n"
        "    print(chosen.name, chosen.factor, *sorted(chosen.options))\n"
        "print(options_of('upsampler')['mine'])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert printed.stdout.splitlines() == [
        "featsharp 2.0 mine",
        "featsharp 3.0 mine mine_wide",
        "featsharp 2.0 attention ffn inputs tile",
        "Mine.",
    ]


def test_published_presets_override_views_and_objective():
    config = compose(["+model=toy-vit", "+upsampler=featsharp-published-2x", "train_data_dir=x"])
    assert config.views.jitter_zoom == [0.95, 1.0526]
    assert config.objective.downsampler == "attention"
    assert config.objective.uncertainty
    assert config.upsampler.options == {"widths": "published", "start": "published"}


def test_every_file_describes_itself():
    for group in GROUPS:
        for name, description in options_of(group).items():
            assert group == "normalizer" or description.endswith("."), f"{group}/{name}"


def test_names_of_the_readme_resolve():
    """U2, U3."""
    config = compose(["+model=siglip2", "+upsampler=featsharp-4x", "num_training_steps=9000", "train_data_dir=x"])
    assert (config.model.name, MODELS["siglip2"].target) == ("siglip2", "hf:google/siglip2-so400m-patch16-512")
    assert (config.upsampler.name, config.upsampler.factor) == ("featsharp", 4)
    assert config.num_training_steps == 9000


@pytest.mark.slow
def test_output_root_of_dinov2_large(monkeypatch):
    """U5."""
    config = compose(["+model=dinov2-l_448px", "+upsampler=featsharp-2x", "train_data_dir=x"])
    assert config.output_root == "outputs/dinov2/large/448"
    config = compose(["+model=dinov2-l_448px", "+upsampler=featsharp-2x", "train_data_dir=x", "output_base=/runs"])
    assert config.output_root == "/runs/dinov2/large/448"


def test_data_folders_default_to_the_training_data(monkeypatch):
    """U9, U11, U12."""
    config = compose(BASE)
    assert config.val_data_dir == config.dist_train_data_dir == config.train_data_dir == "photos"
    config = compose([*BASE, "val_data_dir=held-out", "dist_train_data_dir=[[a,2],b]"])
    assert config.val_data_dir == "held-out"
    assert config.dist_train_data_dir == [["a", 2], "b"]
    monkeypatch.setenv("FEATSHARP_DATA", "/data/photos")
    assert compose(BASE[:2]).val_data_dir == "/data/photos"


def test_overrides_reach_their_key_only():
    config = compose([*BASE, "views.num_views=3", "optim.learning_rate=1e-2", "+upsampler.options.window=5"])
    plain = flatten(dataclasses.asdict(compose(BASE)))
    changed = {k: v for k, v in flatten(dataclasses.asdict(config)).items() if plain[k] != v}
    assert changed == {"views.num_views": 3, "optim.learning_rate": 0.01, "upsampler.options": {"window": 5}}
    assert yaml.safe_load(to_yaml(config))["views"]["num_views"] == 3


def test_a_writer_of_ones_own_is_imported_by_the_run_only():
    """A plan is made where the writer is not at hand; the named module must not run for it."""
    assert compose([*BASE, "viz.type=[wandb,no_such_module:Writer]"]).viz.type == ["wandb", "no_such_module:Writer"]


# One source of truth


def test_defaults_of_the_schema_are_those_of_the_base_file():
    base = flatten(yaml.safe_load((CONFIGS / "base_config.yaml").read_text()))
    schema = flatten(dataclasses.asdict(RunConfig()))
    for key in base.keys() - {"defaults"}:
        assert schema[key] == base[key], key
    given_elsewhere = {"train_data_dir", "val_data_dir", "dist_train_data_dir", "output_subdir", "normalizer.name"}
    given_elsewhere |= {"model.name", "upsampler.name", "upsampler.factor"}
    given_elsewhere |= {key for key in schema if key.startswith("objective.")}  # in the files of that group
    assert schema.keys() - base.keys() == given_elsewhere
    assert RunConfig().normalizer.name == "phi-s"


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["num_trainig_steps=5"], "num_training_steps"),
        (["optim.learning_rat=1"], "optim.learning_rate"),
        (["views.zooms=[1,2]"], "views.zoom"),
        (["+upsampler=featshap-5x"], "did you mean 'featsharp'"),
        (["+model=siglp"], "siglip2"),
        (["+modle=siglip2"], "model"),
        (["normalizer=phis"], "phi-s"),
        (["zzz=1"], "valid keys: accumulation_steps, batch_size"),
        (["num_training_steps=many"], "num_training_steps"),
        (["views.zoom=[1,wide]"], "views.zoom"),
        (["views.zoom=3"], "views.zoom"),
        (["batch_size=1,2"], "batch_size"),
        (["batch_size=null"], "batch_size"),
        (["spectral=maybe"], "spectral"),
        (["batch_size=0"], "batch_size must be at least 1 and finite; got 0"),
        (["views.num_views=0"], "views.num_views must be at least 1"),
        (["views.zoom=[0.5,2]"], "views.zoom must be"),
        (["views.jitter_zoom=[1.5,1.2]"], "views.jitter_zoom must be"),
        (["views.perspective=[0.1]"], "views.perspective must be"),
        (["views.jitter_zoom=[0.95,inf]"], "views.jitter_zoom must be"),
        pytest.param(
            *(["views.rotation=1e400"], "views.rotation must be at least 0 and finite"), marks=pytest.mark.slow
        ),
        pytest.param(*(["views.flip=7"], "views.flip must be at most 1; got 7"), marks=pytest.mark.slow),
        pytest.param(*(["optim.learning_rate=-1"], "optim.learning_rate must be at least 0"), marks=pytest.mark.slow),
        pytest.param(
            *(["optim.clip_norm=nan"], "optim.clip_norm must be at least 0 and finite; got nan"), marks=pytest.mark.slow
        ),
        pytest.param(*(["batch_size"], "key=value"), marks=pytest.mark.slow),
        pytest.param(*(["batch_size=a=b"], "in quotes of their own"), marks=pytest.mark.slow),
        pytest.param(*(["val_data_dir='a'b"], "in quotes of their own"), marks=pytest.mark.slow),
        pytest.param(*(["val_data_dir=a,b"], "To use it as string, quote the value"), marks=pytest.mark.slow),
        pytest.param(
            *(["val_data_dir=s-000.tar", "val_data_dir=s-001.tar"], "val_data_dir is given 2 times"),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(["viz.type=tensorbord"], "did you mean 'tensorboard'?"), marks=pytest.mark.slow),
        pytest.param(*(["viz.type=null"], "viz.type is a name or a list of names"), marks=pytest.mark.slow),
        pytest.param(
            *(["viz.mode=disabled"], "viz.mode must be online, offline or null; got 'disabled'"), marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, said):
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, *overrides])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "object_type" not in str(caught.value)


TEXTS = (
    *("2024_01", "007", "1e5", "true", "inf", ".5", "-3", "~/photos", "/data/größe", "/data/写真", "/data/a=b"),
    *("/data/(1)", "/data/[x]", "/data/a#b", "/data/it's", "C:\\data\\", "C:\\it's", "a;b&c!d"),
    *("https://host/s-{000..099}.tar?part=1", "https://host/a%20b", "données"),
)


@pytest.mark.parametrize("texts", zip(*[iter(TEXTS)] * 3, strict=True))
def test_texts_are_taken_as_they_are_written(texts):
    given = dict(zip(("val_data_dir", "output_subdir", "feature_cache.folder"), texts, strict=True))
    config = flatten(dataclasses.asdict(compose([*BASE, *(f"{key}={text}" for key, text in given.items())])))
    assert {key: config[key] for key in given} == given


@pytest.mark.slow
def test_notations_of_hydra_keep_their_meaning():
    def read(value):
        return compose([*BASE[:2], f"train_data_dir={value}"]).train_data_dir

    assert read("'2024_01'") == read('"2024_01"') == "2024_01"
    assert read("[[photos,2],'a=b']") == [["photos", 2], "a=b"]
    assert read(r"a\=b") == "a=b"
    assert compose([*BASE, "viz.mode=null", "data.filter=null"]).viz.mode is None
    assert compose([*BASE, "seed=2_0"]).seed == 20
    assert compose([*BASE, "output_root='${output_base}/7'"]).output_root == "outputs/7"


def test_options_of_an_upsampler_need_no_mark():
    assert compose([*BASE, "upsampler.options.window=5"]).upsampler.options["window"] == 5
    assert compose([*BASE, "+upsampler.options.window=5"]).upsampler.options["window"] == 5


@pytest.mark.parametrize(
    "override",
    ["upsampler.options.widths=published", "views.jitter_zoom=[0.95,1.0526]", "objective.downsampler=attention",
     "objective.uncertainty=true"],
)  # fmt: skip
def test_overrides_that_restore_what_was_published_compose(override):
    assert override in DIFFERENCES.read_text(encoding="utf-8")
    compose([*BASE, override])


def test_missing_groups_list_what_there_is():
    with pytest.raises(ConfigError) as caught:
        compose(["train_data_dir=x"])
    for name in [*options_of("model"), *options_of("upsampler")]:
        assert name in str(caught.value)


# The plan


def test_dry_run_prints_the_plan_and_builds_nothing(tmp_path, monkeypatch, capsys):
    """U2: no weights are fetched and no folder is made."""
    monkeypatch.chdir(tmp_path)
    assert main(["+model=siglip2", "+upsampler=featsharp-4x", "train_data_dir=/none", "dry_run=true"]) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert plan["upsampler"] == {"name": "featsharp", "factor": 4, "dtype": "auto", "options": {}}
    assert plan["output_root"] == "outputs/siglip2/so400m/512"
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_end_the_command_with_the_valid_ones(capsys):
    assert main(["+model=siglip2", "+upsampler=featshap-5x", "dry_run=true"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featsharp train: unknown upsampler 'featshap'")
    assert all(name in line for name in options_of("upsampler"))


def test_the_saved_form_shows_no_secret_of_an_address_with_blanks():
    address = "https://u:SEC RET@h/a.tar?sig=SEC RET"
    for data in (f"'{address}'", f"[['{address}', 2], photos]"):
        saved = to_yaml(compose(["+model=toy-vit", "+upsampler=featup-2x", f"train_data_dir={data}"]))
        assert "https://***@h/a.tar?sig=***" in saved
        assert "SEC" not in saved
        assert "RET" not in saved


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.name=7", "unknown objective '7'"),
        ("objective.name=[1,2]", r"unknown objective \[1, 2\]"),
        ("checkpoint_frequency=" + "{a:" * 200 + "1" + "}" * 200, "nested too deeply"),
    ],
)
def test_values_of_another_kind_are_refused_in_one_line(override, said):
    with pytest.raises(ConfigError, match=said) as caught:
        compose(["+model=toy-vit", "+upsampler=tile-2x", "train_data_dir=x", override])
    assert "\n" not in str(caught.value)
