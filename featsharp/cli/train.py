"""Train an upsampler for a backbone, without labels.

    featsharp train +model=vits14-focus +upsampler=featsharp-2x train_data_dir=photos num_training_steps=500
    torchrun --nproc-per-node=8 -m featsharp.train +model=siglip2 +upsampler=featsharp-4x train_data_dir=shards

Arguments are Hydra's overrides, KEY=VALUE; -v and -q may stand anywhere among them. `featsharp ls models` and
`featsharp ls configs` list what +model= and +upsampler= take; every default is in featsharp/configs/base_config.yaml;
dry_run=true prints the plan and stops. Artifacts go to output_base/output_subdir: last.pth, best.pth, config.yaml and
what viz.type writes.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "featsharp train [-h] [-v] [-q] KEY=VALUE ..."


def run(arguments: argparse.Namespace) -> int:
    from featsharp.train import main

    index = arguments.argv.index("train")  # -v and -q may stand before it
    return main([*arguments.argv[:index], *arguments.argv[index + 1 :]])
