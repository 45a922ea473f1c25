"""Named tensors on disk, or in memory as far as there is room; those on disk are found again after a kill."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import DiskError
from edgeprune.common.files import need_space
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors

_IDENTITY = "identity"


class Spill:
    """Groups of tensors under keys. They stay on the processor.

    Args:
        folder: for those that are on disk, of which it holds nothing else; None keeps all in memory.
        room: bytes that they may take in memory.
        identity: of what they are made from. Those that an earlier process left in the folder are found again if they
            have the same one; without one they never are.
    """

    def __init__(self, folder: Path | None = None, *, room: int = 0, identity: str = "") -> None:
        self._folder, self._room = folder, room if folder else sys.maxsize
        self._held: dict[str, Tensors | Path] = {}
        if folder is None:
            return
        mark = folder / _IDENTITY
        if identity and mark.is_file() and mark.read_text(encoding="utf-8") == identity:
            found = {path.stem: path for path in folder.glob("*.safetensors") if path.is_file()}
            if all(map(_is_whole, found.values())):  # else the machine stopped while they were written: start over
                self._held |= found
                return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(identity, encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror or error}") from error

    @property
    def lasts(self) -> bool:
        """Whether a later process may find what is kept."""
        return self._folder is not None

    def need(self, size: int) -> None:
        """Check that the disk has room for `size` bytes, those that are on it already among them.

        Raises:
            DiskError: the disk has less free space.
        """
        if self._folder is not None:
            there = sum(path.stat().st_size for path in self._held.values() if isinstance(path, Path))
            need_space(self._folder, max(0, size - there))

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep tensors, which must not be changed in place afterwards, in place of those that the key has.

        Raises:
            DiskError: the disk is full or the folder is not writable.
        """
        held = {name: tensor.cpu() for name, tensor in tensors.items()}
        if key in self._held and not isinstance(self._held[key], Path):
            self.drop(key)
        size = _size(held)
        if size <= self._room and key not in self._held:
            self._room -= size
            self._held[key] = held
            return
        assert self._folder is not None
        path = self._folder / f"{key}.safetensors"
        save_tensors(path, held)
        self._held[key] = path

    def get(self, key: str, device: torch.device | None = None) -> Tensors:
        """Return the tensors of a key, on `device`; None is the processor.

        Raises:
            KeyError: there is no such key.
        """
        found = self._held[key]
        tensors = load_tensors(found) if isinstance(found, Path) else found
        return tensors if device is None else {name: tensor.to(device) for name, tensor in tensors.items()}

    def drop(self, key: str) -> None:
        """Forget a key, if it is there."""
        found = self._held.pop(key, {})
        if isinstance(found, Path):
            found.unlink()
        else:
            self._room += _size(found)

    def __contains__(self, key: str) -> bool:
        """Return whether there is such a key."""
        return key in self._held

    def clear(self) -> None:
        """Forget all, and free memory and disk."""
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Return whether a file has the bytes that its header tells of; reads the header alone."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
