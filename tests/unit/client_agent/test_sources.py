"""Data as people have it: many formats, compressed, in shards, saved by `datasets`; and memory that stays flat."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from client_agent.conversations import Conversation, Conversations, Turn, read_conversations
from client_agent.data import Examples, read_examples
from client_agent.spool import ExampleSpool
from client_agent.tables import read_rows
from shelora.errors import DomainError, Reason

LABELS = ("bad", "good")
ROWS = [
    {"text": "fine, [really] {so}", "label": "good"},
    {"text": 'no\nway\t"quoted" ]', "label": "bad"},
    {"text": "prëis", "label": "good"},
]
EXPECTED = Examples(tuple(row["text"] for row in ROWS), (1, 0, 1))
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path) -> Examples:
    return read_examples(path, "text", "label", LABELS)


def refusal(path: Path) -> str:
    with pytest.raises(DomainError) as caught:
        read(path)
    assert caught.value.reason is Reason.DATA_INVALID
    assert str(path) in caught.value.message
    return caught.value.message


def save_dataset(folder: Path, rows: list[dict[str, str]], shards: int) -> Path:
    """As `Dataset.save_to_disk` of datasets 5.2 writes it."""
    folder.mkdir()
    names = [f"data-{index:05}-of-{shards:05}.arrow" for index in range(shards)]
    for index, name in enumerate(names):
        table = pa.Table.from_pylist(rows[index::shards])
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("inner", [".jsonl", ".csv", ".json"])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, suffix: str, inner: str) -> None:
    def content(times: int) -> bytes:
        if inner == ".csv":
            rows = '"fine, [really] {so}",good\n"no\nway\t""quoted"" ]",bad\nprëis,good\n'
            return f"text,label\n{rows * times}".encode()
        return lines(ROWS * times) if inner == ".jsonl" else json.dumps(ROWS * times).encode()

    path = tmp_path / f"data{inner}{suffix}"
    path.write_bytes(PACKERS[suffix](content(1)))
    assert read(path) == EXPECTED
    packed = PACKERS[suffix](content(2_500))
    path.write_bytes(packed)
    assert len(read(path)) == 7_500
    path.write_bytes(packed[:-20])
    assert "cannot be unpacked with" in refusal(path)
    if suffix != ".zst" or inner == ".json":
        return
    path.write_bytes(
        PACKERS[suffix](content(1)) + PACKERS[suffix](lines(ROWS) if inner == ".jsonl" else b"a,bad\n")
    )
    assert len(read(path)) > len(EXPECTED), "a file may hold frame after frame"


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_list_of_json_may_be_written_anyhow(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n\n")
    assert read(path) == EXPECTED
    path.write_bytes(lines(ROWS))  # many name their JSON lines so
    assert read(path) == EXPECTED


def test_the_place_of_a_record_in_a_list_is_the_line_that_it_begins_in(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*ROWS, {"text": "x", "label": "meh"}], indent=1))
    assert "line 14: label 'meh'" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no examples"),
        ("[]", "holds no examples"),
        ('[{"text": "a", "label": "good"}', "a comma or the list's end must follow"),
        ('[{"text": "a", "label": "good"} {"text": "b"}]', "a comma or the list's end must follow"),
        ('[{"text": "a", "label": "good"}, 3]', "must hold only JSON objects"),
        ('[{"text": "a" "label": "good"}]', "not valid JSON (Expecting ',' delimiter)"),
        ('[{"text": "a", "label": "good"}] x', "something follows the end of the list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"data": [\n{"text": "a"}\n]}', "every line must hold one whole JSON object"),
        ('[\n{"text": "a", "text": "b", "label": "good"}]', "line 2: field 'text' occurs 2 times"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "data.json").write_text(content)
    assert said in refusal(tmp_path / "data.json")


def test_shards_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(ROWS[:1]))
    pq.write_table(pa.Table.from_pylist(ROWS[1:2]), folder / "b.parquet")
    (folder / "more" / "c.csv.gz").write_bytes(gzip.compress("text,label\nprëis,good\n".encode()))
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not data")
    assert read(folder) == EXPECTED
    assert read(folder / "*.[jp]*").texts == EXPECTED.texts[:2]
    assert read(folder / "**" / "*.gz").texts == EXPECTED.texts[2:]
    with (folder / "b.parquet").open("wb") as file:
        pq.write_table(pa.Table.from_pylist([{"text": "x", "label": "meh"}]), file)
    with pytest.raises(DomainError, match=r"b\.parquet, row 1: label 'meh'"):
        read(folder)
    assert "no file has such a name" in refusal(folder / "*.json")


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS, shards=1)
    assert read(folder) == EXPECTED
    assert sorted(read(save_dataset(tmp_path / "two", ROWS, shards=2)).texts) == sorted(EXPECTED.texts)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved", "two"]}')
    assert "name the folder of one of them" in refusal(tmp_path)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    with pytest.raises(DomainError, match=r"secret\.arrow cannot be read: No such file"):
        read(folder)
    (folder / "state.json").write_text("[]")
    assert "not that of a saved dataset" in refusal(folder)


def test_pairs_of_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("text\tsecond\tlabel\nIt rains, and how\tIs it wet?\tgood\n")
    found = read_examples(path, "text", "label", LABELS, pair_field="second")
    assert (found.texts, found.seconds) == (("It rains, and how",), ("Is it wet?",))
    assert found.select([0]) == found
    assert found.fingerprint() != read(path).fingerprint()
    with pytest.raises(DomainError, match=r"no column is named 'third' \(set data\.pair_field\)"):
        read_examples(path, "text", "label", LABELS, pair_field="third")


@pytest.mark.parametrize("memory", [0, 30, 10_000])
def test_examples_on_disk_are_those_in_memory(tmp_path: Path, memory: int) -> None:
    items = [f"text {index} é" * (index % 7 + 1) for index in range(500)]
    spool = ExampleSpool(tmp_path, encode=str, decode=str, memory_bytes=memory)
    for item in items:
        spool.add(item)
    held = spool.done()
    assert isinstance(held, tuple) == (memory > sum(map(len, items)))
    assert list(held) == items
    assert [held[index] for index in (499, 0, 250)] == [items[index] for index in (499, 0, 250)]
    assert list(held[10:13]) == items[10:13]
    assert len(held) == 500
    assert Examples(held).fingerprint() == Examples(tuple(items)).fingerprint()
    assert Examples(held).select([3, 1]) == Examples((items[3], items[1]))
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_conversations_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "Öffnen?", "completion": "Nein.\n"}) + "\n")
    found = read_conversations(path)
    monkeypatch.setattr(ExampleSpool.__init__, "__defaults__", (0,))
    mapped = read_conversations(path)
    assert not isinstance(mapped.conversations, tuple)
    assert list(mapped.conversations) == list(found.conversations)
    assert mapped.fingerprint() == found.fingerprint()
    expected = Conversation((Turn("user", "Öffnen?"), Turn("assistant", "Nein.\n")), of_messages=False)
    assert mapped.select([0]) == Conversations((expected,))


def test_a_disk_without_room_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client_agent.spool.tempfile.TemporaryFile", full)
    spool = ExampleSpool(tmp_path, encode=str, decode=str, memory_bytes=0)
    with pytest.raises(DomainError, match=r"set data\.cache_dir to a folder on a larger disk") as caught:
        spool.add("a")
    assert caught.value.reason is Reason.DISK_UNAVAILABLE


READER = """
import sys
from pathlib import Path
import client_agent.spool as spool
from client_agent.data import read_examples
spool.ExampleSpool.__init__.__defaults__ = (int(sys.argv[2]),)
found = read_examples(Path(sys.argv[1]), "text", "label", ())
assert len(found.fingerprint()) == 64 and len(found) == int(sys.argv[3])
kept = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(kept[0].split()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """The control keeps everything in memory."""
    text = "x" * 4000

    def kept_kib(count: int, memory: int) -> int:
        path = tmp_path / "data.jsonl"
        path.write_text(f'{{"text": "{text}"}}\n' * count)
        command = [sys.executable, "-c", READER, str(path), str(memory), str(count)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    small, large = kept_kib(500, 2**20), kept_kib(15_000, 2**20)
    assert large - small < 15_000  # of 60 MB
    assert kept_kib(15_000, 2**30) - large > 40_000


def test_rows_come_one_after_the_other(tmp_path: Path) -> None:
    """A list of JSON, too: the second record is not looked at before it is asked for."""
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"},\n{"text" "b"}]')
    rows = read_rows(path, {"text": "data.text_field"})
    assert next(rows)[1] == {"text": "a"}
    with pytest.raises(DomainError, match="line 2: not valid JSON"):
        next(rows)
