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
from featsharp.evaluation.estimates import Estimate, bootstrap
from featsharp.evaluation.fidelity import FidelityTask, pool_fidelity
from featsharp.evaluation.runner import (
    Item,
    Journal,
    Row,
    Run,
    Subject,
    Summary,
    Task,
    evaluate,
    evaluate_to_file,
    format_result,
    from_json,
    to_json,
)
from featsharp.model import SharpEncoder
from featsharp.settings import setting


@dataclass
class Squares(Task):
    """The squares of numbers; negative ones are bad items."""

    name: ClassVar[str] = "squares"

    numbers: tuple[int, ...] = setting((1, 2, 3), "numbers")
    power: int = setting(2, "power")
    measured: list[int] = field(default_factory=list)
    stop_at: int | None = None
    mended: bool = False

    def items(self) -> Iterator[Item]:
        return (Item(f"n{n}", abs(n) if self.mended else n) for n in self.numbers)

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Any:
        return encoder.factor

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        if item.data == self.stop_at:
            raise KeyboardInterrupt
        if item.data < 0:
            raise DataError(f"{item.name}: is negative")
        self.measured.append(item.data)
        return {"square": float(item.data**self.power), "_hidden": head}

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        return {"mean": bootstrap([(row["square"],) for row in rows], lambda r: float(r.mean())), "factor": head}


