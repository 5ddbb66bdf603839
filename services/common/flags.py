"""Command line options that every server has, as types of a typer command's parameters.

Each defaults to None, which leaves the value to the environment and then to the settings' own default.
"""

from pathlib import Path
from typing import Annotated

import typer

Listen = Annotated[
    str | None,
    typer.Option(help="Address to serve gRPC on. Port 0 picks a free one.", metavar="HOST:PORT"),
]
IdentityFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of this process's key and certificate, filled by `shelora enroll`."),
]
KeyAuthorityAddress = Annotated[
    str | None, typer.Option(help="Key authority, host:port.", metavar="HOST:PORT")
]
WorkloadKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with a key shared with the key authority, to enrol with unattended."),
]
EnrolmentAddress = Annotated[
    str | None, typer.Option(help="Where the key authority enrols, host:port.", metavar="HOST:PORT")
]
RevocationPoll = Annotated[
    float | None, typer.Option(help="Seconds between two questions for revoked certificates.")
]
MetricsHost = Annotated[
    str | None, typer.Option(help="Address to serve Prometheus metrics on.", metavar="HOST")
]
MetricsPort = Annotated[
    int | None, typer.Option(help="Port of the metrics. 0 picks a free one, -1 turns them off.")
]
HealthListen = Annotated[
    str | None,
    typer.Option(help="Address to answer health checks on without TLS, for probes.", metavar="HOST:PORT"),
]
LogLevel = Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")]
LogJson = Annotated[bool | None, typer.Option("--log-json", help="Log one JSON object a line.")]
ShutdownGrace = Annotated[
    float | None, typer.Option(help="Seconds that calls in progress may take to finish after SIGTERM.")
]
CallsPerS = Annotated[float | None, typer.Option(help="Calls a second of one client; 0 for any number.")]
ConcurrentCalls = Annotated[
    int | None, typer.Option(help="Calls in progress of one client; 0 for any number.")
]
UploadBytesPerS = Annotated[
    float | None, typer.Option(help="Bytes a second that one client may send; 0 for any number.")
]
ReadyFile = Annotated[
    Path | None,
    typer.Option(help="File that holds, while serving, the address, metrics port and pid as JSON."),
]
