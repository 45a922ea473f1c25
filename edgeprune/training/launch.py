"""Starts this command again in the processes that a config of accelerate describes, and ends as they do.

    launch("two-gpus.yaml", ["distill", "-o", "small"])  # as: accelerate launch --config_file two-gpus.yaml ...

What it leaves out: several machines, where each one runs `accelerate launch` by itself.
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

CONFIGS = Path(__file__).parent / "configs"


def config_named(name: str) -> Path:
    """A file, or a config that comes with edgeprune.

    Raises:
        InputError: neither.
    """
    own = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name in own:
        return own[name]
    if not Path(name).is_file():
        raise InputError(f"--config: found {name!r}, expected a YAML file of accelerate's or one of {', '.join(own)}")
    return Path(name)


def launch(config: str, arguments: list[str]) -> None:
    """Run `edgeprune` with these arguments in processes of its own, until they end.

    Raises:
        InputError: the config is not usable.
        SystemExit: with the code of the first process that failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    path = config_named(config)
    os.environ[processes.LAUNCHED] = "1"
    signal.signal(signal.SIGTERM, _pass_on)  # the launcher of several processes puts its own in this one's place
    words = ["--config_file", str(path), "--main_process_port", "0", "-m", "edgeprune.cli", *arguments]
    try:
        args = launch_command_parser().parse_args(words)
        launch_command(args)
    except ChildFailedError as error:
        raise SystemExit(_code(error.get_first_failure()[1].exitcode)) from None
    except subprocess.CalledProcessError as error:  # accelerate starts one process by itself
        raise SystemExit(_code(error.returncode)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(f"{path}: not usable as a config of accelerate ({error})") from error


def _pass_on(number: int, _: Any) -> None:
    """Give a signal to the process that accelerate waits for, which saves and ends."""
    for child in psutil.Process().children():
        child.send_signal(number)


def _code(code: int) -> int:
    return 128 - code if code < 0 else code
