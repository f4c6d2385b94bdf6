"""Meaning of the values in label files whose data set does not say it: what they show decides, or they are refused.

The files of both splits are read once. What cannot be told from the values, such as which one is void, has to be given;
docs/usage.md has a table.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from featsharp.errors import DataError
from featsharp.evaluation.layouts.label_files import COLOUR, SUFFIXES, read_label_file, spell
from featsharp.evaluation.layouts.labels import MAX_CLASSES, VOID, FolderOptions, LabelCode, LabelledImage

# Lines of a class table that are no class, in lower case.
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
USUAL_VOID = 255
# Masks of two classes: nothing, and all bits.
_MASKS = ([0, 255], [0, 65535])

# Numbers in a row that never occur, between those that do, unless more than that occur.
_LONGEST_GAP = 16
# Share of files that may have values without a meaning: they are skipped as bad. One always may.
_BAD_SHARE = 0.01
# Files of both splits from which on it tells something that a number is in most of one and in none of the other.
_ENOUGH = 4
# Lengths of rows that nested classes (organ, tumour, core) do not reach.
_MANY_ROWS = 5
_MOST_SHOWN = 8
# Colours of a file that are kept: of a photograph there are many.
_MOST_COLOURS = 1024


class ClassTable(NamedTuple):
    """Names of the classes by number, and their colours as values where it has these.

    ``named`` is False where only the number of classes is given: names are then the numbers in the files.
    """

    names: tuple[str, ...]
    colours: tuple[int, ...] = ()
    named: bool = True


class LabelSurvey:
    """Values that occur in the label files of a data set.

    Args:
        root: Of the data set.
        train, val: Pairs of both splits. Files that cannot be read are left out: they are reported when they are used.
        colours: See :func:`read_label_file`.

    Raises:
        DataError: When files use the indices of their palettes differently.
    """

    def __init__(
        self, root: Path, train: Sequence[LabelledImage], val: Sequence[LabelledImage], colours: Sequence[int]
    ) -> None:
        self.root = root
        self.problem = ""  # of the first file that cannot be read
        self._palette: dict[int, tuple[tuple[int, ...], str]] = {}
        self.train, self.val = (self._read(pairs, colours) for pairs in (train, val))

    def _read(self, pairs: Sequence[LabelledImage], colours: Sequence[int]) -> list[frozenset[int]]:
        files = []
        for pair in pairs:
            try:
                values, _, palette = read_label_file(pair.root / pair.label, pair.label, colours)
            except DataError as error:
                self.problem = self.problem or str(error)
                continue
            found = _unique(values)
            if palette is not None:
                used = [index for index in found if index < len(palette)]
                self._compare(pair.label, {index: tuple(palette[index].tolist()) for index in used})
            files.append(frozenset(found[:_MOST_COLOURS] if found[-1] >= COLOUR else found))
        return files

    def _compare(self, name: str, palette: dict[int, tuple[int, ...]]) -> None:
        for index, colour in palette.items():
            other, first = self._palette.setdefault(index, (colour, name))
            if other != colour:
                raise DataError(
                    f"{self.root}: the palettes of the labels differ: index {index} is {other} in {first} and {colour} "
                    f"in {name}. If indices are the classes, store them as grey images; if colours are, list them in "
                    "classes.txt (a line for each: NAME R G B)"
                )

    def refuse(self, problem: str, remedy: str) -> NoReturn:
        """Raise DataError with the values of both splits."""
        raise DataError(
            f"{self.root}: {problem}. Training labels ({len(self.train)} files) show {_describe(self.train)}; "
            f"validation labels ({len(self.val)} files) {_describe(self.val)}. {remedy}"
        )


def find_code(survey: LabelSurvey, table: ClassTable | None, options: FolderOptions) -> LabelCode:
    """Find the meaning of the values of a data set.

    Args:
        survey: Of its files.
        table: Of its classes; None: there are ``options.classes``, or as many as the training labels show.
        options: Number of classes, and the void one.

    Raises:
        DataError: When the values have no meaning that is certain, mean different things in both splits, or leave one
            class: with the values, and what to give.
    """
    if table is None and options.classes is not None:
        table = ClassTable(tuple(map(str, range(options.classes))), named=False)
    files = survey.train + survey.val
    found = sorted(_values_of(files))
    if any(value >= COLOUR for value in found) and not (table and table.colours):
        coloured = [file for file in files if max(file) >= COLOUR]
        if not _are_few(survey, coloured):
            survey.refuse(
                "labels are colours, whose classes are not known",
                "List them in classes.txt (a line for each class: NAME R G B, and void R G B for pixels without one), "
                "or store the number of the class of each pixel in grey images",
            )
    given = options.ignore_index
    kinds = [[file for file in files if value in file] for value in (1, USUAL_VOID)]
    apart = sum(map(len, kinds)) <= len(files) and not any(_are_few(survey, kind) for kind in kinds)
    if given is None and found == [0, 1, USUAL_VOID] and apart and not set(kinds[0]) & set(kinds[1]):
        survey.refuse(
            f"some masks have 0 and 1, others 0 and {USUAL_VOID}, and none has all three",
            f"Bring all to one convention, or give --ignore-index {USUAL_VOID} if it is void",
        )
    mask = [value for value in found if value != given]
    if _is_mask(mask, table):
        names = table.names if table and table.named else tuple(map(str, mask))
        code = LabelCode(names, {mask[0]: 0, mask[1]: 1} | ({} if given is None else {given: VOID}))
    elif table is not None:
        code = _declared_code(survey, table, given)
    else:
        code = _shown_code(survey, given)
    if len(code.classes) > MAX_CLASSES:
        survey.refuse(f"{len(code.classes)} classes are more than {MAX_CLASSES}", "Ids of instances are no classes")
    bad = [file for file in files if not file <= code.codes.keys()]
    if not _are_few(survey, bad):
        _refuse_unknown(survey, code, _values_of(bad) - code.codes.keys(), table)
    _check_splits(survey, code)
    return code


def _is_mask(numbers: list[int], table: ClassTable | None) -> bool:
    plain = table is None or (len(table.names) == 2 and not any(map(_is_void, table.names)))
    return plain and numbers in _MASKS


def _declared_code(survey: LabelSurvey, table: ClassTable, given: int | None) -> LabelCode:
    """Make the code of classes that are listed: line c is number c, unless void has no line."""
    names, count = table.names, len(table.names)
    void = {given} if given is not None else {USUAL_VOID} - set(range(count))
    numbers = [value for value in _values_of(survey.train + survey.val) - void if value < COLOUR]
    lines = list(range(count))
    if max(numbers, default=0) == count and not table.colours:
        if given in lines and not _is_void(names[given]):
            lines = [number for number in range(count + 1) if number != given]
        elif 0 not in numbers and given not in lines:
            lines = list(range(1, count + 1))
    if not table.named:
        names = tuple(map(str, lines))
    kept = [c for c, number in enumerate(lines) if number not in void and not _is_void(names[c])]
    meaning = dict.fromkeys(range(count), VOID) | {c: place for place, c in enumerate(kept)}
    codes = dict.fromkeys(void, VOID) | {number: meaning[c] for c, number in enumerate(lines)}
    codes |= {colour: meaning[c] for c, colour in enumerate(table.colours)}
    return LabelCode(tuple(names[c] for c in kept), codes, table.colours)


def _shown_code(survey: LabelSurvey, given: int | None) -> LabelCode:
    """Make the code of the classes that training labels show: from the smallest number to the largest."""
    if not survey.train:
        raise DataError(
            f"{survey.root}: no training label can be read: {survey.problem}; labels are lossless images "
            f"({', '.join(SUFFIXES)}) with the names of their pictures"
        )
    void = USUAL_VOID if given is None else given
    found = {value for value in _values_of(survey.train) if value < COLOUR}
    if given is None and void in found and (void - 1 in found or max(found) > void):
        survey.refuse(
            f"{void} may be void or a class",
            f"Give --ignore-index {void}, or the void number, or -1 where there is none",
        )
    numbers = sorted(found - {void})
    if numbers:
        _check_gaps(survey, numbers)
        _check_instances(survey, [file - {void} for file in survey.train + survey.val])
    shown = [number for number in range(min(numbers, default=0), max(numbers, default=-1) + 1) if number != void]
    codes = {number: c for c, number in enumerate(shown)}
    return LabelCode(tuple(map(str, codes)), codes | {void: VOID})


def _check_gaps(survey: LabelSurvey, numbers: list[int]) -> None:
    if numbers[0] < 0:
        survey.refuse("a number below 0 is no class", f"Give --ignore-index {numbers[0]} if it is void")
    for before, after in zip([-1, *numbers], numbers, strict=False):
        if after - before - 1 > max(_LONGEST_GAP, len(numbers)):
            survey.refuse(
                f"between {before} and {after} no number occurs, which is no row of classes" if before >= 0
                else f"the numbers begin at {after}, which is no row of classes",
                f"If {numbers[-1]} is void, give --ignore-index {numbers[-1]}; if all are classes, --classes "
                f"{numbers[-1] + 1} or their names in classes.txt; ids of instances have to be replaced by classes",
            )  # fmt: skip


def _check_instances(survey: LabelSurvey, files: Sequence[frozenset[int]]) -> None:
    """Refuse files that each number their objects from 1 on: classes leave gaps, as not every picture has them all."""
    odd = [file for file in files if file and (min(file) > 1 or max(file) - min(file) >= len(file))]
    if len({max(file) for file in files if file}) >= _MANY_ROWS and not odd:
        survey.refuse(
            "every file has a row of numbers without a gap, of a length of its own, as ids of instances have",
            "Replace ids of instances by classes; if these are classes, give --classes N or their names in classes.txt",
        )


def _refuse_unknown(survey: LabelSurvey, code: LabelCode, unknown: set[int], table: ClassTable | None) -> NoReturn:
    values = _list(sorted(unknown))
    if table is None:
        survey.refuse(
            f"validation labels have {values}, which training labels never show",
            "Give --classes N or classes.txt if they mean the same in both, and --ignore-index N for void",
        )
    survey.refuse(
        f"there are {len(table.names)} classes, but labels have {values}; allowed are {code.allowed}",
        "Give the void number (--ignore-index N), or the right number of classes (--classes N, or a line in "
        "classes.txt for each)",
    )


def _check_splits(survey: LabelSurvey, code: LabelCode) -> None:
    """Refuse splits with one class, and those of which one has a number nearly everywhere, the other nowhere."""
    meant = [[file for file in files if file <= code.codes.keys()] for files in (survey.train, survey.val)]
    for split, files in zip(("training", "validation"), meant, strict=True):
        found = _values_of(files)
        classes = {code.codes[value] for value in found} - {VOID}
        if files and len(classes) < 2:
            void = sorted(value for value in found if code.codes[value] == VOID)
            survey.refuse(
                f"{len(classes)} class is left in {split} labels" + (f" beside {_list(void)}, void" if void else ""),
                "Masks are two classes without --ignore-index"
                if sorted(found) in _MASKS
                else "A score takes two: give another void number (--ignore-index N, -1 where there is none)",
            )
    counts = [_count(files) for files in meant]
    for here, there, split in ((0, 1, "training"), (1, 0, "validation")):
        if min(map(len, meant)) < _ENOUGH:
            return
        for value, number in counts[here].items():
            if code.codes[value] != VOID and number * 2 > len(meant[here]) and value not in counts[there]:
                survey.refuse(
                    f"{spell(value)} is in {number} of {len(meant[here])} {split} labels and in none of the other "
                    "split, so that numbers seem to mean different classes",
                    "Bring both splits to one convention",
                )


def _are_few(survey: LabelSurvey, bad: Sequence[frozenset[int]]) -> bool:
    return len(bad) <= max(1, _BAD_SHARE * (len(survey.train) + len(survey.val)))


def _is_void(name: str) -> bool:
    return name.lower() in VOID_NAMES


def _unique(values: np.ndarray) -> list[int]:
    if values.dtype == np.uint8:
        seen = np.zeros(256, bool)
        seen[values.ravel()] = True
        return np.flatnonzero(seen).tolist()
    return np.unique(values).tolist()


def _values_of(files: Iterable[frozenset[int]]) -> set[int]:
    return set().union(*files)


def _count(files: Iterable[frozenset[int]]) -> Counter[int]:
    return Counter(value for file in files for value in file)


def _describe(files: Sequence[frozenset[int]]) -> str:
    counts = sorted(_count(files).items())
    shown = ", ".join(f"{spell(value)} (in {number})" for value, number in counts[:_MOST_SHOWN])
    more = len(counts) - _MOST_SHOWN
    return (shown or "nothing") + (f" and {more} others up to {spell(counts[-1][0])}" if more > 0 else "")


def _list(values: Sequence[int]) -> str:
    """Format sorted values, the first and the last of many."""
    if len(values) > _MOST_SHOWN:
        return f"{len(values)} others from {spell(values[0])} to {spell(values[-1])}"
    return ", ".join(map(spell, values))
