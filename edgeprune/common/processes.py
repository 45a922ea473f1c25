"""Several processes of one run, as `accelerate launch` or torchrun starts them: which is first, and waiting for it.

    with main_first():
        data = load() if path.exists() else make(path)  # made once, loaded by the others

The first process alone writes, holds locks and speaks; all of them see the same folders. One process alone, which the
environment tells, loads nothing for any of this. What it leaves out: what the processes compute, see engine.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

_LONGEST_WAIT = timedelta(days=7)
"""For the first process, which may be making training data; one that ends is noticed at once."""


LAUNCHED = "EDGEPRUNE_LAUNCHED"
"""Set by launch.py: accelerate says nothing to a process that it starts alone."""


def launched() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def index() -> int:
    """The place of this one, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def is_main() -> bool:
    """Whether this is the first process."""
    return index() == 0


def join() -> None:
    """Meet the other processes, once; before anything else of accelerate is asked."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), **({"timeout": _LONGEST_WAIT} if count() > 1 else {}))


def from_main(value: Any) -> Any:
    """The first process' value, in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join()
    return broadcast_object_list([value])[0]


def meet() -> None:
    """Wait until every process is here."""
    if count() > 1:
        from accelerate import PartialState

        join()
        PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The first process does what is inside alone, then the others do it.

    Raises:
        SystemExit: in the others, with the first one's exit code, if it failed there, which says why.
    """
    if not is_main() and (code := from_main(None)):
        raise SystemExit(code)
    try:
        yield
    except BaseException as error:
        if is_main():
            from_main(_exit_code(error))
        raise
    if is_main():
        from_main(0)


def _exit_code(error: BaseException) -> int:
    """What the command ends with, see cli.main: launchers pass on that of whoever they see failing first."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    found = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return found if isinstance(found, int) and found else 1
