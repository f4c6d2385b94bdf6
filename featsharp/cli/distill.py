"""Distil teachers, whose features are upsampled, into a small student, without labels.

    featsharp distill teachers=vits14-focus upsamplers=vits14-focus/featsharp-2x train_data_dir=photos
    featsharp distill 'teachers=[vits14-focus,mobilenetv2]' upsamplers=views-2x train_data_dir=photos
    featsharp eval neighbours --data photos --backbone student:outputs/distill/last.pth --upsampler identity-1x

Arguments are Hydra's overrides, KEY=VALUE; -v and -q may stand anywhere among them. upsamplers= takes what
load_from_file takes, or none, for all teachers or as a list; every default is in featsharp/configs/distill_config.yaml;
dry_run=true prints the plan and stops. Artifacts go to output_base/output_subdir: last.pth, best.pth, config.yaml and
what viz.type writes. The checkpoints are backbones: student:FILE.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "featsharp distill [-h] [-v] [-q] KEY=VALUE ..."


def run(arguments: argparse.Namespace) -> int:
    from featsharp.distill import main

    index = arguments.argv.index("distill")  # -v and -q may stand before it
    return main([*arguments.argv[:index], *arguments.argv[index + 1 :]])
