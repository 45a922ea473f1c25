"""SIGTERM: a run stops at its next step, shard or part, keeps what it has, and exits with 143 within 30 seconds.

    with on_sigterm():
        for part in parts:
            check()  # between parts, where all is written

Several processes stop together: in `held()` nothing is raised, and whoever computes asks all of them, see distill.py.
What has no end within GRACE_S is broken off; all files are written under temporary names, so this loses that part
alone. What it leaves out: SIGINT, which Python raises at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
GRACE_S = 25.0


class Stopped(BaseException):
    """SIGTERM came. As KeyboardInterrupt it is no error, so that nobody who handles errors holds it up."""

    exit_code = EXIT_CODE


_asked = False
_held = False


def asked() -> bool:
    """Whether SIGTERM came: time to save."""
    return _asked


def check() -> None:
    """Stop here if SIGTERM came.

    Raises:
        Stopped: it did.
    """
    if _asked and not _held:
        raise Stopped


@contextmanager
def held() -> Iterator[None]:
    """While in it, `check` lets everything pass."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False


@contextmanager
def on_sigterm() -> Iterator[None]:
    """While in it, SIGTERM asks to stop. For the main thread."""
    global _asked
    timer = threading.Timer(GRACE_S, _break_off)
    timer.daemon = True

    def ask(*_: object) -> None:
        global _asked
        if not _asked:
            _asked = True
            timer.start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
        check()
    finally:
        signal.signal(signal.SIGTERM, before)
        timer.cancel()
        _asked = False


def _break_off() -> None:
    os.write(2, b"error: stopped by SIGTERM amid a long step, which is lost; run the same command again to go on\n")
    os._exit(EXIT_CODE)
