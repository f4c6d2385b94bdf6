"""List what exists.

featsharp ls                 everything
featsharp ls upsamplers
featsharp ls models          values of +model= for training; likewise: configs
"""

import argparse
from collections.abc import Iterable

KINDS = ("backbones", "upsamplers", "normalizers", "models", "configs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this kind")


def run(arguments: argparse.Namespace) -> None:
    for kind in [arguments.kind] if arguments.kind else KINDS:
        rows = list(_rows(kind))
        width = max(len(name) for name, _ in rows)
        print(f"{kind}:")
        for name, description in rows:
            print(f"  {name:{width}}  {description}")


def _rows(kind: str) -> Iterable[tuple[str, str]]:
    if kind == "backbones":
        from featsharp.backbones import BACKBONES, PREFIXES

        yield from ((entry.name, entry.description) for entry in [*BACKBONES.entries(), *PREFIXES.entries()])
    elif kind == "upsamplers":
        from featsharp.upsamplers import UPSAMPLERS

        for entry in UPSAMPLERS.entries():
            trained = "trained" if getattr(entry.factory, "trainable", False) else "no training"
            yield entry.name, f"{entry.description} [needs {getattr(entry.factory, 'needs', 'image')}; {trained}]"
    elif kind == "normalizers":
        from featsharp.normalizers import NORMALIZERS

        yield from ((entry.name, entry.description) for entry in NORMALIZERS.entries())
    else:
        from featsharp.configs.compose import options_of

        group = {"models": "model", "configs": "upsampler"}[kind]
        yield from ((f"+{group}={name}", description) for name, description in options_of(group).items())
