"""Records which networks of an export are finished, so that an interrupted export resumes.

    work = Unfinished(folder, inputs)
    if not work.has("vae_decoder"):
        path = work.begin("vae_decoder")  # its folder; write, check and compare the network there
        work.finish("vae_decoder", {"parity": ...})

`unfinished.json` holds a digest of the export's inputs and the finished networks with the hashes of their files. A
network's folder may hold files that let its writing resume (the journal of external_data.py, finished chunks of Core
ML), and temporary ones whose names begin with `unfinished-`, which another run removes. Two runs at once in one folder
are not handled here; common/lock.py prevents them.
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
"""Beginning of the names of temporary files; another run removes them."""


class Unfinished:
    """The folder of an export in progress.

    Args:
        folder: where it is; its content is dropped unless an export of the same `inputs` left it.
        inputs: digest of everything that the files depend on.

    Raises:
        DiskError: the folder cannot be written.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder = folder
        self._mark: dict[str, Any] = {}
        with contextlib.suppress(InputError):  # absent or damaged
            self._mark = read_json(folder / MARK)
        if self._mark.get("inputs") != inputs:
            shutil.rmtree(folder, ignore_errors=True)
            self._mark = {"inputs": inputs, "networks": {}}
            write_json(folder / MARK, self._mark)

    def has(self, name: str) -> bool:
        """Return whether a network is finished and its files are unchanged."""
        files = self._mark["networks"].get(name, {}).get("files", {})
        paths = {self.folder / file: sha256 for file, sha256 in files.items()}
        return bool(paths) and all(p.is_file() and sha256_file(p) == sha256 for p, sha256 in paths.items())

    def begin(self, name: str) -> Path:
        """Create and return the folder of a network; of an interrupted run it keeps only what can be resumed.

        Raises:
            DiskError: the folder cannot be created.
        """
        folder = self.folder / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        _remove(folder, f"{SCRATCH}*")
        return folder

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Record that a network is written and compared.

        Args:
            name: the network.
            record: its content for edgeprune_export.json, by the key to pass to `recorded`.

        Raises:
            DiskError: the disk is full.
        """
        folder = self.folder / name
        _remove(folder, f"{SCRATCH}*")
        _remove(folder, MARK)
        files = {
            p.relative_to(self.folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()
        }
        self._mark["networks"][name] = {"said": record, "files": files}
        write_json(self.folder / MARK, self._mark)

    def recorded(self, key: str) -> dict[str, Any]:
        """Return the values that finished networks recorded under this key, by network."""
        networks = self._mark["networks"].items()
        return {name: network["said"][key] for name, network in networks if key in network["said"]}

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the finished networks' files, by their path in the folder."""
        return {
            file: sha256 for network in self._mark["networks"].values() for file, sha256 in network["files"].items()
        }


def is_whole(folder: Path, inputs: str) -> bool:
    """Return whether a complete export of these inputs is in place, with the mark that is removed last."""
    with contextlib.suppress(InputError):
        return bool(read_json(folder / MARK).get("inputs") == inputs)
    return False


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
