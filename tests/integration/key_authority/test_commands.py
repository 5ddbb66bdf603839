"""The operator's commands for keys, folders and logs, as they are typed."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from services.key_authority.custody import open_custody, read_root
from services.key_authority.epochs import EpochId
from services.key_authority.main import app
from services.key_authority.sealer import SealingKey
from shelora.audit import verified
from shelora.ckks.parameters import INSECURE_TOY
from shelora.cli.main import app as shelora

EPOCH = EpochId("clinic", 1)


@pytest.fixture
def folder(tmp_path, sealing_key):
    folder = tmp_path / "data"
    with open_custody(folder, sealing_key) as custody:
        custody.root.load_or_create()
        opened = custody.vault.open_epoch(EPOCH, INSECURE_TOY)
        for number in range(3):
            custody.audit.secrets_released(EPOCH, f"ward-{number}", opened.key_id)
    return folder


@pytest.fixture
def log(folder):
    return folder / "audit.log"


def key_authority(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def audit(*arguments):
    return CliRunner(env={"COLUMNS": "160", "LINES": "50"}).invoke(shelora, ["audit", *map(str, arguments)])


def head(log):
    with log.open("rb") as file:
        return list(verified(file))[-1].hash


def test_a_sealing_key_is_made_for_this_user_alone_and_never_overwritten(tmp_path):
    path = tmp_path / "sealing.key"
    made = key_authority("make-sealing-key", path)
    assert made.exit_code == 0
    assert path.stat().st_mode & 0o777 == 0o600
    key = SealingKey.from_file(path)
    assert key.key_id.hex() in made.stdout
    content = path.read_text()
    assert content.strip() not in made.output
    again = key_authority("make-sealing-key", path)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_sealing_key_cannot_be_made_where_there_is_no_folder(tmp_path):
    result = key_authority("make-sealing-key", tmp_path / "absent" / "sealing.key")
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_the_sealing_key_is_changed_by_one_command(tmp_path, folder, sealing_key_file):
    key_authority("make-sealing-key", tmp_path / "new.key")
    keys = ["--old-key-file", sealing_key_file, "--new-key-file", tmp_path / "new.key"]
    result = key_authority("reseal", "--data-dir", folder, *keys)
    assert result.exit_code == 0
    assert "3 files sealed anew" in result.stdout
    assert key_authority("reseal", "--data-dir", folder, *keys).stdout.startswith("0 files")
    with open_custody(folder, SealingKey.from_file(tmp_path / "new.key")) as custody:
        custody.vault.read(EPOCH)
    back = ["--old-key-file", sealing_key_file, "--new-key-file", sealing_key_file]
    refused = key_authority("reseal", "--data-dir", folder, *back)
    assert refused.exit_code == 2
    assert "wrong sealing key" in refused.stderr


def test_a_new_key_inside_the_folder_is_refused(folder, sealing_key_file):
    inside = folder / "new.key"
    result = key_authority(
        "reseal", "--data-dir", folder, "--old-key-file", sealing_key_file, "--new-key-file", inside
    )
    assert result.exit_code == 2
    assert "lies in the folder it seals" in result.stderr


def test_a_backup_is_checked_by_one_command_that_changes_nothing(
    tmp_path, folder, log, sealing_key, sealing_key_file
):
    with open_custody(folder, sealing_key) as custody:
        custody.root.load_or_create()
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    before = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    result = key_authority("check-data", "--data-dir", backup, "--sealing-key-file", sealing_key_file)
    assert result.exit_code == 0
    assert f"certificate authority: {read_root(backup, sealing_key).pin.hex()}" in result.stdout
    assert "epoch 1 of federation clinic: profile" in result.stdout
    assert "register: 0 tokens, 0 clients" in result.stdout
    assert f"audit log: 5 records, head {head(log)}" in result.stdout
    assert before == {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    root = backup / "authority" / "root.sealed"
    whole = root.read_bytes()
    root.write_bytes(whole[:-1])
    result = key_authority("check-data", "--data-dir", backup, "--sealing-key-file", sealing_key_file)
    assert result.exit_code == 2
    assert "root.sealed is damaged" in result.stderr
    root.write_bytes(whole)
    (backup / "epochs" / "clinic.1.sealed").write_bytes(b"damaged")
    result = key_authority("check-data", "--data-dir", backup, "--sealing-key-file", sealing_key_file)
    assert result.exit_code == 1
    assert "epoch 1 of federation clinic cannot be read" in result.stderr


def test_a_damaged_log_is_replaced_by_one_command_and_kept(folder, log, sealing_key_file):
    log.write_bytes(b"damaged\n")
    result = key_authority("replace-audit-log", "--data-dir", folder, "--sealing-key-file", sealing_key_file)
    assert result.exit_code == 0
    assert [path.read_bytes() for path in folder.glob("audit.log.*")] == [b"damaged\n"]
    assert audit("verify", folder).exit_code == 0


def test_a_sound_log_is_verified_and_its_head_printed(folder, log):
    for path in (log, folder):
        result = audit("verify", path)
        assert result.exit_code == 0
        assert "5 records, none changed" in result.stdout
        assert f"head {head(log)}" in result.stdout
    assert audit("verify", log, "--head", head(log)).exit_code == 0


def test_a_log_that_grew_still_holds_the_noted_head(folder, log, sealing_key):
    noted = head(log)
    with open_custody(folder, sealing_key) as custody:
        custody.audit.secrets_released(EPOCH, "ward-9", bytes(16))
    assert head(log) != noted
    assert audit("verify", log, "--head", noted.upper()).exit_code == 0


def test_a_log_cut_short_or_rewritten_is_found_by_the_noted_head_alone(folder, log, tmp_path, sealing_key):
    noted = head(log)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert audit("verify", log).exit_code == 0
    refused = audit("verify", log, "--head", noted)
    assert refused.exit_code == 1
    assert "the noted head is not in it" in refused.stderr
    with open_custody(tmp_path / "other", sealing_key):
        assert audit("verify", tmp_path / "other", "--head", noted).exit_code == 1


@pytest.mark.parametrize(
    ("damage", "sequence"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"ward-0", b"ward-9"), *lines[3:]], 2),
        (lambda lines: [*lines[:2], *lines[3:]], 2),
        (lambda lines: [lines[0], lines[1], lines[3], lines[2], lines[4]], 2),
        (lambda lines: [*lines, json.dumps({"event": "secrets_released"}).encode() + b"\n"], 5),
        (lambda lines: [*lines[:4], lines[4][:-5]], 4),
    ],
    ids=["edit", "delete", "reorder", "add", "tear"],
)
def test_the_first_broken_record_is_named(log, damage, sequence):
    log.write_bytes(b"".join(damage(log.read_bytes().splitlines(keepends=True))))
    for command in ("verify", "show"):
        result = audit(command, log)
        assert result.exit_code == 1
        assert f"AUDIT_BROKEN record {sequence} (line {sequence + 1})" in result.stderr


def test_the_last_records_are_shown_as_a_table(log):
    result = audit("show", log)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["record", "time", "(UTC)", "event", "federation", "epoch", "client", "detail"]
    assert "log started" in lines[1]
    assert "epoch opened" in lines[2]
    assert all(word in lines[5] for word in ("4", "secrets released", "clinic", "ward-2", "key "))
    assert [line.split()[0] for line in audit("show", log, "--last", "2").stdout.splitlines()[1:]] == [
        "3",
        "4",
    ]


def test_a_missing_log_is_named(tmp_path):
    for command in ("verify", "show"):
        result = audit(command, tmp_path / "absent.log")
        assert result.exit_code == 2
        assert "No such file" in result.stderr
