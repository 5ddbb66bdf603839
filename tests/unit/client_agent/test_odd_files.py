"""Whatever a file holds, an agent reads it or says in one line what is wrong: never a traceback."""

import csv
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import client_agent
from client_agent import data, tables
from client_agent.config import AgentConfig
from client_agent.conversations import FIELDS, read_conversations, record_at
from client_agent.data import found_labels, place_of, read_examples
from client_agent.sources import opened
from shelora.errors import DomainError, Reason

LABELS = ("bad", "good", "0", "true")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")
SAMPLE = (Path(client_agent.__file__).parent / "sample.yaml").read_text()
HUGE = "a number of thousands of digits, which Python neither reads nor writes"
odd = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["", "\0", "\ud83d", '"', "a\r\nb", ",", "good"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 2**63, 2**64, HUGE])
    | st.floats()
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
names = st.sampled_from(["text", "label", "", "text ", "other", *FIELDS]) | texts
members = st.sampled_from(["role", "content", "from", "value"])


@contextmanager
def written(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def check(path: Path) -> None:
    """Reads the file; whatever is refused is refused in one printable line that names it."""
    for read in (
        lambda: read_examples(path, "text", "label", LABELS),
        lambda: read_examples(path, "text", "label", ()),
        lambda: found_labels(path, "label"),
        lambda: read_conversations(path),
    ):
        refused = refusal(read)
        if refused:
            assert refused.reason is Reason.DATA_INVALID
            assert str(path) in refused.message
            assert refused.message.isprintable(), refused.message
            assert len(refused.message) < len(str(path)) + 2000
    if not refusal(lambda: read_examples(path, "text", "label", ())):
        examples = read_examples(path, "text", "label", ())
        "".join(examples.texts).encode()  # tokenizers take UTF-8
        assert place_of(path, "text", len(examples) - 1).startswith(str(path))


def refusal(call: Callable[[], object]) -> DomainError | None:
    """What the call was refused with; other errors are failures."""
    try:
        call()
    except DomainError as error:
        return error
    return None


@odd
@given(
    name=st.sampled_from(
        ["a.csv", "a.jsonl", "a.json", "a.tsv", "a.parquet", "A.CSV", "a.csv.gz", "a.json.xz", "a.jsonl.zst"]
    ),
    magic=st.sampled_from([b"", b"", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"]),
    content=st.binary(max_size=300),
)
def test_any_bytes(name: str, magic: bytes, content: bytes) -> None:
    with written(name, magic + content) as path:
        check(path)


@odd
@given(cut=st.integers(0, 60), flipped=st.integers(0, 60))
def test_any_damage_of_a_saved_dataset(cut: int, flipped: int) -> None:
    table = pa.table({"text": ["good", "bad"], "label": ["good", "bad"]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with pa.ipc.new_stream(folder / "a.arrow", table.schema) as stream:
            stream.write_table(table)
        state = b'{"_data_files": [{"filename": "a.arrow"}]}'
        for file, content in (
            ("dataset_info.json", b"{}"),
            ("state.json", state[: len(state) - cut]),
            ("a.arrow", (folder / "a.arrow").read_bytes()),
        ):
            damaged = bytearray(content)
            if flipped < len(damaged):
                damaged[flipped] ^= 0x55
            (folder / file).write_bytes(bytes(damaged))
        check(folder)


@odd
@given(
    header=st.lists(names, max_size=4),
    rows=st.lists(st.lists(texts | st.sampled_from(["bad", "fine words"]), max_size=5), max_size=4),
    delimiter=st.sampled_from(",,,;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]),
    encoding=st.sampled_from(ENCODINGS),
    cut=st.integers(0, 3),
)
def test_any_csv(
    header: list[str], rows: list[list[str]], delimiter: str, quoting: Any, encoding: str, cut: int
) -> None:
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8", errors="surrogatepass") as file:
        with suppress(csv.Error):  # of rows that cannot be written so
            csv.writer(file, delimiter=delimiter, quoting=quoting, escapechar="\\").writerows([header, *rows])
        file.seek(0)
        content = file.read().encode(encoding, "replace")
    with written("a.csv", content[: len(content) - cut]) as path:
        check(path)


@odd
@given(
    rows=st.lists(st.dictionaries(names, values, max_size=3) | values, max_size=4),
    indent=st.sampled_from([None, None, 1]),
    escaped=st.booleans(),
    encoding=st.sampled_from(ENCODINGS),
)
@example(rows=[{"text": "fine", "label": HUGE}], indent=None, escaped=True, encoding="utf-8")
def test_any_jsonl(rows: list[Any], indent: int | None, escaped: bool, encoding: str) -> None:
    lines = [dumped(row, indent=indent, ensure_ascii=escaped) for row in rows]
    with written("a.jsonl", "\n".join(lines).encode(encoding, "replace")) as path:
        check(path)
    whole = "[" + ", ".join(lines) + "]"
    with written("a.json", whole.encode(encoding, "replace")) as path:
        check(path)


turns = st.dictionaries(members, values | st.sampled_from(["user", "assistant", "gpt", "tool"])) | values


@odd
@given(
    records=st.lists(
        st.dictionaries(st.sampled_from(FIELDS), st.lists(turns, max_size=3) | values), max_size=3
    )
)
@example(records=[{"messages": [{"role": "assistant", "content": "a\ud83d"}]}])
def test_any_conversations(records: list[Any]) -> None:
    with written("a.jsonl", "\n".join(map(dumped, records)).encode()) as path:
        check(path)
    with written("a.parquet", b"") as path:
        try:
            pq.write_table(pa.Table.from_pylist(records), path)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            return  # no such file can be
        check(path)


def test_a_folder_of_state_that_no_file_system_takes_is_refused_with_the_field() -> None:
    content = SAMPLE.replace("state_dir: state", f"state_dir: {'x' * 5000}").encode()
    with written("agent.yaml", content) as path:
        error = refusal(lambda: AgentConfig.load(path, {}))
        assert error
        assert "state_dir = 'xxx" in error.message
        assert "no file can have this name: it is too long" in error.message


@pytest.mark.parametrize(("name", "said"), [("a\\0b", "it holds a NUL"), ("a\\ud83d", "half of a character")])
def test_a_model_of_a_name_that_no_file_can_have_is_refused_with_the_field(name: str, said: str) -> None:
    content = re.sub("(?m)^  path: .*$", lambda _: f'  path: "{name}"', SAMPLE)
    assert name in content
    with written("agent.yaml", content.encode()) as path:
        error = refusal(lambda: AgentConfig.load(path, {}))
        assert error
        assert "model.path = 'a" in error.message
        assert said in error.message


def dumped(value: Any, **options: Any) -> str:
    return json.dumps(value, **options).replace(f'"{HUGE}"', "9" * 5000)


arrow_types = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary(3), pa.bool_(), pa.null(),
        pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(20, 2), pa.decimal256(60, 2), pa.date32(),
        pa.date64(),
        pa.time32("s"), pa.time64("ns"), pa.timestamp("ns"), pa.timestamp("s", tz="Nowhere/Land"), pa.duration("ns"),
        pa.list_(pa.int8()), pa.large_list(pa.string()), pa.list_(pa.int8(), 2), pa.map_(pa.string(), pa.int8()),
        pa.struct([("text", pa.string())]), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.int64()),
    ]
)  # fmt: skip


def array(kind: pa.DataType, fill: int) -> pa.Array:
    """Three values of the type, from bytes that it may not hold."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        words = [b"good", bytes([fill]) * 3, None if fill % 2 else b"fine"]
        return pa.array(words, pa.binary()).view(kind)
    if pa.types.is_primitive(kind) and kind.bit_width >= 8:
        size = kind.bit_width // 8
        return pa.Array.from_buffers(kind, 3, [None, pa.py_buffer(bytes([fill]) * (3 * size))])
    if pa.types.is_dictionary(kind):
        words = pa.array(["good", "bad"]) if pa.types.is_string(kind.value_type) else pa.array([0, 2**62])
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), words)
    return pa.nulls(3, kind)


@odd
@given(
    columns=st.lists(st.tuples(names, arrow_types, st.integers(0, 255)), max_size=5),
    cut=st.sampled_from([0, 0, 1, 50]),
)
def test_any_parquet(columns: list[tuple[str, pa.DataType, int]], cut: int) -> None:
    arrays = [array(kind, fill) for _, kind, fill in columns]
    names = [name.encode("utf-8", "replace").decode() for name, *_ in columns]
    with written("a.parquet", b"") as path:
        try:
            pq.write_table(pa.Table.from_arrays(arrays, names), path)
        except (pa.ArrowException, ValueError, OverflowError):
            return  # no such file can be
        path.write_bytes(path.read_bytes()[: -cut or None])
        check(path)


@odd
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.sampled_from([0, 0, 0, 9]))
def test_any_damage_of_a_parquet_file(at: int, value: int, cut: int) -> None:
    with written("a.parquet", b"") as path:
        pq.write_table(
            pa.table({"text": ["good", "bad"], "label": ["good", "bad"]}), path, compression="none"
        )
        damaged = bytearray(path.read_bytes())
        damaged[-1 - at] = value
        path.write_bytes(damaged[: len(damaged) - cut])
        check(path)


def test_a_column_whose_name_is_no_text() -> None:
    with written("a.parquet", b"") as path:
        pq.write_table(pa.table({"text": ["good"], "labels": ["good"]}), path, store_schema=False)
        path.write_bytes(path.read_bytes().replace(b"labels", b"labe\xffs"))
        check(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"text,label\n" + b"a" * 2000 + b",good\n"),
        ("a.csv", b'text,label\n"' + b"aaa\n" * 600),
        ("a.csv", b"a," * 1000),
        ("a.jsonl", b'{"text": "' + b"a" * 2000),
        ("a.jsonl", b" " * 2000),
        ("a.json", b'[{"text": "' + b"a" * 2000),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"a" * 10**6)),
        ("a.jsonl.zst", zstandard.compress(b"[" * 10**6)),
    ],
)
def test_a_record_that_would_fill_the_memory_is_refused_where_it_begins(
    name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST_RECORD", 1000)
    with written(name, content) as path:
        for read in (
            lambda: read_examples(path, "text", "label", LABELS),
            lambda: read_conversations(path),
        ):
            error = refusal(read)
            assert error
            assert f"{path}, line " in error.message
            assert "more than 1,000 characters" in error.message or name == "a.json"


def test_a_text_of_a_column_has_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LONGEST_RECORD", 1000)
    with written("a.parquet", b"") as path:
        pq.write_table(pa.table({"text": ["a", "a" * 1001], "label": ["good", "bad"]}), path)
        error = refusal(lambda: read_examples(path, "text", "label", LABELS))
        assert error
        assert "row 2: field 'text' has more than 1,000 characters: break it up" in error.message


def test_of_a_file_that_is_packed_tightly_little_is_unpacked_at_once() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(packer.compress(b"a" * 2**20) for _ in range(256)) + packer.flush()
    assert len(packed) < 2**16
    with written("a.csv.zst", packed) as path, opened(path) as file:
        assert file.read(1) == b"a"
        assert len(file.raw._ready) < 2**26  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["new\nline.csv", "\x1b[31m.csv", "[red].csv", "\udcff.csv", "a\u202e.csv"])
def test_any_name_of_a_file(name: str) -> None:
    with written(name, b"nothing\nat all\n") as path:
        error = refusal(lambda: read_examples(path, "text", "label", LABELS))
        assert error
        assert error.message.isprintable()
        assert "line 1: no column is named 'text'" in error.message
        check_folder = refusal(lambda: found_labels(path.parent, "label"))
        assert check_folder
        assert check_folder.message.isprintable()


def test_a_file_that_was_cut_since_it_was_read_does_not_hide_what_is_wrong_with_an_example() -> None:
    with written("a.csv", b"text\ngood\n") as path:
        assert place_of(path, "text", 0) == f"{path}, line 2"
        assert place_of(path, "text", 1) == f"{path}, example 2"
    with written("a.jsonl", b'{"prompt": "a", "completion": "b"}\n') as path:
        assert record_at(path, 0) == f"{path}, line 1"
        assert record_at(path, 1) == f"{path}, example 2"


def test_an_empty_file_holds_no_examples() -> None:
    for name in ("a.csv", "a.jsonl", "a.json", "a.tsv"):
        for content in (b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n"):
            with written(name, content) as path:
                error = refusal(lambda path=path: found_labels(path, "label"))  # type: ignore[misc]
                assert error
                assert error.message == f"{path} holds no examples"


MERGES = "a: &a {x: 1}\n" + "".join(
    f"{second}: &{second} {{<<: [{', '.join([f'*{first}'] * 10)}]}}\n"
    for first, second in pairwise("abcdefghij")
)


def load(content: bytes, environment: dict[str, str]) -> None:
    with written("agent.yaml", content) as path:
        refused = refusal(lambda: AgentConfig.load(path, environment))
        if refused:
            assert refused.reason is Reason.CONFIGURATION_INVALID
            assert (
                str(path) in refused.message
                or "environment" in refused.message
                or "model.path" in refused.message
            )
            assert len(refused.message) < 20_000


@odd
@given(content=st.binary(max_size=100) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"a: 2020-99-99")
@example(content=b"a: &a [*a]")
@example(content=b"[" * 1500)
@example(content=b"client_id: !!bool maybe")
@example(content=b"client_id: !!int ''")
@example(content=b"client_id: !!float _")
@example(content=b"client_id: !!timestamp soon")
@example(content=b"client_id: !!set [a]")
@example(content=b"client_id: !!python/object/apply:os.system [id]")
@example(content=MERGES.encode())
def test_any_yaml(content: bytes) -> None:
    load(content, {})


sections = st.sampled_from(
    sorted({*yaml.safe_load(SAMPLE), "model.path", "data.train", "data.test", "lora.rank", "x.y"})
)


@odd
@given(
    field=sections,
    value=values | st.sampled_from(["~nobody/x", "a\0b", "\ud83d.csv", "x" * 5000, "/" * 5000, "/dev/null"]),
)
@example(field="data.train", value="~nobody-there/a.csv")
@example(field="data.train", value="\ud83d.csv")
@example(field="data.train", value="a\0.csv")
@example(field="model.path", value="~nobody-there/a")
@example(field="model.path", value="a\0")
@example(field="model.path", value="\ud83d")
@example(field="model.path", value="x" * 5000)
@example(field="state_dir", value="\ud83d")
@example(field="state_dir", value="x" * 5000)
@example(field="state_dir", value=int("9" * 400))
def test_any_value_in_a_configuration(field: str, value: Any) -> None:
    content = yaml.safe_load(SAMPLE)
    place = content
    *parents, last = field.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    load(dumped(content).encode(), {})


@odd
@given(
    name=st.sampled_from(["DATA", "DATA__TRAIN", "BUDGET", "", "__", "LORA__RANK__X", "STATE_DIR"]),
    value=st.text(max_size=20),
)
@example(name="BUDGET", value="2020-99-99")
@example(name="BUDGET", value="[" * 1500)
@example(name="BUDGET", value="9" * 5000)
def test_any_value_in_the_environment(name: str, value: str) -> None:
    load(SAMPLE.encode(), {f"SHELORA_AGENT__{name}": value})
