"""The files: all tensors are there, and an artefact's files have the hashes of its manifest.

Hashes are those of the manifest alone: nothing says what an original's files should be.
"""

from __future__ import annotations

from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.manifest import MANIFEST, Manifest
from edgeprune.common import hashes
from edgeprune.common.errors import InputError
from edgeprune.verify.finding import FAIL, PASS, Finding
from edgeprune.verify.subject import Subject

NAME = "files"


def check(subject: Subject) -> list[Finding]:
    """Compare hashes, and names and shapes in the files' headers with the configs. Stops at the first that differs."""
    folder, checked = subject.folder, "headers"
    try:
        if (folder / MANIFEST).is_file():
            checked = MANIFEST
            hashes.verify(folder, Manifest.load(folder).files, MANIFEST, subject.progress)
        check_pipeline(folder, subject.variant)
        subject.progress("verify: files of the transformer")
        if not subject.stored:
            raise InputError(f"{folder}: found no transformer's weights; run `edgeprune prune -o {folder}`")
    except InputError as error:
        return [Finding(NAME, checked, FAIL, advice=str(error))]
    return [Finding(NAME, checked, PASS)]
