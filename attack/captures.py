"""Captures on disk: what a federation left to its attackers, kept until something that it came from has changed.

captures/<scene>/capture.json                  what made it; written last, so a capture with it is whole
rounds/<n>/layout             serialized Layout
rounds/<n>/update/<client>/<shard>   serialized UpdateShard
rounds/<n>/result/<shard>     serialized ResultShard
beside                        what else Redis wrote of the federation, as it wrote it
insider/secrets               GetEpochSecretsResponse; empty under `none`
insider/trained, applied      states of an agent, with one file of weights each
"""

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from google.protobuf.message import DecodeError

from attack.capture import Round, Update
from attack.stage import Insider, Performance, Scene
from client_agent.learning import Weights
from client_agent.state import AgentState
from shelora.errors import DomainError
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.v1 import common_pb2

_ROOT: Final = Path(__file__).parent.parent
_PRODUCT: Final = ("shelora", "client_agent", "coordinator", "services", "requirements/constraints.txt")
_STAGE: Final = ("attack/stage.py", "attack/capture.py", "attack/captures.py")
_NOTE: Final = "capture.json"


@lru_cache(maxsize=8)
def sources(places: tuple[str, ...] = (*_PRODUCT, *_STAGE)) -> str:
    """SHA-256, in hex, of files and of the Python files in folders of this repository."""
    found = hashlib.sha256()
    for place in places:
        path = _ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(f"{file.relative_to(_ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def key_of(scene: Scene) -> str:
    """What a capture of a scene is made by: the scene, the product and what runs and records it."""
    return hashlib.sha256(f"{scene!r}\0{sources()}".encode()).hexdigest()


def save(performance: Performance, folder: Path) -> None:
    """Writes a capture in place of what the folder held."""
    shutil.rmtree(folder, ignore_errors=True)
    digests = [round_.digest for round_ in performance.rounds]
    for number, round_ in enumerate(performance.rounds, 1):
        place = folder / "rounds" / str(number)
        _write(place / "layout", layout_to_proto(round_.layout).SerializeToString())
        for update in round_.updates:
            _write(place / "update" / quote(update.client, safe="") / str(update.shard), update.content)
        for shard, content in round_.results.items():
            _write(place / "result" / str(shard), content)
    _write(folder / "beside", performance.beside)
    _write(folder / "insider" / "secrets", performance.insider.released)
    _keep(folder / "insider" / "trained", performance.insider.trained)
    _keep(folder / "insider" / "applied", performance.insider.applied)
    told = hashlib.sha256(performance.beside).hexdigest()
    note = {
        "key": key_of(performance.scene),
        "scene": performance.scene.name,
        "rounds": digests,
        "beside": told,
    }
    _write(folder / _NOTE, json.dumps(note, indent=1).encode())


def load(scene: Scene, folder: Path) -> Performance | None:
    """The capture of a scene; None if there is none, it is damaged, or something that made it has changed."""
    try:
        note = json.loads((folder / _NOTE).read_text())
        rounds = [_round(folder / "rounds" / str(n + 1)) for n in range(len(note["rounds"]))]
        beside = (folder / "beside").read_bytes()
        released = (folder / "insider" / "secrets").read_bytes()
        digests = [r.digest for r in rounds], hashlib.sha256(beside).hexdigest()
        current = note["key"] == key_of(scene) and (note["rounds"], note["beside"]) == digests
    except (OSError, ValueError, KeyError, TypeError, DecodeError, DomainError):
        return None
    trained, applied = (_kept(folder / "insider" / name) for name in ("trained", "applied"))
    if not current or trained is None or applied is None:
        return None
    insider = Insider(released=released, trained=trained, applied=applied)
    return Performance(scene=scene, rounds=rounds, insider=insider, beside=beside)


def _round(place: Path) -> Round:
    layout = layout_from_proto(common_pb2.Layout.FromString((place / "layout").read_bytes()))
    updates = [
        Update(client=unquote(path.parent.name), shard=int(path.name), content=path.read_bytes())
        for path in sorted((place / "update").glob("*/*"))
    ]
    results = {int(path.name): path.read_bytes() for path in sorted((place / "result").glob("*"))}
    return Round(layout, updates, results)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _keep(folder: Path, weights: Weights) -> None:
    state = AgentState(folder)
    state.save_applied({}, weights)
    state.close()


def _kept(folder: Path) -> Weights | None:
    state = AgentState(folder)
    try:
        saved = state.applied()
    finally:
        state.close()
    return saved[1] if saved else None
