"""What the runs of both peers have in common: their environment, their processes, certificates for loopback."""

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench.peers.plan import Plan
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import utc_now

APPS: Final = Path(__file__).parent / "apps"
PLAN: Final = "plan.json"
POLL_S: Final = 0.2
PRINTED: Final = 2000
"""Characters of what a program printed that are shown if it fails."""
PATIENCE_S: Final = 300.0
"""For a server to listen."""
STOP_S: Final = 20.0
"""For a process to end once it was told to."""


@dataclass
class Home:
    """A peer's run: its folder, the virtual environment it is installed in, the processes that were started."""

    folder: Path
    venv: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> Mapping[str, str]:
        """Of every process: the apps can be imported, one thread each, nothing is told to anybody."""
        return {
            **os.environ,
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "apps"),
            "PEERS_WORK": str(self.folder / PLAN),
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def program(self, name: str) -> str:
        """A program of the virtual environment. Raises: CONFIGURATION_INVALID if it is not installed there."""
        path = self.venv / "bin" / name
        if not path.exists():
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"{path} does not exist: see bench/peers/README.md for what to install",
            )
        return str(path.absolute())

    def version(self, package: str) -> str:
        """Of a package that is installed there."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return self.output("python", "-c", code).strip()

    def output(self, name: str, *arguments: str) -> str:
        """What a program prints. Raises: INTERNAL if it fails, or a process that was started ends meanwhile."""
        with tempfile.TemporaryFile("w+") as file:
            process = self._popen(file, name, *arguments)
            try:
                while process.poll() is None:
                    self.require_alive()
                    time.sleep(POLL_S)
            finally:
                _stop(process)
            file.seek(0)
            printed = file.read()
        if process.returncode:
            raise DomainError(
                Reason.INTERNAL, f"{name} exited with {process.returncode}:\n{printed[-PRINTED:]}"
            )
        return printed

    def start(self, log: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a program in a session of its own, which ends with the run."""
        with self.log(log).open("a") as file:
            process = self._popen(file, name, *arguments)
        self.started.append(process)
        return process

    def _popen(self, file: IO[str], name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - the peer's programs
            [self.program(name), *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def log(self, name: str) -> Path:
        """Where a process writes."""
        (self.folder / "logs").mkdir(exist_ok=True)
        return self.folder / "logs" / f"{name}.log"

    def require_alive(self) -> None:
        """Raises: INTERNAL if a process has ended."""
        for process in self.started:
            if process.poll() is not None:
                raise DomainError(
                    Reason.INTERNAL,
                    f"{process.args!r} exited with {process.returncode}; see {self.folder}/logs",
                )

    def wait_until(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Raises: INTERNAL if it does not come about."""
        deadline = time.monotonic() + patience_s
        while not condition():
            self.require_alive()
            if time.monotonic() > deadline:
                raise DomainError(
                    Reason.INTERNAL, f"{what} took more than {patience_s:.0f} s; see {self.folder}/logs"
                )
            time.sleep(POLL_S)


@contextmanager
def at_home(folder: Path, venv: Path, plan: Plan) -> Iterator[Home]:
    """A folder with the apps, the plan and the initial values; every process ends with the block."""
    shutil.copytree(APPS, folder / "apps", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notes").mkdir()
    plan.write(folder / PLAN)
    home = Home(folder, venv)
    home.output("python", str(folder / "apps" / "work.py"))
    try:
        yield home
    finally:
        for process in reversed(home.started):
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """All of its session: what it started may have outlived it."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def free_port() -> int:
    """A port on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listens(address: str) -> bool:
    """Whether a server takes connections."""
    host, _, port = address.rpartition(":")
    with socket.socket() as caller:
        return caller.connect_ex((host, int(port))) == 0


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM."""

    authority: Path
    certificate: Path
    key: Path


def certified(folder: Path) -> Certificates:
    """An authority, and a server's certificate of it for 127.0.0.1."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _name("peers' authority")
    ca = _signed(authority, authority, authority_key.public_key(), authority_key, own=True)
    server = _signed(_name("127.0.0.1"), authority, key.public_key(), authority_key, own=False)
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    made.authority.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    made.certificate.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return made


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    own: bool,
) -> x509.Certificate:
    now = utc_now()
    builder = x509.CertificateBuilder(
        issuer,
        subject,
        public,
        x509.random_serial_number(),
        now - timedelta(minutes=5),
        now + timedelta(days=1),
    ).add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
    if not own:
        names: Sequence[x509.GeneralName] = (
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.DNSName("localhost"),
        )
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256())
