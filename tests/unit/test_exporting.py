import csv
import json
from io import StringIO
from pathlib import Path

import pytest

from shelora.errors import DomainError, Reason
from shelora.exporting import encoded, rounds_csv, write_new
from tests.unit.test_render import federation


def test_an_export_holds_specification_members_rounds_and_reports():
    content = json.loads(encoded(federation()))
    assert content["format"] == 1
    exported = content["federation"]
    assert exported["spec"]["round"]["rounds"] == 5
    assert exported["members"][0]["client_id"] == "thin-uplink"
    assert [u["train_loss"] for u in exported["history"][1]["updates"]] == [1.0, 2.0]
    assert exported["current"]["dropped"][0]["reason"] == "NORM_OUTLIER"


def test_rounds_are_lines_of_figures():
    (row,) = csv.DictReader(StringIO(rounds_csv(federation())))
    assert (row["number"], row["train_loss"], row["test_accuracy"]) == ("1", "1.0", "0.9")


def test_no_file_is_overwritten(tmp_path: Path):
    write_new(tmp_path / "fed.json", "1")
    with pytest.raises(DomainError, match="exists: give another name") as refused:
        write_new(tmp_path / "fed.json", "2")
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    with pytest.raises(DomainError, match="cannot be written: No such file or directory"):
        write_new(tmp_path / "absent" / "fed.json", "2")
    assert (tmp_path / "fed.json").read_text() == "1"
