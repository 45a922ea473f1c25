"""The one exception tree. The CLI turns each of these into one line and an exit code, never a traceback.

EdgepruneError           exit 1   something of ours failed
├── InputError           exit 2   what the user gave is wrong: file, field, found, expected
│   ├── BudgetError      exit 2   the budget cannot be met by any plan the method allows
│   ├── CannotRunError   exit 2   an export is for another device than this one
│   ├── StaleStageError  exit 2   a folder holds results of other inputs; says `--fresh`
│   └── LockedError      exit 2   another run is at work in a folder; says which
├── MissingExtraError    exit 2   an optional package is not installed; says the pip command
├── DiskError            exit 1   a disk is full or cannot be written; what is finished is kept
├── ParityError          exit 1   an export does not compute what the checkpoint computes
└── AssertionMissedError exit 1   `bench --assert` did not hold
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class InputError(EdgepruneError):
    """A file, option or folder the user gave is not usable. The text names it, what was found, what was expected."""

    exit_code = 2


class BudgetError(InputError):
    """No plan that the method allows meets the budget."""


class CannotRunError(InputError):
    """A folder is whole, but none of its runtimes runs on this machine."""


class StaleStageError(InputError):
    """A stage's results on disk were made from other inputs."""


class LockedError(InputError):
    """Another process is at work in a folder."""


class MissingExtraError(EdgepruneError):
    """An optional dependency is missing."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'edgeprune[{extra}]'")


class DiskError(EdgepruneError):
    """A file was not written: the disk is full, or the folder cannot be written. The same command goes on later."""


class ParityError(EdgepruneError):
    """An exported model does not reproduce its checkpoint."""


class AssertionMissedError(EdgepruneError):
    """A figure of `bench` misses the bound given by `--assert`."""
