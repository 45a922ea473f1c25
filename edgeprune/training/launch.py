"""Runs this command in the processes that a launch config of accelerate describes, and exits with their code.

    launch("two-gpus.yaml", ["distill", "-o", "small"])  # like: accelerate launch --config_file two-gpus.yaml ...

On several machines, run `accelerate launch` on each of them instead.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from edgeprune.common import processes
from edgeprune.common.errors import InputError

LAUNCH_FILES = Path(__file__).parent / "configs"


def launch_file(name: str) -> Path:
    """Return the launch config of this name: one of edgeprune's own, or a YAML file.

    Raises:
        InputError: there is neither.
    """
    builtin = {path.stem: path for path in sorted(LAUNCH_FILES.glob("*.yaml"))}
    if name in builtin:
        return builtin[name]
    if not Path(name).is_file():
        raise InputError(
            f"--config: found {name!r}, expected a YAML file of accelerate's or one of {', '.join(builtin)}"
        )
    return Path(name)


def launch(config: str, arguments: list[str]) -> None:
    """Run `edgeprune` with these arguments in the launched processes, and wait until they exit.

    Raises:
        InputError: the launch config is not usable.
        SystemExit: a process failed; with the exit code of the first one that did.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    path = launch_file(config)
    os.environ[processes.LAUNCHED] = "1"
    signal.signal(signal.SIGTERM, _pass_on)  # the launcher for several processes replaces this handler by its own
    words = ["--config_file", str(path), "--main_process_port", "0", "-m", "edgeprune.cli", *arguments]
    try:
        args = launch_command_parser().parse_args(words)
        launch_command(args)
    except ChildFailedError as error:
        raise SystemExit(_exit_code(error.get_first_failure()[1].exitcode)) from None
    except subprocess.CalledProcessError as error:  # accelerate starts a single process without torch's launcher
        raise SystemExit(_exit_code(error.returncode)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(f"{path}: not usable as a config of accelerate ({error})") from error


def _pass_on(number: int, _: Any) -> None:
    """Forward a signal to the process that accelerate waits for; that process saves its work and exits."""
    for child in psutil.Process().children():
        child.send_signal(number)


def _exit_code(code: int) -> int:
    """Return the exit code that a shell reports: 128 plus the signal's number for a killed process."""
    return 128 - code if code < 0 else code
