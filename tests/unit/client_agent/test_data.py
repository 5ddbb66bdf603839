import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client_agent.data import Examples, found_labels, place_of, read_examples
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
        ('{"text": 3, "label": "good"}\n', "field 'text' must be text, not a number"),
        ('{"text": " ", "label": "good"}\n', "field 'text' is empty"),
        ('{"text": "a", "label": true}\n', "label 'true' is not one of the federation's"),
        ('{"text": "a", "label": [1]}\n', "must be a class name, not a list"),
        ('{"text": "a", "label": {"a": 1}}\n', "must be a class name, not an object"),
        ('{"text": "a", "label": NaN}\n', "must be a class name, not NaN"),
        (
            '{"text": "a", "label": ' + "9" * 5000 + "}\n",
            "must be a class name, not NaN or a number without bounds",
        ),
        ('{"text": null, "label": "good"}\n', "line 1: 'text' is null"),
        ('{"text": "a", "text": "b", "label": "good"}\n', "line 1: field 'text' occurs 2 times"),
        (
            '{"text": "Wheat \\ud83d exports", "label": "good"}\n',
            "line 1: field 'text' holds half of a character",
        ),
        ("[" * 100_000 + "\n", "line 1: the JSON is nested too deeply"),
        ('[{"text": "a", "label": "good"}]\n', "one in every line, and no list around them"),
        ('{\n"text": "a"\n}\n', "every line must hold one whole JSON object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert said in refusal(path)


def test_a_csv_row_with_too_many_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\nfine, really,good\n")
    assert "line 2 has 3 cells, the header 2: put texts that contain commas into double quotes" in refusal(
        path
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('text,label\n"Wheat exports,good\n"The bank",bad\n', "line 2: its quotes do not match"),
        ('text,label\nfine,good\n"no end,bad\n', "line 3: its quotes do not match"),
        (
            "text,label\n\n\nWheat exports\nno,bad\n",
            "line 4 has no 'label': it has fewer cells than the header",
        ),
        ("text,label\nfine,\n", "line 2: field 'label' is empty"),
        ("text;label\nfine;good\n", "columns: text;label; cells must be separated by commas"),
        (
            '"text";"label"\n"fine";"good"\n',
            "line 1: its quotes do not match (',' expected after '\"'); separate",
        ),
        ("text,text,label\na,b,good\n", "line 1: 2 columns are named 'text': rename all but one"),
        ("\n\ntext,class\na,good\n", "line 3: no column is named 'label' (set data.label_field)"),
    ],
)
def test_a_csv_error_names_the_line_that_it_is_in(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content)
    assert said in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(",text,label\n0,a,good\n1,b,bad\n", id="pandas writes its index"),
        pytest.param("text,label,\na,good,\nb,bad,\n", id="spreadsheets write an empty last column"),
        pytest.param("text,label\na,good,,\nb,bad,\n", id="commas at the end of rows alone"),
        pytest.param("other,other,label,text\n1,2,good,a\n3,4,bad,b\n", id="others may share a name"),
        pytest.param("text,label\r\n\r\na,good\r\nb,bad", id="blank lines, no last line end"),
    ],
)
def test_what_programs_write_beside_the_named_columns_is_not_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content, newline="")
    assert read_examples(path, "text", "label", LABELS) == Examples(("a", "b"), (1, 0))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.CSV", "text,label\nprëis,good\n"),
        ("data.JSONL", '{"text": "prëis", "label": "good"}\n'),
    ],
)
def test_byte_order_marks_and_suffixes_in_capitals_are_understood(
    tmp_path: Path, name: str, content: str, encoding: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    assert read_examples(path, "text", "label", LABELS) == Examples(("prëis",), (1,))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_that_is_no_text_is_named(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [{"text": "a" * 50_000, "label": "good"}])
    path.write_bytes(path.read_bytes() + b"caf\xe9,good\n")
    assert f"line {1 if suffix == '.jsonl' else 2} is not" not in refusal(path)
    assert f"line {2 if suffix == '.jsonl' else 3} is not UTF-8: save the file as UTF-8" in refusal(path)
    path.write_bytes("text,label\na,good\n".encode("utf-16-le"))  # without a mark
    assert "line 1 holds NUL bytes: save the file as UTF-8" in refusal(path)
    path.write_bytes('{"text": "a", "label": "good"}'.encode("utf-16")[:-1])
    assert "is not UTF-16" in refusal(path)


def test_a_csv_text_of_any_length_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [{"text": "wheat " * 50_000, "label": "good"}])
    assert len(read_examples(path, "text", "label", LABELS).texts[0]) == 300_000


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (("0", "1"), [0, 1]),
        (("0", "1"), [0.0, 1.0]),
        (("0.0", "1.0"), [0.0, 1.0]),
        (("false", "true"), [False, True]),
        (("False", "True"), [False, True]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_may_be_numbers_and_truth_values(
    tmp_path: Path, suffix: str, labels: tuple[str, ...], values: list[object]
) -> None:
    path = write(tmp_path / f"data{suffix}", [{"text": "a", "label": value} for value in values])
    assert read_examples(path, "text", "label", labels).labels == (0, 1)


@pytest.mark.parametrize(
    ("magic", "name", "said"),
    [
        (b"\x1f\x8b\x08", "data.csv", "cannot be unpacked with gzip"),
        (b"PK\x03\x04", "data.jsonl", "is an archive (zip): unpack it first"),
        (b"PAR1", "data.csv", "let its name end in .parquet"),
        (b"text,label", "data.csv.gz", "is not compressed, although its name says so: rename it"),
        (b"", "data.csv.zip", "it is an archive: unpack it first"),
        (b"", "data.txt", "must end in one of .jsonl, .json, .csv, .tsv, .parquet"),
        (b"PAR1", "data.parquet.gz", "must end in one of"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_remedy(
    tmp_path: Path, magic: bytes, name: str, said: str
) -> None:
    (tmp_path / name).write_bytes(magic)
    assert said in refusal(tmp_path / name)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").mkdir()
    (tmp_path / "data.csv" / "README.md").write_text("what it is")
    assert "holds no file that can be read" in refusal(tmp_path / "data.csv")


def odd_columns() -> dict[str, pa.Array]:
    """Of every Arrow type that Parquet holds, with values that Python's own types cannot hold."""
    late = 2**62
    return {
        "ns": pa.array([late] * 2, pa.timestamp("ns")),
        "zone": pa.array([late] * 2, pa.timestamp("us", tz="Europe/Nowhere")),
        "took": pa.array([late] * 2, pa.duration("ns")),
        "seconds": pa.array([late // 10**6] * 2, pa.timestamp("ms")),
        "date": pa.array([2**31 - 1] * 2, pa.date32()),
        "time": pa.array([1, 2], pa.time64("ns")),
        "bytes": pa.array([b"\xff", None], pa.binary()),
        "fixed": pa.array([b"ab", b"cd"], pa.binary(2)),
        "money": pa.array([1, 2], pa.decimal128(38, 2)),
        "more money": pa.array([1, 2], pa.decimal256(70, 2)),
        "half": pa.array(np.array([1, 2], np.float16)),
        "list": pa.array([[1], None], pa.list_(pa.int64())),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "struct": pa.array([{"text": "x"}, None], pa.struct([("text", pa.string())])),
        "null": pa.nulls(2),
        "text.raw": pa.array(["not", "this"]),
        "": pa.array([True, None]),
    }


def test_parquet_columns_of_other_types_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["good", "bad"], **odd_columns()}), path)
    assert read_examples(path, "text", "label", LABELS) == Examples(("a", "b"), (1, 0))


@pytest.mark.parametrize("column", [*odd_columns()])
def test_a_parquet_column_without_texts_is_named(tmp_path: Path, column: str) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"label": ["good", "bad"], **odd_columns()}), path)
    if column == "text.raw":
        assert read_examples(path, column, "label", LABELS).texts == ("not", "this")
        return
    with pytest.raises(DomainError) as caught:
        read_examples(path, column, "label", LABELS)
    assert caught.value.reason is Reason.DATA_INVALID
    assert str(path) in caught.value.message
    assert repr(column) in caught.value.message


