"""List what exists.

featsharp ls                         everything
featsharp ls upsamplers              with what each one needs, keeps and costs; --markdown for the table of the docs
featsharp ls models                  values of +model= for training; likewise: configs, objectives

Columns of upsamplers: "trained", whether there is anything to learn; "keeps space", whether a head trained on
low-resolution features goes on working (yes: weighted means of features; nearly: something learned is added, or they
come from other passes; no: regressed); parameters and cost at factor 2 for 384 channels, the cost as floating-point
operations in units of one pass of a ViT-S/14 over 224 x 224 pixels.
"""

import argparse
from collections.abc import Iterable
from typing import Any

KINDS = ("backbones", "upsamplers", "normalizers", "models", "configs", "objectives")
COLUMNS = ("name", "needs", "trained", "keeps space", "factors", "parameters", "cost", "what it does", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")
    parser.add_argument("--markdown", action="store_true", help="upsamplers as a Markdown table")


def run(arguments: argparse.Namespace) -> None:
    for kind in [arguments.kind] if arguments.kind else KINDS:
        if kind == "upsamplers":
            _print_table(list(upsampler_rows()), markdown=arguments.markdown)
            continue
        rows = list(_rows(kind))
        width = max(len(name) for name, _ in rows)
        print(f"{kind}:")
        for name, description in rows:
            print(f"  {name:{width}}  {description}")


def upsampler_rows() -> Iterable[tuple[str, ...]]:
    """One row of text for every upsampler, as :data:`COLUMNS`."""
    from featsharp.benchmark.cost import EMBED_DIM, count_cost
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


def _print_table(rows: list[tuple[str, ...]], *, markdown: bool) -> None:
    if markdown:
        for row in (COLUMNS, ("---",) * len(COLUMNS), *rows):
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    print("upsamplers:")
    for row in (COLUMNS, *rows):
        print(("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))).rstrip())


def _rows(kind: str) -> Iterable[tuple[str, str]]:
    if kind == "backbones":
        from featsharp.backbones import BACKBONES, PREFIXES

        yield from ((entry.name, entry.description) for entry in [*BACKBONES.entries(), *PREFIXES.entries()])
    elif kind == "normalizers":
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
