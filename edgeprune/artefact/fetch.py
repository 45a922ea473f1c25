"""Fetch a model from the hub into huggingface_hub's cache: only the files that are the model, after saying how many.

Without a connection, or with HF_HUB_OFFLINE=1, the model comes from the cache.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from edgeprune.artefact import licensing
from edgeprune.common import processes
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.files import need_space
from edgeprune.common.terminal import printable
from edgeprune.families.encoders import read_index
from edgeprune.residency.model_files import INDEX, files_among

Needed = Callable[[str], bool]
"""Whether a part's weights are needed, by its name."""


def all_parts(part: str) -> bool:
    """Need all weights."""
    return True


def fetch(name: str, revision: str | None, variant: str | None, needed: Needed = all_parts) -> Path:
    """Return the snapshot of a repository, with all files of the model.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit; None for the default branch.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        needed: of the other parts, only configs and tokenizers are fetched.

    Raises:
        InputError: the hub has no such model, or it cannot be reached and the cache does not hold the model.
        DiskError: the disk has less room than the download needs.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        listed = HfApi().model_info(name, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # the first also where access is not granted
        raise _unavailable(name, revision, error) from error
    except Exception as error:  # there are many ways to have no connection
        return _cached(name, revision, variant, needed, error)
    sizes = {file.rfilename: file.size or 0 for file in listed.siblings or []}
    try:
        wanted = _wanted(_index_and_card(name, revision, sizes), sizes, variant, name, needed)
        _announce(name, str(listed.sha), {path: sizes[path] for path in wanted})
        return _download(name, str(listed.sha), wanted)
    except EdgepruneError:
        raise
    except Exception as error:
        raise _unavailable(name, revision, error) from error


def _index_and_card(name: str, revision: str | None, paths: Iterable[str]) -> Path:
    """Download what says which other files are wanted; return the snapshot."""
    from huggingface_hub import hf_hub_download

    if INDEX not in paths:
        single = [path for path in paths if path.endswith((".safetensors", ".gguf")) and "/" not in path]
        found, hint = f"found no {INDEX}", ""
        if single:
            found = f"found single files like {single[0]}"
            hint = f"; download one with `hf download {name} {single[0]}`, and give it to `edgeprune convert`"
        raise InputError(f"{name}: {found}, expected the repository of a diffusers pipeline{hint}")
    present = [path for path in (licensing.CARD, INDEX) if path in paths]
    # By the branch's name: only so does the cache learn which commit it is, for the next time without a connection.
    return [Path(hf_hub_download(name, path, revision=revision)) for path in present][-1].parent


def _wanted(folder: Path, paths: Iterable[str], variant: str | None, where: str, needed: Needed) -> list[str]:
    """Return the paths of the model and its licenses among those of a repository."""
    model = files_among(read_index(folder), paths, variant, where, needed)
    return sorted({*model, *licensing.among(folder, paths)})


def _announce(name: str, commit: str, sizes: Mapping[str, int]) -> None:
    """Say what will be downloaded, and refuse if the disk has no room for it."""
    from huggingface_hub import constants, try_to_load_from_cache

    missing = [path for path in sizes if not isinstance(try_to_load_from_cache(name, path, revision=commit), str)]
    if not missing:
        return
    size, cache = sum(sizes[path] for path in missing), Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    need_space(cache, size)
    free = shutil.disk_usage(cache).free
    if processes.is_main():
        line = f"fetching {name}: {len(missing)} files, {size / 1e9:.2f} GB, to {cache} ({free / 1e9:.0f} GB free)"
        print(printable(line), file=sys.stderr)


def _download(name: str, revision: str | None, paths: Iterable[str], *, offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(path) for path in paths]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))


def _cached(name: str, revision: str | None, variant: str | None, needed: Needed, why: Exception) -> Path:
    """Return the snapshot that the cache holds.

    Raises:
        InputError: it holds none, or not all of the model; the hub could not be reached because of `why`.
    """
    try:
        folder = _download(name, revision, [INDEX], offline=True)
    except Exception as error:
        raise _unavailable(name, revision, why) from error
    if not (folder / INDEX).is_file():
        raise _unavailable(name, revision, why)
    where = f"{name}, of which the cache has {folder}"
    wanted = _wanted(folder, _cached_paths(name, revision, folder), variant, where, needed)
    try:
        return _download(name, revision, wanted, offline=True)
    except Exception as error:  # files are missing, which it names
        raise _unavailable(name, revision, error) from error


def _cached_paths(name: str, revision: str | None, folder: Path) -> list[str]:
    """Return the paths of a repository as the cache knows them; before huggingface_hub 2, of the files that it has."""
    import huggingface_hub

    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        with contextlib.suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
            return [file.path for file in huggingface_hub.get_cached_repo_tree(name, revision=revision)]
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _unavailable(name: str, revision: str | None, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    at = f" at revision {revision}" if revision else ""
    return InputError(f"{name}: no such folder, and not available from the hub{at} ({reason})")
