"""The loop of all tasks: bad items are counted, a stopped one goes on, rows of other encoders are never taken."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.errors import DataError, FeatSharpError
from featsharp.evaluation.fidelity import FidelityTask, pool_fidelity
from featsharp.evaluation.samples import Estimate, bootstrap
from featsharp.evaluation.task import Item, Journal, Row, Subject, Summary, Task, evaluate, from_json, to_json
from featsharp.model import SharpEncoder
from featsharp.settings import setting


@dataclass
class Squares(Task):
    """The squares of numbers; negative ones are bad items."""

    name: ClassVar[str] = "squares"
    title: ClassVar[str] = "squares"

    numbers: tuple[int, ...] = setting((1, 2, 3), "numbers")
    power: int = setting(2, "power")
    measured: list[int] = field(default_factory=list)
    stop_at: int | None = None

    def items(self) -> Iterator[Item]:
        return (Item(f"n{n}", n) for n in self.numbers)

    def begin(self, encoder: SharpEncoder, subject: Subject) -> Any:
        return encoder.factor

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: Any) -> Row:
        if item.data == self.stop_at:
            raise KeyboardInterrupt
        if item.data < 0:
            raise DataError(f"{item.name}: is negative")
        self.measured.append(item.data)
        return {"square": float(item.data**self.power), "_hidden": state}

    def summarize(self, rows: Sequence[Row], state: Any) -> Summary:
        return {"mean": bootstrap([(row["square"],) for row in rows], lambda r: float(r.mean())), "factor": state}


def subject(label: str = "a", factor: float = 2, tag: str = "") -> Subject:
    return Subject(label, lambda: create_encoder("toy-vit", "bilinear", factor), tag)


def test_rows_are_pooled_and_bad_items_counted():
    found = evaluate(Squares((1, -2, 3)), [subject("a"), subject("b", 3)], progress=False)
    assert list(found) == ["a", "b"]
    assert found["a"]["result"]["mean"]["value"] == 5
    assert found["a"]["items"] == {"n1": {"square": 1.0}, "n3": {"square": 9.0}}
    assert found["a"]["skipped"] == [["n-2", "is negative"]]
    assert (found["a"]["factor"], found["b"]["factor"]) == (2, 3)
    json.dumps(found)


def test_nothing_measured_is_an_error_with_the_first_reason():
    with pytest.raises(DataError, match="a: none of 2 items could be measured; the first, n-1: is negative"):
        evaluate(Squares((-1, -2)), [subject()], progress=False)
    with pytest.raises(DataError, match="found nothing to measure on"):
        evaluate(Squares(()), [subject()], progress=False)


def test_a_stopped_evaluation_goes_on(tmp_path):
    journal = tmp_path / "new" / "r.json.rows"
    numbers = (1, -2, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Squares(numbers, stop_at=4), [subject()], journal=journal, progress=False)
    task = Squares(numbers)
    found = evaluate(task, [subject()], journal=journal, progress=False)
    assert task.measured == [4]
    assert found == evaluate(Squares(numbers), [subject()], progress=False)
    assert not journal.exists()


@pytest.mark.parametrize(
    ("task", "who"),
    [
        (Squares((1, 2), power=3), subject()),
        (Squares((1, 2)), subject(factor=3)),
        (Squares((1, 2)), subject(tag="other weights")),
    ],
)
def test_rows_of_other_settings_and_encoders_are_not_taken(tmp_path, task, who):
    journal = tmp_path / "rows"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Squares((1, 2), stop_at=2), [subject()], journal=journal, progress=False)
    evaluate(task, [who], journal=journal, progress=False)
    assert task.measured == [1, 2]


@pytest.mark.parametrize("tail", [b'["k", "n9", {"ro', b"\xff\xfe junk", b'["k", "n9", {"row": {}}]'])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, tail):
    path = tmp_path / "rows"
    Journal(path).add("k", "n1", {"row": {"x": 1.5}})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    book = Journal(path)
    assert book.get("k", "n1") == {"row": {"x": 1.5}}
    assert book.get("k", "n9") is None
    book.add("k", "n2", {"skipped": "bad"})
    assert Journal(path).get("k", "n2") == {"skipped": "bad"}


def test_a_journal_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatSharpError, match=r"cannot write .*file"):
        Journal(tmp_path / "file" / "rows").add("k", "n", {})


def test_estimates_survive_json():
    value = {"a": Estimate(1.0, 0.5, 1.5), "b": [1, {"c": Estimate(2.0, 2.0, 2.0)}]}
    plain = json.loads(json.dumps(to_json(value)))
    assert from_json(plain["a"]) == value["a"]
    assert from_json(plain["b"][1]["c"]) == Estimate(2.0, 2.0, 2.0)
    assert from_json(3) == 3


def test_pooled_fidelity_is_a_ratio_of_sums_over_images(tmp_path):
    """E20: against the definition, from what the images gave."""
    rng = np.random.default_rng(0)
    for n in range(3):
        coarse = rng.integers(0, 256, (6 + n, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((150, 110), Image.Resampling.BICUBIC).save(tmp_path / f"{n}.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    task = FidelityTask(data=Path(tmp_path), views=2)
    encoder = create_encoder("toy-vit", "tile", 2)
    found = evaluate(task, [Subject("tile", lambda: encoder)], progress=False)["tile"]
    assert [name for name, _ in found["skipped"]] == ["bad.png"]
    # Views are drawn by the item's place, so that a bad item does not change those of the others.
    state = task.begin(encoder, subject())
    items = list(task.items())
    with torch.inference_mode():
        rows = [task.measure(encoder, item, n, state) for n, item in enumerate(items) if item.name != "bad.png"]
    assert found["result"]["fidelity_area"]["value"] == pytest.approx(pool_fidelity(rows)["area"].value, rel=1e-6)
    channels = len(rows[0]["_sum"])
    count = sum(row["_count"] for row in rows)
    mean = np.sum([row["_sum"] for row in rows], 0) / (count / channels)
    variance = sum(row["_square"] for row in rows) / count - np.mean(mean**2)
    expected = variance * count / sum(row["_error_area"] for row in rows)
    assert found["result"]["fidelity_area"]["value"] == pytest.approx(expected, rel=1e-6)
