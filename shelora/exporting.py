"""What an operator keeps of a federation: everything but a model, which only agents can decrypt."""

import csv
import json
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from shelora.configuration import invalid
from shelora.v1 import coordinator_pb2 as pb
from shelora.version import VERSION
from shelora.view import RoundFigures, figures_by_round, training_rounds


def document(federation: pb.Federation) -> dict[str, Any]:
    """Specification, members, every round with its reports: the fields of coordinator.proto, 64-bit numbers as text."""
    content = MessageToDict(
        federation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"format": 1, "shelora": VERSION, "federation": content}


def rounds_csv(federation: pb.Federation) -> str:
    """A line for each published training round: loss, accuracy, bytes, seconds."""
    lines = StringIO()
    table = csv.DictWriter(lines, [field.name for field in fields(RoundFigures)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(asdict, figures_by_round(training_rounds(federation))))
    return lines.getvalue()


def write_new(path: Path, content: str) -> None:
    """Raises: CONFIGURATION_INVALID if the file exists or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise invalid(f"{path} exists: give another name, or remove it") from None
    except OSError as error:
        raise invalid(f"{path} cannot be written: {error.strerror}") from error


def encoded(federation: pb.Federation) -> str:
    """The document as JSON."""
    return json.dumps(document(federation), indent=1, ensure_ascii=False) + "\n"
