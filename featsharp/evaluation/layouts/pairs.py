"""Layouts of data sets of semantic correspondence.

    spair       SPair-71k (arXiv 1908.10543)
                    PairAnnotation/{trn,val,test}/NUMBER-SOURCE-TARGET:CATEGORY.json   src_kps, trg_kps, trg_bndbox ...
                    JPEGImages/CATEGORY/NAME.jpg
                    Layout/large/{trn,val,test}.txt     names of the pairs; without it all of PairAnnotation are taken
    pf-pascal   PF-PASCAL (Proposal Flow, arXiv 1703.07144)
                    test_pairs_pf_pascal.csv or test_pairs.csv      source_image, target_image, class (1..20), and
                                                                    XA, YA, XB, YB: numbers separated by semicolons
                    Annotations/CATEGORY/NAME.mat       kps [K, 2], NaN where hidden, for lists without XA ... YB; bbox
                    JPEGImages/NAME.jpg
    pf-willow   PF-WILLOW (Proposal Flow, CVPR 2016)
                    GROUP/NAME.png, GROUP/NAME.mat      pts_coord [2, K]
                    test_pairs.csv or test_pairs_pf.csv     two images, then all x and all y of the first, then of the
                                                            second; without it all ordered pairs within each group

An image in a list is looked up by its name (pf-pascal) or its group and name (pf-willow), without other folders before
it. SPair-71k counts pixels from 0, the MATLAB annotations of the other two from 1.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np

from featsharp.data.images import is_image_name
from featsharp.errors import DataError
from featsharp.evaluation.layouts.class_names import VOC
from featsharp.evaluation.layouts.keypoints import Entry, Pair, PairOptions, larger_side, make_pair, parse_numbers
from featsharp.evaluation.layouts.layout import Layout, choose_layout, has_folders
from featsharp.evaluation.layouts.mat import read_mat
from featsharp.files import list_files, path_in_list, read_lines

# By the text in PF-PASCAL's lists: numbers, or the names themselves. VOC begins with the background.
_CATEGORIES = {str(number): name for number, name in enumerate(VOC) if number} | {name: name for name in VOC[1:]}

_DEFAULTS = PairOptions()


def find_layout(root: Path, layout: str = "auto") -> str:
    """Return the name of the layout of a folder; ConfigError and DataError as of :func:`choose_layout`."""
    if layout in LAYOUTS and root.is_dir():
        return layout  # its reader reports missing files
    return choose_layout(LAYOUTS, layout, root, "correspondence")[0]


def list_pairs(root: Path, layout: str = "auto", options: PairOptions = _DEFAULTS) -> list[Entry]:
    """List all pairs of a data set.

    Args:
        root: Its folder.
        layout: A key of :data:`LAYOUTS`, or "auto" for the first that fits.
        options: Choice of pairs.

    Raises:
        ConfigError: For an unknown layout.
        DataError: When the folder does not have the layout, or the split is empty.
    """
    layout = find_layout(root, layout)
    entries = list(LAYOUTS[layout].read(root, options))
    if not entries:
        raise DataError(f"{root}: the split {options.split!r} of layout {layout} has no pairs")
    return entries


def _list_spair(root: Path, options: PairOptions) -> Iterator[Entry]:
    folder = root / "PairAnnotation" / options.split
    listed = options.pair_list or root / "Layout" / "large" / f"{options.split}.txt"
    if listed.is_file():
        names = list(filter(None, read_lines(listed)))
    elif options.pair_list is not None:
        raise DataError(f"{options.pair_list}: no such file")
    elif folder.is_dir():
        names = [Path(name).stem for name in list_files(folder, deep=False) if name.endswith(".json")]
    else:
        raise DataError(f"{root}: layout spair has its pairs in PairAnnotation/{options.split}, which is missing")
    for name in names:
        yield Entry(name, name.partition(":")[2], partial(_read_spair, root, folder / f"{name}.json"))


def _read_spair(root: Path, path: Path) -> Pair:
    try:
        content = json.loads(path.read_bytes())
        category = str(content["category"])
        folder = root / "JPEGImages" / category
        images = folder / content["src_imname"], folder / content["trg_imname"]
        points = parse_numbers(content["src_kps"], path) + 0.5, parse_numbers(content["trg_kps"], path) + 0.5
        box = larger_side(content["trg_bndbox"], path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no annotation of SPair-71k: {type(error).__name__} {error}") from None
    return make_pair(path, images, points, category, box)


def _list_pascal(root: Path, options: PairOptions) -> Iterator[Entry]:
    names = (f"{options.split}_pairs_pf_pascal.csv", f"{options.split}_pairs.csv")
    path = options.pair_list or _find_list(root, names)
    if path is None:
        raise DataError(
            f"{root}: layout pf-pascal needs a list of pairs, {' or '.join(names)}; put it there, or name it with "
            "--pair-list"
        )
    for number, header, fields in _table(path):
        if isinstance(fields, DataError):
            yield _refused(number, fields)
            continue
        location, row = f"{path} line {number}", dict(zip(header, fields, strict=True))
        try:
            source, target, category = row["source_image"], row["target_image"], _CATEGORIES[row["class"]]
        except KeyError:
            wrong = DataError(f"{location}: expected the columns source_image, target_image and class (1..20)")
            yield _refused(number, wrong)
            continue
        name = f"{number}-{path_in_list(source).stem}-{path_in_list(target).stem}:{category}"
        yield Entry(name, category, partial(_read_pascal, root, location, row, (source, target), category))


def _read_pascal(root: Path, location: str, row: dict[str, str], names: tuple[str, str], category: str) -> Pair:
    folder = root / "JPEGImages"
    images = folder / path_in_list(names[0]).name, folder / path_in_list(names[1]).name
    annotations = [root / "Annotations" / category / f"{image.stem}.mat" for image in images]
    if row.get("flip", "0") not in ("", "0"):
        raise DataError(f"{location}: mirrored pairs are for training and not read here")
    if all(key in row for key in ("xa", "ya", "xb", "yb")):
        lists = [parse_numbers(row[key].strip(";").split(";"), location) for key in ("xa", "ya", "xb", "yb")]
        source, target = _stack(lists[:2], location), _stack(lists[2:], location)
    else:
        source, target = (parse_numbers(_variable(path, "kps"), path) for path in annotations)
    box = None
    if annotations[1].is_file() and "bbox" in (content := read_mat(annotations[1])):
        box = larger_side(content["bbox"], annotations[1])
    return make_pair(location, images, (source - 0.5, target - 0.5), category, box)


def _list_willow(root: Path, options: PairOptions) -> Iterator[Entry]:
    path = options.pair_list or _find_list(root, (f"{options.split}_pairs.csv", f"{options.split}_pairs_pf.csv"))
    if path is not None:
        for number, _, fields in _table(path):
            if isinstance(fields, DataError):
                yield _refused(number, fields)
                continue
            source, target, *numbers = fields
            group = path_in_list(source).parent.name
            name = f"{number}-{path_in_list(source).stem}-{path_in_list(target).stem}:{group}"
            images = _in_group(root, source), _in_group(root, target)
            read = partial(_read_willow_row, f"{path} line {number}", images, numbers, group)
            yield Entry(name, group, read)
        return
    for label in _groups(root):
        folder = root / label
        names = (Path(name) for name in list_files(folder, deep=False))
        stems = sorted({path.stem for path in names if path.suffix == ".mat" or is_image_name(path.name)})
        for source, target in permutations(stems, 2):
            read = partial(_read_willow, folder, (source, target), label)
            yield Entry(f"{source}-{target}:{label}", label, read)


def _read_willow_row(location: str, images: tuple[Path, Path], numbers: Sequence[str], group: str) -> Pair:
    values = parse_numbers(numbers, location)
    if len(values) == 0 or len(values) % 4:
        raise DataError(f"{location}: {len(values)} numbers are not x and y of as many keypoints in two images")
    source, target = values.reshape(2, 2, -1)
    return make_pair(location, images, (source.T - 0.5, target.T - 0.5), group)


def _read_willow(folder: Path, stems: tuple[str, str], group: str) -> Pair:
    images, points = [], []
    for stem in stems:
        names = (name for name in list_files(folder, deep=False) if Path(name).stem == stem and is_image_name(name))
        image = next(names, None)
        if image is None:
            raise DataError(f"{folder / stem}.mat: its image is missing")
        path = folder / f"{stem}.mat"
        images.append(folder / image)
        points.append(parse_numbers(_variable(path, "pts_coord"), path).T - 0.5)
    return make_pair(folder / f"{stems[0]}.mat", (images[0], images[1]), (points[0], points[1]), group)


def _groups(root: Path) -> list[str]:
    """List the folders below ``root``, relative to it, with images and .mat files of their names."""
    files = [PurePosixPath(name) for name in list_files(root)]
    annotations = {path.with_suffix("") for path in files if path.suffix == ".mat"}
    images = {path.with_suffix("") for path in files if is_image_name(path.name)}
    return sorted({path.parent.as_posix() for path in annotations & images} - {"."})


def _is_willow(root: Path) -> bool:
    return bool(_groups(root))


def _in_group(root: Path, name: str) -> Path:
    path = path_in_list(name)
    return root / path.parent.name / path.name


def _find_list(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _refused(number: int, error: DataError) -> Entry:
    """Make an entry for a row that is no pair: reading it raises the reason."""
    return Entry(f"line {number}", "", partial(_raise, error))


def _raise(error: DataError) -> NoReturn:
    raise error


def _table(path: Path) -> Iterator[tuple[int, list[str], list[str] | DataError]]:
    """Iterate over the rows of a CSV file: (line, header in lower case, fields or the error), two columns or more."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    header = [name.strip().lower() for name in lines[0]] if lines else []
    for number, fields in enumerate(lines[1:], start=2):
        if not fields:
            continue
        if len(fields) != len(header) or len(header) < 2:
            wrong = DataError(f"{path} line {number}: {len(fields)} fields under a header of {len(header)}")
            yield number, header, wrong
        else:
            yield number, header, [field.strip() for field in fields]


def _stack(axes: Sequence[np.ndarray], location: str) -> np.ndarray:
    """Stack x and y to [K, 2]."""
    if len(axes[0]) != len(axes[1]):
        raise DataError(f"{location}: {len(axes[0])} keypoints have an x and {len(axes[1])} a y")
    return np.stack(list(axes), axis=1)


def _variable(path: Path, name: str) -> Any:
    content = read_mat(path)
    if name not in content:
        raise DataError(f"{path} has no variable {name!r}; it holds {', '.join(content) or 'nothing'}")
    return content[name]


# By name; "auto" takes the first that fits. ``read`` takes the folder and PairOptions and yields entries.
LAYOUTS: dict[str, Layout] = {
    "spair": Layout(
        "PairAnnotation/{trn,val,test}/*.json and JPEGImages/CATEGORY", has_folders("PairAnnotation"), _list_spair
    ),
    "pf-pascal": Layout("JPEGImages and a list of pairs, test_pairs.csv", has_folders("JPEGImages"), _list_pascal),
    "pf-willow": Layout("folders of images with .mat files beside them", _is_willow, _list_willow),
}
