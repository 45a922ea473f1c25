"""The processes of one run, as `accelerate launch` or torchrun starts them: their ranks, and waiting for rank 0.

    with main_first():
        data = load() if path.exists() else make(path)  # made once by rank 0, loaded by the others

Only rank 0 writes files, holds locks and prints; all ranks see the same folders. The environment says how many
processes there are, so a single process imports nothing for this. What they compute is in training/parallel.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LONGEST_WAIT = timedelta(days=7)
"""The others may wait this long for rank 0, which may be encoding training data. A rank that exits is noticed at once.
"""


LAUNCHED = "EDGEPRUNE_LAUNCHED"
"""launch.py sets this variable, because accelerate sets none for a process that it starts alone."""
_DEVICE = "ACCELERATE_TORCH_DEVICE"
"""From which accelerate takes the device, see its `PartialState`."""


def launched() -> bool:
    """Return whether a launcher started this process, alone or as one of several."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def count() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def index() -> int:
    """Return this process's rank, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def local_index() -> int:
    """Return this process's rank on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return index() == 0


def on_cpu() -> bool:
    """Return whether the launcher's config says that processes compute on the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")


def placed() -> bool:
    """Return whether accelerate chooses this process's device: it was started as one of a process group."""
    return "LOCAL_RANK" in os.environ


def join(device: torch.device | None = None) -> None:
    """Initialise accelerate: the process group once, before any other call of it; without a group, the device.

    Args:
        device: where this process computes, unless accelerate chooses that; None where only the group matters.
    """
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    if device is None or placed():
        cpu = on_cpu() or not torch.cuda.is_available()
        PartialState(cpu=cpu, **({"timeout": _LONGEST_WAIT} if count() > 1 else {}))
        return
    AcceleratorState._reset_state(reset_partial_state=True)  # else the first device and precision stay for good
    before = os.environ.get(_DEVICE)
    os.environ[_DEVICE] = str(device)
    try:
        PartialState(cpu=device.type == "cpu")
    finally:  # processes that are started later choose for themselves
        os.environ.pop(_DEVICE)
        if before is not None:
            os.environ[_DEVICE] = before


def from_main(value: Any) -> Any:
    """Return rank 0's value in every process. Collective: every rank must call it."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join()
    return broadcast_object_list([value])[0]


def meet() -> None:
    """Wait until every process has called this."""
    if count() > 1:
        from accelerate import PartialState

        join()
        PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in rank 0 first, then in the other processes.

    Raises:
        SystemExit: rank 0 failed. Raised in the other processes with rank 0's exit code; rank 0 reports the reason.
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
    """Return the exit code that cli.main gives an error. Launchers exit with the code of the first rank to fail."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return code if isinstance(code, int) and code else 1
