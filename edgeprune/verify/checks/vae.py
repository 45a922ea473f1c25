"""The VAE: a picture that it encodes and decodes is the same picture.

This needs weights that were trained. Those of `edgeprune synth` are random, so that their figure is not judged.
"""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.manifest import MANIFEST, Manifest
from edgeprune.artefact.synth import MARK
from edgeprune.residency.compute import name_of
from edgeprune.verify.finding import FAIL, NOT_JUDGED, PASS, Finding
from edgeprune.verify.subject import Subject

NAME = "vae"
BOUND = 25.0
"""Least PSNR in dB. The built-in model's VAE reaches 31 to 39 on such pictures, random ones 10 to 12."""


def check(subject: Subject) -> list[Finding]:
    """Judge the PSNR of the picture."""
    trip = subject.round_trip
    verdict, advice = PASS, ""
    if trip.psnr < BOUND:
        verdict, advice = FAIL, "the picture is lost: the VAE's weights are random, damaged or another model's"
        if mark := _mark(subject.folder):
            verdict, advice = NOT_JUDGED, f"the weights are random, as {mark} says"
    return [Finding(NAME, "vae", verdict, "PSNR in dB", trip.psnr, BOUND, name_of(trip.dtype), advice)]


def _mark(folder: Path) -> Path | None:
    """Return the file by which a model, or the one that an artefact was made from, is of `edgeprune synth`."""
    source = [Path(Manifest.load(folder).source)] if (folder / MANIFEST).is_file() else []
    return next((place / MARK for place in (folder, *source) if (place / MARK).is_file()), None)