def test_a_null_of_a_parquet_file_is_named_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [*ROWS, {"text": None, "label": "good"}])
    assert "row 3: 'text' is null" in refusal(path)


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": broken, "label": ["good", "bad"]}), tmp_path / "data.parquet")
    assert "row 2: 'text' is not UTF-8" in refusal(tmp_path / "data.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_every_kind_of_parquet_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", "b"]).cast(kind), "label": pa.array(["good", "bad"]).cast(kind)})
    pq.write_table(table, tmp_path / "data.parquet")
    assert read_examples(tmp_path / "data.parquet", "text", "label", LABELS) == Examples(("a", "b"), (1, 0))


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 2 + [pa.array(["good"])], ["text", "text", "label"])
    pq.write_table(table, tmp_path / "data.parquet")
    assert "2 columns are named 'text'" in refusal(tmp_path / "data.parquet")


def test_the_place_of_an_example_counts_what_lies_between(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert place_of(path, "text", 1) == f"{path}, line 3"


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


def test_batches_are_those_of_a_list_that_is_sorted_by_what_is_pending() -> None:
    """The control is how they were drawn before passes over millions of examples were numbers of one array."""

    def drawn(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
        rng, pending, found = np.random.default_rng(seed), [], []
        for _ in range(steps):
            while len(pending) < size:
                held = set(pending)
                pending += sorted(rng.permutation(count).tolist(), key=held.__contains__)
            found.append(pending[:size])
            pending = pending[size:]
        return found

    for count, size in ((10, 4), (7, 7), (5, 3), (1, 1)):
        assert list(batches(count, size, 20, seed=3)) == drawn(count, size, 20, 3)
