"""`push_to_hub`: publish an artefact or an export on the Hugging Face Hub, through huggingface_hub.

Only finished folders are published, and only if every file is the one whose hash was written down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath
from edgeprune.common import hashes
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import check_links, read_json
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:
    from huggingface_hub import HfApi

EXPORT, ARTEFACT = "edgeprune_export.json", "edgeprune.json"
"""The file that makes a folder an export, and the one that makes it an artefact."""
LEFT_OUT = (
    *("cache/*", ".*", "*/.*", "*.tmp", "*.tmp/*", "*.old/*", "*.partial*"),
    *("unfinished.json", "*/unfinished.json", "unfinished-*", "*/unfinished-*"),
)
"""Patterns of files that stay here: caches, locks, and what an interrupted run resumes from."""
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class PushForecast:
    """What `push_to_hub` would upload."""

    folder: Path
    files_bytes: dict[str, int]
    """Size by path in the repository."""

    @property
    def total_bytes(self) -> int:
        """The sum of all sizes."""
        return sum(self.files_bytes.values())

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune push --dry-run --json` prints."""
        return {"folder": str(self.folder), "files_bytes": self.files_bytes, "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Pushed:
    """The result of `push_to_hub`."""

    url: str
    """Of the repository."""
    commit: str
    """The commit's hash."""
    revision: str
    """The branch."""
    files: int
    """How many files the folder has."""
    total_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune push --json` prints."""
        return {
            "url": self.url,
            "commit": self.commit,
            "revision": self.revision,
            "files": self.files,
            "total_bytes": self.total_bytes,
        }


def push_to_hub(
    folder: AnyPath,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    progress: Progress = silent,
) -> Pushed:
    """Upload a finished artefact or export to a model repository, which is created if it does not exist.

    Args:
        folder: the artefact or export.
        repo: OWNER/NAME, or NAME for your own account.
        private: create a private repository; one that exists already must be private.
        revision: the branch, which is created if it does not exist; None for main.
        token: of your account; None for HF_TOKEN, or the one of `hf auth login`.
        commit_message: None names the folder and edgeprune.
        progress: called after each file that is compared with its hash.

    Raises:
        InputError: the folder is not finished, a file is missing or changed, or the hub refuses the upload.
        LockedError: another process changes the folder.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise InputError(f"repository: found {shown(repo)}, expected OWNER/NAME")
    root = Path(folder)
    with _held(root):
        expected = forecast_push(root, progress=progress)
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(token=token)
        progress(f"push: {len(expected.files_bytes)} files to {repo}")
        try:
            name = _repository(api, repo, private=private, revision=revision)
            commit = api.upload_folder(
                repo_id=name, folder_path=root, revision=revision, ignore_patterns=list(LEFT_OUT),
                commit_message=commit_message or f"Upload {root.resolve().name} with edgeprune",
            )  # fmt: skip
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{repo}: the upload failed ({type(error).__name__}: {reason})") from error
    return Pushed(
        url=f"{api.endpoint}/{name}", commit=str(commit.oid), revision=revision or "main",
        files=len(expected.files_bytes), total_bytes=expected.total_bytes,
    )  # fmt: skip


def forecast_push(folder: AnyPath, *, progress: Progress = silent) -> PushForecast:
    """Return what `push_to_hub` would upload, after all of its checks of the folder. Nothing is uploaded.

    Args:
        folder: the artefact or export.
        progress: called after each file that is compared with its hash.

    Raises:
        InputError: the folder is not finished, or a file is missing or changed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: found no folder, expected a finished artefact or export")
    _check(root, progress)
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    kept = [p for p in paths if not any(fnmatch(p, pattern) for pattern in LEFT_OUT)]  # as huggingface_hub does
    return PushForecast(folder=root, files_bytes={path: (root / path).stat().st_size for path in kept})


def _held(root: Path) -> Any:
    """Hold an artefact's lock; an export is replaced at once when it is finished, and has none."""
    from contextlib import nullcontext

    from edgeprune.common.lock import LOCK, hold

    return hold(root / LOCK, root) if (root / ARTEFACT).is_file() else nullcontext()


def _check(root: Path, progress: Progress) -> None:
    """Refuse a folder that is not a finished artefact or export, or whose files were changed."""
    from edgeprune.artefact.manifest import HALF, INT4, Manifest

    check_links(root)  # which would publish files from elsewhere
    if (root / EXPORT).is_file():
        files = read_json(root / EXPORT).get("files")
        if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
            raise InputError(f"{root / EXPORT}: files: expected hashes by name; export again")
        hashes.verify(root, files, EXPORT, progress)
        return
    if not (root / ARTEFACT).is_file():
        raise InputError(f"{root}: found neither {ARTEFACT} (an artefact) nor {EXPORT} (an export); nothing to push")
    manifest = Manifest.load(root)
    for stage, subfolder in (("prune", HALF), ("quantize", INT4)):
        if stage not in manifest.stages or not (root / subfolder).is_dir():
            raise InputError(f"{root}: not finished, {stage} was not done; run `edgeprune {stage} -o {root}` first")
    manifest.need_half(root)
    hashes.verify(root, manifest.files, ARTEFACT, progress)


def _repository(api: HfApi, repo: str, *, private: bool, revision: str | None) -> str:
    """Create the repository and the branch if they do not exist; return the repository's full name.

    Raises:
        InputError: it should be private, and exists as a public one.
    """
    name: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(name).private:
        raise InputError(f"--private: {name} exists and is public; make it private in its settings, or omit --private")
    if revision:
        api.create_branch(name, branch=revision, exist_ok=True)
    return name
