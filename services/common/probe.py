"""`shelora-probe`: asks a server's health port (`health_listen`) whether it serves. For containers' health checks.

It imports little, because it runs every few seconds.
"""

import sys
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S: Final = 5.0
EXIT_SERVING: Final = 0
EXIT_NOT_SERVING: Final = 1
EXIT_USAGE: Final = 2
_STATUS: Final = health_pb2.HealthCheckResponse.ServingStatus


def main() -> None:
    """Exits with 0 if the server serves, with 1 and a line on standard error if it does not."""
    match sys.argv[1:]:
        case ["--version"]:
            from shelora.version import VERSION  # noqa: PLC0415 - probes need not load it

            print(VERSION)  # noqa: T201 - the answer to a command
        case [address] if not address.startswith("-"):
            sys.exit(_probed(address))
        case _:
            sys.exit(_said("usage: shelora-probe HOST:PORT", EXIT_USAGE))


def _probed(address: str) -> int:
    try:
        status = _asked(address)
    except grpc.RpcError as error:
        call: grpc.Call = error  # type: ignore[assignment]  # what a blocking stub raises is its call
        return _said(f"{address}: {call.code().name}: {call.details()}", EXIT_NOT_SERVING)
    if status == _STATUS.SERVING:
        return EXIT_SERVING
    return _said(f"{address}: {_STATUS.Name(status)}", EXIT_NOT_SERVING)


def _asked(address: str) -> int:
    with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status)


def _said(line: str, code: int) -> int:
    print(line, file=sys.stderr)  # noqa: T201 - shown by `docker inspect`
    return code


if __name__ == "__main__":
    main()
