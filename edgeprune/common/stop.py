"""SIGTERM: a run stops after its current step or file, keeps finished work, and exits with 143 within 30 seconds.

    with on_sigterm():
        for file in files:
            check()  # between files, when everything is written

Several processes must stop at the same step: inside `deferred()` `check` raises nothing, and the training loop agrees
with all ranks on when to stop (training/distill.py). Work that takes longer than GRACE_S is aborted. Files are written
under temporary names, so only that piece of work is lost. Python itself handles SIGINT.
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
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so code that handles errors does not catch it."""

    exit_code = EXIT_CODE


_asked = False
_deferred = False


def asked() -> bool:
    """Return whether SIGTERM has arrived, so the run should save and stop."""
    return _asked


def check() -> None:
    """Stop here if SIGTERM has arrived, unless stopping is deferred.

    Raises:
        Stopped: SIGTERM has arrived.
    """
    if _asked and not _deferred:
        raise Stopped


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the context, `check` does not raise; the caller asks `asked` and decides when to stop."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Inside the context, SIGTERM requests a stop at the next `check`. Call this in the main thread."""
    global _asked
    timer = threading.Timer(GRACE_S, _abort)
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


def _abort() -> None:
    os.write(2, b"error: stopped by SIGTERM during a long step, which is lost; run the same command again\n")
    os._exit(EXIT_CODE)
