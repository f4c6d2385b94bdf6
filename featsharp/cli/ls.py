"""List backbones, upsamplers, weights, normalizers and configurations.

featsharp ls                         everything
featsharp ls backbones               with whether the weights are on this machine; --markdown for the table of the docs
featsharp ls upsamplers              with what each one needs, keeps and costs; --markdown for the table of the docs
featsharp ls weights                 trained weights: ours, in the package, and those that authors of methods published
featsharp ls models                  values of +model= for training; likewise: configs, objectives

Column of backbones: "weights", whether they are found here without a network ("?": only building it can tell).

Columns of upsamplers: "trained", whether there is anything to learn; "keeps space", whether a head trained on
low-resolution features goes on working (yes: weighted means of features; nearly: something learned is added, or they
come from other passes; no: regressed); parameters and cost at factor 2 for 384 channels, the cost as floating-point
operations in units of one pass of a ViT-S/14 over 224 x 224 pixels.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from featsharp.terminal import align, say, wrap

KINDS = ("backbones", "upsamplers", "weights", "normalizers", "models", "configs", "objectives")
BACKBONE_COLUMNS = ("name", "what it is", "licence", "stands for", "why these options")
COLUMNS = ("name", "needs", "trained", "keeps space", "factors", "parameters", "cost", "what it does", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")
    parser.add_argument("--markdown", action="store_true", help="backbones and upsamplers as Markdown tables")


def run(arguments: argparse.Namespace) -> None:
    for kind in [arguments.kind] if arguments.kind else KINDS:
        if arguments.markdown and kind in ("backbones", "upsamplers"):
            columns, rows = (BACKBONE_COLUMNS, backbone_rows()) if kind == "backbones" else (COLUMNS, upsampler_rows())
            for row in (columns, ("---",) * len(columns), *rows):
                say(f"| {' | '.join(row)} |")
            continue
        say(f"{kind}:", *_lines(kind))


def _lines(kind: str) -> Iterator[str]:
    """Yield the lines about one kind for a terminal: names and facts in columns, then text, below it a note."""
    facts: list[tuple[str, ...]]
    if kind == "backbones":
        rows = list(backbone_rows())
        facts = [("name", "weights"), *((name, _weights_text(name)) for name, *_ in rows)]
        texts = ["what it is; licence of the weights (= what it stands for)"]
        texts += [text if licence == "-" else f"{text}; {licence}" for _, text, licence, *_ in rows]
        notes = ["", *("" if target == "-" else f"= {target}" for *_, target, _ in rows)]
    elif kind == "upsamplers":
        rows = list(upsampler_rows())
        facts = [(row[0], *row[2:7]) for row in (COLUMNS, *rows)]
        texts = [""] * len(facts)
        notes = ["", *(f"{does} ({source}); needs {needs}".replace(" (-)", "") for _, needs, *_, does, source in rows)]
    elif kind == "weights":
        weights = list(_weights())
        facts = [(name,) for name, *_ in weights]
        texts, notes = [text for _, text, _ in weights], [note for *_, note in weights]
    else:
        facts = [(name,) for name, _ in _rows(kind)]
        texts = [text for _, text in _rows(kind)]
        notes = [""] * len(facts)
    heads = align(facts[0], facts[1:], numbers=False)
    indent = 4 + max(map(len, heads))
    for head, text, note in zip(heads, texts, notes, strict=True):
        yield from wrap(text, f"  {head}", indent) or [f"  {head}"]
        if kind == "weights":  # addresses and hashes stay whole
            yield from (f"      {line}" for line in note.splitlines())
        else:
            yield from wrap(note, indent=6)


def backbone_rows() -> Iterable[tuple[str, ...]]:
    """Yield a row of text for every short name and every ``prefix:`` form, as :data:`BACKBONE_COLUMNS`."""
    from featsharp.backbones import FAMILIES, MODELS

    for name, model in sorted(MODELS.items()):
        yield name, model.description, model.licence or "-", model.target or "-", model.source or "-"
    for _, family in sorted(FAMILIES.items()):
        yield family.form, family.description, "-", "-", "-"


def upsampler_rows() -> Iterable[tuple[str, ...]]:
    """Yield a row of text for every upsampler, as :data:`COLUMNS`."""
    from featsharp.bench.counting import EMBED_DIM, count_cost
    from featsharp.errors import ConfigError
    from featsharp.upsamplers import UPSAMPLERS, Upsampler
    from featsharp.upsamplers.registration import default_factor

    for entry in UPSAMPLERS.entries():
        # A factory that is no class has no such attributes.
        is_class = isinstance(entry.factory, type) and issubclass(entry.factory, Upsampler)
        kind: Any = entry.factory if is_class else Upsampler
        try:
            cost = count_cost(entry.factory(EMBED_DIM, default_factor(entry.name)))
            parameters, relative = f"{cost.parameters:,}", f"{cost.relative:.2f}"
        except ConfigError:  # needs a function of the user, of unknown cost
            parameters = relative = "-"
        trained = "yes" if kind.trainable else "no"
        yield (
            *(entry.name, kind.needs, trained, kind.keeps_space, kind.factors, parameters, relative),
            *(entry.description, kind.paper or "-"),
        )


def _weights_text(name: str) -> str:
    from featsharp.backbones.local_weights import has_local_weights

    if ":" in name:
        return "-"
    return {True: "here", False: "no", None: "?"}[has_local_weights(name)]


def _rows(kind: str) -> Iterable[tuple[str, str]]:
    if kind == "normalizers":
        from featsharp.normalizers import NORMALIZERS

        yield from ((entry.name, entry.description) for entry in NORMALIZERS.entries())
    else:
        from featsharp.configs.compose import options_of

        group, form = {
            "models": ("model", "+model={}"),
            "configs": ("upsampler", "+upsampler={}-FACTORx"),
            "objectives": ("objective", "objective={}"),
        }[kind]
        yield from ((form.format(name), description) for name, description in options_of(group).items())


def _weights() -> Iterable[tuple[str, str, str]]:
    """Yield name, text and address of weights: ours with their size, those of others with licence and hash."""
    from featsharp.bench.choice import choose_upsampler
    from featsharp.weights import HOME, list_weights
    from featsharp.weights.published import PUBLISHED, hash_file, is_fetched, known_hash

    for name in list_weights():
        chosen = name == choose_upsampler(name.partition("/")[0])
        path = HOME / f"{name}.safetensors"
        text = f"comes with the package, {path.stat().st_size / 2**20:.1f} MiB, Apache-2.0"
        text += ", what featsharp upsample takes for its backbone" if chosen else ""
        yield name, text, f"{path.relative_to(HOME.parents[1]).as_posix()}\nsha256 {hash_file(path)}"
    for name, file in PUBLISHED.items():
        place = "here" if is_fetched(name) else "fetched when loaded"
        digest = known_hash(name) or "not known before the first use"
        text = f"{file.kind} for {file.backbone}, by {file.authors}, {file.licence}; {place}"
        yield name, text, f"{file.address}\nsha256 {digest}"
