"""What a script does before its other imports, which take seconds: so this imports no torch."""

import os
import signal


def begin() -> None:
    """Has idle threads sleep, and Ctrl-C end the imports silently, with exit code 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # else they keep cores busy
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:       # and is not ignored
        signal.signal(signal.SIGINT, _leave)


def imported() -> None:
    """Gives Ctrl-C back to Python."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os._exit(130)
