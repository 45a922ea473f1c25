"""What a killed export, or one out of disk, has made: the next run of the same inputs goes on there.

    work = Unfinished(folder, inputs)
    if not work.has("vae_decoder"):
        path = work.begin("vae_decoder")  # its folder; write, check and compare the network there
        work.finish("vae_decoder", {"parity": ...})

`unfinished.json` says what the folder is of and which networks are finished, with the hashes of their files. Beside
them lies what a network's own files need to go on (data.py, chunks of Core ML), and what is of no use after a kill, in
names that begin with `unfinished-`. What it leaves out: two runs at once in one folder, see
lock.py.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.files import cannot_write, read_json, sha256_file, write_json

MARK = "unfinished.json"
SCRATCH = "unfinished-"
"""Begins the names of files that another run cannot use."""


class Unfinished:
    """The folder of an export under way.

    Args:
        folder: where it is; what lies there is kept only if it is of the same `inputs`.
        inputs: digest of everything that the files depend on.

    Raises:
        DiskError: the folder cannot be written.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder = folder
        self._mark: dict[str, Any] = {}
        with contextlib.suppress(InputError):  # none, or damaged
            self._mark = read_json(folder / MARK)
        if self._mark.get("inputs") != inputs:
            shutil.rmtree(folder, ignore_errors=True)
            self._mark = {"inputs": inputs, "networks": {}}
            write_json(folder / MARK, self._mark)

    def has(self, name: str) -> bool:
        """Whether a network is finished and its files are still what they were."""
        files = self._mark["networks"].get(name, {}).get("files", {})
        paths = {self.folder / file: sha256 for file, sha256 in files.items()}
        return bool(paths) and all(p.is_file() and sha256_file(p) == sha256 for p, sha256 in paths.items())

    def begin(self, name: str) -> Path:
        """The folder to write a network into; of an earlier run it holds only what can be gone on with.

        Raises:
            DiskError: it cannot be made.
        """
        folder = self.folder / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        _remove(folder, f"{SCRATCH}*")
        return folder

    def finish(self, name: str, said: dict[str, Any]) -> None:
        """Note that a network is whole and compared, and what edgeprune_export.json shall say of it.

        Raises:
            DiskError: the disk is full.
        """
        folder = self.folder / name
        _remove(folder, f"{SCRATCH}*")
        _remove(folder, MARK)
        files = {
            p.relative_to(self.folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()
        }
        self._mark["networks"][name] = {"said": said, "files": files}
        write_json(self.folder / MARK, self._mark)

    def said(self, key: str) -> dict[str, Any]:
        """By finished network, what it said under this key."""
        networks = self._mark["networks"].items()
        return {name: network["said"][key] for name, network in networks if key in network["said"]}

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the finished networks' files, by their place in the folder."""
        return {
            file: sha256 for network in self._mark["networks"].values() for file, sha256 in network["files"].items()
        }


def is_whole(folder: Path, inputs: str) -> bool:
    """Whether an export of these inputs has its place, and still the mark that goes last."""
    with contextlib.suppress(InputError):
        return bool(read_json(folder / MARK).get("inputs") == inputs)
    return False


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
