"""List what exists.

featsharp ls                         everything
featsharp ls backbones               with whether the weights are on this machine; --markdown for the table of the docs
featsharp ls upsamplers              with what each one needs, keeps and costs; --markdown for the table of the docs
featsharp ls weights                 trained weights that come with the package
featsharp ls models                  values of +model= for training; likewise: configs, objectives

Column of backbones: "weights", whether they are found here without a network ("?": only building it can tell).

Columns of upsamplers: "trained", whether there is anything to learn; "keeps space", whether a head trained on
low-resolution features goes on working (yes: weighted means of features; nearly: something learned is added, or they
come from other passes; no: regressed); parameters and cost at factor 2 for 384 channels, the cost as floating-point
operations in units of one pass of a ViT-S/14 over 224 x 224 pixels.
"""

import argparse
from collections.abc import Iterable
from typing import Any

from featsharp.table import align

KINDS = ("backbones", "upsamplers", "weights", "normalizers", "models", "configs", "objectives")
BACKBONE_COLUMNS = ("name", "what it is", "stands for", "why these options")
COLUMNS = ("name", "needs", "trained", "keeps space", "factors", "parameters", "cost", "what it does", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")
    parser.add_argument("--markdown", action="store_true", help="backbones and upsamplers as Markdown tables")


def run(arguments: argparse.Namespace) -> None:
    for kind in [arguments.kind] if arguments.kind else KINDS:
        if kind == "backbones":
            _print_backbones(markdown=arguments.markdown)
            continue
        if kind == "upsamplers":
            _print_table(kind, COLUMNS, list(upsampler_rows()), markdown=arguments.markdown)
            continue
        rows = list(_rows(kind))
        width = max((len(name) for name, _ in rows), default=0)
        print(f"{kind}:")
        for name, description in rows:
            print(f"  {name:{width}}  {description}")


def backbone_rows() -> Iterable[tuple[str, ...]]:
    """One row of text for every short name and every ``prefix:`` form, as :data:`BACKBONE_COLUMNS`."""
    from featsharp.backbones import ALIASES, BACKBONES, PREFIXES, list_backbones

    for name in list_backbones():
        if name in ALIASES:
            alias = ALIASES[name]
            yield name, alias.description, alias.target, alias.source or "-"
        else:
            yield name, BACKBONES[name].description, "-", "-"
    for entry in PREFIXES.entries():
        form, _, description = entry.description.partition(" ")
        yield form, description, "-", "-"


def upsampler_rows() -> Iterable[tuple[str, ...]]:
    """One row of text for every upsampler, as :data:`COLUMNS`."""
    from featsharp.bench.cost import EMBED_DIM, count_cost
    from featsharp.errors import ConfigError
    from featsharp.upsamplers import UPSAMPLERS, Upsampler

    for entry in UPSAMPLERS.entries():
        # A factory that is no class says nothing about itself.
        is_class = isinstance(entry.factory, type) and issubclass(entry.factory, Upsampler)
        kind: Any = entry.factory if is_class else Upsampler
        try:
            cost = count_cost(entry.factory(EMBED_DIM, 1 if kind.factors == "one" else 2))
            parameters, relative = f"{cost.parameters:,}", f"{cost.relative:.2f}"
        except ConfigError:  # wants a function of the user's, whose cost nobody knows
            parameters = relative = "-"
        trained = "yes" if kind.trainable else "no"
        yield (
            *(entry.name, kind.needs, trained, kind.keeps_space, kind.factors, parameters, relative),
            *(entry.description, kind.paper or "-"),
        )


def _print_backbones(*, markdown: bool) -> None:
    """The rows; on a terminal with what is found on this machine in place of the explanations."""
    rows = list(backbone_rows())
    if not markdown:
        rows = [(name, _weights_text(name), description, target) for name, description, target, _ in rows]
    columns = BACKBONE_COLUMNS if markdown else ("name", "weights", *BACKBONE_COLUMNS[1:3])
    _print_table("backbones", columns, rows, markdown=markdown)


def _weights_text(name: str) -> str:
    from featsharp.backbones.local_weights import has_local_weights

    if ":" in name:
        return "-"
    return {True: "here", False: "no", None: "?"}[has_local_weights(name)]


def _print_table(kind: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], *, markdown: bool) -> None:
    if markdown:
        for row in (columns, ("---",) * len(columns), *rows):
            print(f"| {' | '.join(row)} |")
        return
    print(f"{kind}:")
    for line in align(columns, rows, numbers=False):
        print(f"  {line}")


def _rows(kind: str) -> Iterable[tuple[str, str]]:
    if kind == "normalizers":
        from featsharp.normalizers import NORMALIZERS

        yield from ((entry.name, entry.description) for entry in NORMALIZERS.entries())
    elif kind == "weights":
        from featsharp.weights import DEFAULT, list_weights

        for name in list_weights():
            yield name, "comes with the package" + (", the default of featsharp upsample" if name == DEFAULT else "")
    else:
        from featsharp.configs.compose import options_of

        group, form = {
            "models": ("model", "+model={}"),
            "configs": ("upsampler", "+upsampler={}-FACTORx"),
            "objectives": ("objective", "objective={}"),
        }[kind]
        yield from ((form.format(name), description) for name, description in options_of(group).items())