def subject(label: str = "a", factor: float = 2, tag: str = "") -> Subject:
    return Subject(label, lambda: create_encoder("toy-vit", "bilinear", factor), tag)


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for n in range(3):
        coarse = rng.integers(0, 256, (6 + n, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((150, 110), Image.Resampling.BICUBIC).save(folder / f"{n}.png")


def test_rows_are_pooled_and_bad_items_counted():
    outcome = evaluate(Squares((1, -2, 3)), [subject("a"), subject("b", 3)], progress=False)
    assert list(outcome) == ["a", "b"]
    assert outcome["a"]["result"]["mean"]["value"] == 5
    assert outcome["a"]["items"] == {"n1": {"square": 1.0}, "n3": {"square": 9.0}}
    assert outcome["a"]["skipped"] == [["n-2", "is negative"]]
    assert (outcome["a"]["factor"], outcome["b"]["factor"]) == (2, 3)
    json.dumps(outcome)


def test_nothing_measured_is_an_error_with_the_first_reason():
    with pytest.raises(DataError, match="a: none of 2 items could be measured; the first, n-1: is negative"):
        evaluate(Squares((-1, -2)), [subject()], progress=False)
    with pytest.raises(DataError, match="has nothing to measure on"):
        evaluate(Squares(()), [subject()], progress=False)


def test_a_stopped_evaluation_goes_on(tmp_path):
    journal = tmp_path / "new" / "r.json.rows"
    numbers = (1, -2, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Squares(numbers, stop_at=4), [subject()], journal=Journal(journal), progress=False)
    task = Squares(numbers)
    outcome = evaluate(task, [subject()], journal=Journal(journal), progress=False)
    assert task.measured == [4]
    assert outcome == evaluate(Squares(numbers), [subject()], progress=False)
    assert journal.exists()  # until the result is written
    Journal(journal).remove()
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
        evaluate(Squares((1, 2), stop_at=2), [subject()], journal=Journal(journal), progress=False)
    evaluate(task, [who], journal=Journal(journal), progress=False)
    assert task.measured == [1, 2]


@pytest.mark.parametrize("tail", [b'["k", "n9", {"ro', b"\xff\xfe junk", b'["k", "n9", {}]'])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, tail):
    path = tmp_path / "rows"
    Journal(path).add("k", "n1", {"x": 1.5})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    book = Journal(path)
    assert book.get("k", "n1") == {"x": 1.5}
    assert book.get("k", "n9") is None
    book.add("k", "n2", {"x": None})
    assert Journal(path).get("k", "n2") == {"x": None}


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
    write_photos(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"junk")
    task = FidelityTask(data=Path(tmp_path), views=2)
    encoder = create_encoder("toy-vit", "tile", 2)
    outcome = evaluate(task, [Subject("tile", lambda: encoder)], progress=False)["tile"]
    assert [name for name, _ in outcome["skipped"]] == ["bad.png"]
    # Views are drawn by the item's place, so that a bad item does not change those of the others.
    meter = task.prepare(encoder, subject(), Run())
    with torch.inference_mode():
        rows = [task.measure(encoder, item, meter) for item in task.items() if item.name != "bad.png"]
    assert outcome["result"]["fidelity_area"]["value"] == pytest.approx(pool_fidelity(rows)["area"].value, rel=1e-6)
    channels = len(rows[0]["_sum"])
    count = sum(row["_count"] for row in rows)
    mean = np.sum([row["_sum"] for row in rows], 0) / (count / channels)
    variance = sum(row["_square"] for row in rows) / count - np.mean(mean**2)
    expected = variance * count / sum(row["_error_area"] for row in rows)
    assert outcome["result"]["fidelity_area"]["value"] == pytest.approx(expected, rel=1e-6)


def test_encoders_that_differ_in_weights_alone_are_measured_apart(tmp_path):
    write_photos(tmp_path)
    encoders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = create_encoder("toy-vit", "featsharp", 2)
        for parameter in encoder.upsampler.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        encoders.append(encoder.eval())
    journal = Journal(tmp_path / "rows")
    task = FidelityTask(data=tmp_path, views=2, limit=1)

    def score(encoder: SharpEncoder) -> float:
        return evaluate(task, [Subject("x", lambda: encoder)], journal=journal, progress=False)["x"]["result"][
            "cosine"
        ]["value"]

    assert score(encoders[0]) != score(encoders[1])
    assert score(encoders[0]) == score(encoders[0])


def test_changed_files_are_measured_again(tmp_path):
    write_photos(tmp_path)
    journal = Journal(tmp_path / "rows")
    task, who = FidelityTask(data=tmp_path, views=2), Subject("x", lambda: create_encoder("toy-vit", "tile", 2))
    first = evaluate(task, [who], journal=journal, progress=False)["x"]["items"]
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    second = evaluate(task, [who], journal=Journal(tmp_path / "rows"), progress=False)["x"]["items"]
    assert first["0.png"] != second["0.png"]
    assert [first[name] == second[name] for name in ("1.png", "2.png")] == [True, True]


def test_a_mended_item_is_measured_when_the_evaluation_goes_on(tmp_path):
    journal = tmp_path / "rows"
    evaluate(Squares((1, -2)), [subject()], journal=Journal(journal), progress=False)
    mended = Squares((1, -2), mended=True)
    outcome = evaluate(mended, [subject()], journal=Journal(journal), progress=False)["a"]
    assert mended.measured == [2]
    assert outcome["skipped"] == []


def test_numbers_that_are_not_finite_are_skipped_and_named(caplog):
    class Spoiled(Squares):
        def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
            row = super().measure(encoder, item, head)
            return {**row, "_sums": [[float("nan")]]} if item.data == 2 else row

    outcome = evaluate(Spoiled((1, 2)), [subject()], progress=False)["a"]
    assert [name for name, _ in outcome["skipped"]] == ["n2"]
    assert "n2 skipped: what was measured is NaN" in caplog.text


def test_a_result_is_written_whole_and_the_journal_goes(tmp_path):
    path = tmp_path / "new" / "r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(Squares((1, 2), stop_at=2), [subject()], path, {"who": "me"}, progress=False)
    assert [file.name for file in path.parent.iterdir()] == ["r.json.rows"]
    task = Squares((1, 2))
    content = evaluate_to_file(task, [subject()], path, {"who": "me"}, progress=False)
    assert task.measured == [2]
    assert json.loads(path.read_text()) == content
    assert (content["task"], content["who"], list(content["encoders"])) == ("squares", "me", ["a"])
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    lines = format_result("a", content["encoders"]["a"])
    assert [line.split()[0] for line in lines] == ["a", "mean", "factor"]
    assert format_result("b", {"failed": "no"}) == ["b  failed: no"]


def test_an_encoder_that_cannot_be_loaded_does_not_cost_the_others():
    def broken() -> SharpEncoder:
        raise FeatSharpError("no such file")

    seen = []
    outcome = evaluate(
        Squares(),
        [subject("a"), Subject("b", broken), subject("c", 3)],
        progress=False,
        report=lambda label, content: seen.append(label),
    )
    assert outcome["b"] == {"failed": "no such file"}
    assert seen == ["a", "b", "c"]
    with pytest.raises(FeatSharpError, match="no such file"):
        evaluate(Squares(), [Subject("b", broken)], progress=False)


def test_encoders_measured_on_different_items_are_pointed_out(caplog):
    class Picky(Squares):
        def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
            if encoder.factor == 3 and item.data == 2:
                raise DataError("is even")
            return super().measure(encoder, item, head)

    evaluate(Picky(), [subject("a"), subject("b", 3)], progress=False)
    assert "measured on different items" in caplog.text
