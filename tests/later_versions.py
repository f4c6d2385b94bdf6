"""Tests of what came with a later version of a library than the oldest that pyproject.toml allows: skipped before it.

A row is library, version, reason, and a regular expression of test names. The product says such things by an error, or
does not depend on them.
"""

import re
from importlib import metadata

import pytest
from packaging.version import Version

DRAWN = "random initial weights are drawn in another order than those of the record"
LATER = [
    ("av", "18.0", "FFmpeg gives up one frame more after a broken one", "test_a_broken_frame_is_counted"),
    ("pillow", "11.3", "no AVIF", r"AVIF|others_lossy"),
    ("pillow", "11.3", "TIFFs of these kinds are not written, or not read", r"pixel_format.*\[tiff_"),
    ("pillow", "13.0", "TIFFs of these kinds are not read, but refused", r"pixel_format.*\[tiff_(alpha|ycbcr)\]"),
    ("safetensors", "0.7", "no complex tensors", "test_weights.py::test_tensors_of_another_kind_are_refused"),
    (
        "torch",
        "2.6",
        "classes in a refused file are not named",
        "files_that_could_run_code|test_checkpoints_that_do_not",
    ),
    ("torch", "2.6", "fused transformer layers do not know autocast", r"from_hub.*half_types\[radio"),
    ("torch", "2.7", "no torch.compiler.is_exporting", r"-export\]|test_an_exported_program|test_export\.py"),
    ("torch", "2.11", DRAWN, r"test_golden.*\[(start/sapa|upsampler/sapa|implicit/)"),
    (
        *("torch", "2.11", "a device as a context within another one does not count"),
        r"building_on_meta|default_device_of_torch_is|no_tensor_or_elsewhere_is|test_featsharp.py::test_parameter_counts|\[swin_base_patch4",
    ),
    ("torch", "2.11", "a convolution takes more memory for itself", "test_samples_are_made_one_after_the_other"),
    ("timm", "1.0.26", DRAWN, r"test_golden.*\[backbone/(timm random|open_clip siglip)"),
    ("timm", "1.0.26", "no RADIO", r"test_from_timm.*radio|\[backbone/timm radio|timm_knows.*\[c-radio"),
    ("timm", "1.0.26", "no DINOv3 of tiny size, or another native size", r"rotary positions|test_facts.*\[dinov3"),
    (
        *("timm", "1.0.26", "arguments of a model are not saved with it"),
        r"a_directory_of_timm_is_a_backbone|sam_by_name_is_native|weights_of_another_size_have|authors_own_format",
    ),
    ("timm", "1.0.26", "the stages of Inception have no names", "a_map_that_is_not_the_image_over_its_stride"),
    ("timm", "1.0.26", "not built on the meta device", "test_timm_knows_the_weights_and_the_facts"),
    ("transformers", "5.0", "other names of modules, so other weights than the record's", r"\[backbone/transformers"),
    (
        *("transformers", "5.0", "the test reads names and outputs of version 5"),
        r"test_facets_are_the_proj|librarys_own\[clip|text_alignment_survives.*|vision_only_checkpoints_of_clip",
    ),
    ("transformers", "5.0", "foreign code is loaded otherwise", "code_from_elsewhere_is_asked|random_weights_need_no"),
    (
        "transformers",
        "4.56",
        "no DINOv3",
        r"transformers.*dinov3|attention_is_the_fused_one|rotary_positions_of_transformers",
    ),
    (
        "transformers",
        "4.51",
        "no vision tower of SAM alone",
        r"transformers SAM|\[sam\b|of_sam\[|test_sam_takes|from_transformers.py::test_img_size",
    ),
    (
        "transformers",
        "4.50",
        "no SigLIP2 or PaliGemma",
        r"transformers.*(naflex|paligemma)|test_only_the_vision_tower_is_built",
    ),
]


def mark(items: list[pytest.Item]) -> None:
    """Give each test of a later version its mark."""
    for library, version, reason, names in LATER:
        try:
            present = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
        if Version(present) < Version(version):
            skip = pytest.mark.skip(reason=f"{library} {present}, before {version}: {reason}")
            for item in items:
                if re.search(names, item.nodeid):
                    item.add_marker(skip)
