"""One decoder under atheris: `python -m tests.fuzz.target NAME [libFuzzer's flags]`. Replays a crash's file, too."""

import sys

import atheris

with atheris.instrument_imports(include=["shelora", "services", "coordinator", "client_agent"]):
    from tests.fuzz.decoders import DECODERS


def main() -> None:
    decoder = DECODERS[sys.argv.pop(1)]
    for seed in decoder.seeds():
        decoder.attempt(seed)

    def run(data: bytes) -> None:
        decoder.attempt(data)

    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
