"""Which signals mean that a process shall stop, in order."""

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT, and SIGHUP, which comes when the terminal closes, unless it is ignored, as under `nohup`.

    A shell has SIGINT ignored, too, for what runs in its background; that is never meant.
    """
    usual = (signal.SIGTERM, signal.SIGINT)
    return usual if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*usual, signal.SIGHUP)
