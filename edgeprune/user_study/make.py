"""Makes a study's folder from folders of images, without anything that reveals which variant made an image.

Every image becomes a new PNG, because the format, the size or text chunks of a file can name the model that made it.
docs/study.md shows how to make the images.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.files import cannot_write, parse_json, write_json
from edgeprune.common.images import open_image
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress, silent
from edgeprune.common.texts import lines_of, read_text
from edgeprune.reference import is_reference
from edgeprune.user_study.design import MODES, Study, check_variant, conditions
from edgeprune.user_study.drawn import draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_UNFINISHED = ".unfinished"
DEFAULT_PER_RATER = 60
"""About a quarter of an hour."""


def make(
    folder: Path,
    variants: dict[str, Path],
    *,
    prompts: Path | None = None,
    mode: str = "mos",
    title: str = "Image study",
    per_rater: int | None = None,
    checks: int = 2,
    seed: int = 0,
    compute: ComputeOptions | None = None,
    progress: Progress = silent,
) -> Study:
    """Write a study to `folder`.

    Args:
        variants: by name, folders whose images have equal names; the original first. Another one may be a reference
            (see `edgeprune.reference`): it draws the original's prompts, at the seeds of its `metadata.jsonl`.
        prompts: a text file whose n-th line belongs to the n-th image by name, or a `.jsonl` file with `file_name` and
            `text`; by default `metadata.jsonl` in the original's folder.
        mode: `mos` or `pairs`, see design.py.
        title: what raters read above the study.
        per_rater: trials of one rater, who gets a part of all if there are more; by default at most 60.
        checks: attention checks of one rater.
        seed: of the random order.
        compute: where references draw, and in how much memory; None takes what this machine has.
        progress: receives what is done, how much of it, and of how much.

    Raises:
        InputError: the arguments or images do not fit together, or `compute` is given and no reference draws; `folder`
            stays as it was.
    """
    if mode not in MODES:
        raise InputError(f"--mode: found {mode!r}, expected {' or '.join(MODES)}")
    if len(variants) < 2:
        raise InputError(f"--variants: found {len(variants)}, expected two or more, the original first")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {_UNFINISHED}):
        raise InputError(f"{folder}: exists already; a new study needs a new folder")
    foreign = {name: source for name, source in variants.items() if is_reference(source)}
    if compute is not None and not foreign:
        raise InputError("--device, --memory: are about references, and all variants are images; omit them")
    original = check_variant(next(iter(variants)))
    if original in foreign:
        raise InputError(f"--variants {original}={variants[original]}: expected images, the original's")
    images = {check_variant(name): _images(source) for name, source in variants.items() if name not in foreign}
    for name in images:
        if odd := sorted(images[name].keys() ^ images[original].keys()):
            missing = name if odd[0] in images[original] else original
            raise InputError(f"{variants[missing]}: no image named {odd[0]}; expected equal names in every variant")
    names = sorted(images[original])
    texts = _prompts(prompts or variants[original] / "metadata.jsonl", names)
    every = len(conditions(mode, len(variants))) * len(names)
    if per_rater is not None and not 0 < per_rater <= every:
        raise InputError(f"--per-rater: found {per_rater}, expected 1 to {every}, the number of all trials")
    share = per_rater or min(every, DEFAULT_PER_RATER)
    study = Study(
        id=secrets.token_hex(8),
        title=title,
        mode=mode,
        seed=seed,
        variants=tuple(map(check_variant, variants)),
        prompts=tuple(texts),
        files=tuple(names),
        per_rater=share,
        checks=checks,
    )
    with tempfile.TemporaryDirectory(prefix="edgeprune-study-") as scratch:
        for name, source in foreign.items():
            place = compute or ComputeOptions()
            draw(source, Path(scratch, name), images[original], texts, variants[original], place, progress)
            images[name] = _images(Path(scratch, name))
        _write(folder, study, {name: images[name] for name in study.variants}, progress)
    return study


def _write(folder: Path, study: Study, images: dict[str, dict[str, Path]], progress: Progress) -> None:
    """Build the study within its folder, which may be a mount or a link, and show it when it is whole."""
    original, names = images[study.variants[0]], study.files
    building, is_new = folder / _UNFINISHED, not folder.exists()
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    try:
        for variant, name in enumerate(images):
            (building / "images" / name).mkdir(parents=True)
            for prompt, stem in enumerate(names):
                _copy(images[name][stem], building / study.image(variant, prompt), original[stem])
                progress("images", variant * len(names) + prompt + 1, len(images) * len(names))
        (building / "images").rename(folder / "images")
        write_json(folder / "study.json", asdict(study))
    except BaseException as error:
        shutil.rmtree(folder / "images", ignore_errors=True)
        shutil.rmtree(folder if is_new else building, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(folder, error) from error
        raise
    building.rmdir()


def _images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their name without suffix."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in out:
            raise InputError(f"{path}: found {out[path.stem].name} too, expected one image per name")
        out[path.stem] = path
    if not out:
        raise InputError(f"{folder}: no images, expected files ending in {', '.join(SUFFIXES)}")
    return out


def _prompts(path: Path, names: list[str]) -> list[str]:
    """Return the prompt of each image."""
    try:
        lines = [line.strip() for line in lines_of(read_text(path))]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give --prompts, a text file with one prompt per line") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as prompts ({error})") from error
    if path.suffix != ".jsonl":
        texts = [line for line in lines if line]
        if len(texts) != len(names):
            raise InputError(f"{path}: found {len(texts)} prompts, expected {len(names)}, one for each image")
        return texts
    by_name: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = parse_json(line)
            file, text = Path(entry["file_name"]), entry["text"] if "text" in entry else entry["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: expected file_name and text ({error})") from error
        if file.name != str(file):
            raise InputError(f"{path}:{number}: file_name: {str(file)!r} leads out of the folder")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}:{number}: text: found {text!r}, expected a prompt")
        by_name[file.stem] = text.strip()
    for name in names:
        if name not in by_name:
            raise InputError(f"{path}: no line for the image {name}")
    return [by_name[name] for name in names]


def _copy(source: Path, target: Path, original: Path) -> None:
    """Write the pixels alone as PNG; the size must be the original's."""
    pixels, reference = open_image(source), open_image(original)
    if pixels.size != reference.size:
        raise InputError(
            f"{source}: {pixels.width}x{pixels.height}, {original} is {reference.width}x{reference.height}; "
            f"expected equal sizes, or raters could tell variants apart"
        )
    try:
        pixels.save(target, "PNG")
    except OSError as error:
        raise cannot_write(target, error) from error
