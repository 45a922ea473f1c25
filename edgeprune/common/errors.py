"""The one exception tree. The CLI turns each of these into one line and an exit code, never a traceback.

EdgepruneError           exit 1   something in edgeprune failed
├── InputError           exit 2   the user's input is wrong: names the file or option, what was found and expected
│   ├── BudgetError      exit 2   no plan that the method allows meets the budget
│   ├── CannotRunError   exit 2   an export is for a different device
│   ├── StaleStageError  exit 2   a folder holds results of other inputs; suggests `--fresh`
│   └── LockedError      exit 2   another run is using the folder; names it
├── MissingExtraError    exit 2   an optional package is not installed; gives the pip command
├── DiskError            exit 1   a disk is full or not writable; finished files are kept
├── ParityError          exit 1   an export's outputs differ from the checkpoint's
└── AssertionMissedError exit 1   `bench --assert` did not hold
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """The base class of every error that this package raises on purpose."""

    exit_code = 1


class InputError(EdgepruneError):
    """A file, option or folder from the user is not usable. The text names it, what was found, what was expected."""

    exit_code = 2


class BudgetError(InputError):
    """No plan that the method allows meets the budget."""


class CannotRunError(InputError):
    """A folder is complete, but none of its runtimes runs on this machine."""


class StaleStageError(InputError):
    """A stage's results on disk were computed from other inputs."""


class LockedError(InputError):
    """Another process is using the folder."""


class MissingExtraError(EdgepruneError):
    """An optional dependency is missing."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'edgeprune[{extra}]'")


class DiskError(EdgepruneError):
    """A file was not written: the disk is full or the folder is not writable. Running the command again resumes."""


class ParityError(EdgepruneError):
    """An exported model does not reproduce the outputs of its checkpoint."""


class AssertionMissedError(EdgepruneError):
    """A measurement of `bench` misses a bound set by `--assert`."""
