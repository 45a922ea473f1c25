"""`verify`: whether a model computes on this machine what its files say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, check_original
from edgeprune.common import extras, heap
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the function imports these after its checks: torch takes seconds
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.verify.finding import Finding


@dataclass(frozen=True)
class Verified:
    """The result of `verify`."""

    folder: str
    """The model as the user named it."""
    device: str
    """Where networks computed."""
    height: int
    """Of the image, in pixels."""
    width: int
    findings: tuple[Finding, ...]
    """In the order of the checks."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        from edgeprune.verify.finding import FAIL

        return all(finding.verdict != FAIL for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune verify --json` prints; docs/verify.md describes it."""
        return {
            "folder": self.folder,
            "device": self.device,
            "height": self.height,
            "width": self.width,
            "passed": self.passed,
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify(
    model: AnyPath | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
    progress: Progress = silent,
) -> Verified:
    """Check a model's files, text encoders, transformer and VAE on this machine. Nothing is written.

    Args:
        model: an original's or an artefact's folder, or a hub id; None for the built-in model.
        revision: a branch, tag or commit of a hub id; None for its default.
        variant: of an original's weights, such as fp16; None for the full ones, or the only ones that there are.
        dtype: what text encoders and transformer compute in: fp32, bf16 or fp16; None for what they compute in on
            this machine.
        generation: height and width of the image, and other settings; None for the model's own.
        compute: where networks run, in how much memory, and the longest time; None takes what this machine has, and
            any time.
        progress: called after each block.

    Raises:
        InputError: the model is not usable or is of a kind that cannot be verified, an option is out of range, or the
            steps take too long.
        MissingExtraError: a package that runs originals is not installed.
    """
    check_original(model, revision)
    extras.require(extras.COMPRESS, "compress")
    heap.large_pages()
    from edgeprune.artefact.checks import check_settings
    from edgeprune.artefact.resolve import read_config, resolve
    from edgeprune.artefact.staged import can_stage
    from edgeprune.families.encoders import check_tokens
    from edgeprune.residency.compute import DTYPES, Compute
    from edgeprune.sampling.generation import Generation, GenerationOptions, heed, say_guesses
    from edgeprune.verify.run import run
    from edgeprune.verify.subject import Subject

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    here = Compute.of(compute or ComputeOptions(), None if dtype is None else DTYPES[dtype])
    folder = resolve(None if model is None else os.fspath(model), revision, variant)
    check_settings(folder)
    if not can_stage(folder):
        raise InputError(f"{folder}: verify knows the text encoders CLIP, T5, Qwen3 and Qwen2.5-VL alone")
    _, family = read_config(folder)
    given = (generation or GenerationOptions()).given()
    say_guesses(folder, given)
    images = Generation.load(folder).changed(GenerationOptions(**heed(folder, given)), "options")
    images.check_size(folder, given)
    check_tokens(folder, family.encoders, images.max_sequence_length)
    longest_s = compute.longest_s if compute else None
    findings = run(Subject(folder, here, images, variant, progress, longest_s))
    return Verified(
        folder="built-in" if model is None else str(model), device=str(here.device), height=images.height,
        width=images.width, findings=tuple(findings),
    )  # fmt: skip
