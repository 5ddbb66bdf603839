import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client_agent.data import Examples, found_labels, read_examples
from client_agent.drawing import batches, sample, seed_of
from shelora.errors import DomainError, Reason

LABELS = ("bad", "good")
ROWS = [{"text": "fine, really", "label": "good"}, {"text": "no\nway", "label": "bad"}]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def refusal(path: Path, labels: tuple[str, ...] = LABELS) -> str:
    with pytest.raises(DomainError) as caught:
        read_examples(path, "text", "label", labels)
    assert caught.value.reason is Reason.DATA_INVALID
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS)
    expected = Examples(("fine, really", "no\nway"), (1, 0))
    assert read_examples(path, "text", "label", LABELS) == expected
    assert expected.count_by_label(LABELS) == {"bad": 1, "good": 1}
    assert found_labels(path, "label") == LABELS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_unknown_label_is_named_with_its_place(tmp_path: Path, suffix: str) -> None:
    message = refusal(write(tmp_path / f"data{suffix}", [*ROWS, {"text": "hm", "label": "meh"}]))
    assert "'meh'" in message
    assert "bad, good" in message
    assert {".jsonl": "line 3", ".csv": "line 5", ".parquet": "row 3"}[suffix] in message


def test_numbers_serve_as_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "a", "label": 1}])
    assert read_examples(path, "text", "label", ("0", "1")).labels == (1,)


def test_texts_alone_are_enough_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "a"}])
    assert read_examples(path, "text", "label", ()) == Examples(("a",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no examples"),
        ("{\n", "line 1, column 2: not valid JSON"),
        ("[1]\n", "line 1: must be a JSON object"),
        ('{"label": "good"}\n', "field 'text' is missing (set data.text_field); fields there: label"),
        ('{"text": "a"}\n', "field 'label' is missing"),
        ('{"text": 3, "label": "good"}\n', "field 'text' must be text, not int"),
        ('{"text": " ", "label": "good"}\n', "field 'text' is empty"),
        ('{"text": "a", "label": true}\n', "must be a class name, not bool"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert said in refusal(path)


def test_a_csv_row_with_too_many_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\nfine, really,good\n")
    assert "line 2: more fields than the header names" in refusal(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "data.parquet").write_bytes(b"not parquet")
    assert "not a readable Parquet file" in refusal(tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "not UTF-8" in refusal(tmp_path / "data.jsonl")


def test_batches_of_a_seed_are_the_same_and_of_another_seed_are_not() -> None:
    first = list(batches(20, 4, 10, seed_of("one", 1, "training")))
    assert first == list(batches(20, 4, 10, seed_of("one", 1, "training")))
    assert first != list(batches(20, 4, 10, seed_of("one", 2, "training")))


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (5, 3), (1, 1), (3, 8)])
def test_every_pass_sees_every_example_and_no_batch_has_one_twice(count: int, size: int) -> None:
    drawn = list(batches(count, size, 12, seed=1))
    assert all(len(set(batch)) == len(batch) == min(size, count) for batch in drawn)
    flat = [index for batch in drawn for index in batch]
    assert sorted(flat[:count]) == list(range(count))
    assert max(flat.count(i) for i in range(count)) - min(flat.count(i) for i in range(count)) <= 1


def test_a_sample_is_reproducible_and_no_larger_than_what_there_is() -> None:
    assert sample(5, 9, seed=1) == [0, 1, 2, 3, 4]
    assert sample(100, 7, seed=1) == sample(100, 7, seed=1)
    assert len(set(sample(100, 7, seed=1))) == 7
    assert sample(5, 0, seed=1) == []
