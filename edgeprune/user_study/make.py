"""A study's folder from folders of images: checked, copied, and without anything that tells variants apart.

Images are written anew as PNG, because a file's format, size or text chunks can name the model that made it. What it
leaves out: making the images (see docs/study.md).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageOps

from edgeprune.common.errors import InputError
from edgeprune.common.files import cannot_write, parse_json, write_json
from edgeprune.user_study.design import MODES, Study, check_variant, conditions

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_PER_RATER = 60
"""About a quarter of an hour."""
Progress = Callable[[str, int, int], None]


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
    progress: Progress = lambda what, done, total: None,
) -> Study:
    """Write a study to `folder`; `variants` are folders of images of equal names, the original first.

    `prompts` is a text file, whose n-th line belongs to the n-th image by name, or a `.jsonl` file with `file_name` and
    `text`; by default `metadata.jsonl` beside the original's images. With more than `per_rater` trials to give, a rater
    gets a part; by default at most 60.

    Raises:
        InputError: something of this does not fit together; nothing is left at `folder`.
    """
    if mode not in MODES:
        raise InputError(f"--mode: found {mode!r}, expected {' or '.join(MODES)}")
    if len(variants) < 2:
        raise InputError(f"--variants: found {len(variants)}, expected two or more, the original first")
    if folder.exists() and (not folder.is_dir() or list(folder.iterdir())):
        raise InputError(f"{folder}: is there already; a new study needs a new folder")
    images = {check_variant(name): _images(source) for name, source in variants.items()}
    original, *others = images
    for name in others:
        if odd := sorted(images[name].keys() ^ images[original].keys()):
            missing = name if odd[0] in images[original] else original
            raise InputError(f"{variants[missing]}: no image named {odd[0]}; expected equal names in every variant")
    names = sorted(images[original])
    texts = _prompts(prompts or variants[original] / "metadata.jsonl", names)
    every = len(conditions(mode, len(images))) * len(names)
    if per_rater is not None and not 0 < per_rater <= every:
        raise InputError(f"--per-rater: found {per_rater}, expected 1 to {every}, all there is to rate")
    share = per_rater or min(every, DEFAULT_PER_RATER)
    study = Study(secrets.token_hex(8), title, mode, seed, tuple(images), tuple(texts), tuple(names), share, checks)

    folder = folder.resolve()  # "." has no name
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for variant, name in enumerate(images):
            (building / "images" / name).mkdir(parents=True)
            for prompt, stem in enumerate(names):
                _copy(images[name][stem], building / study.image(variant, prompt), images[original][stem])
                progress("images", variant * len(names) + prompt + 1, len(images) * len(names))
        write_json(building / "study.json", asdict(study))
        if folder.is_dir():
            folder.rmdir()
        building.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return study


def _images(folder: Path) -> dict[str, Path]:
    """The images of a folder by their name without suffix."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: leads out of the folder")
        if path.stem in out:
            raise InputError(f"{path}: found {out[path.stem].name} too, expected one image of a name")
        out[path.stem] = path
    if not out:
        raise InputError(f"{folder}: no images, expected files ending in {', '.join(SUFFIXES)}")
    return out


def _prompts(path: Path, names: list[str]) -> list[str]:
    """The prompt of each image."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give --prompts, a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as prompts ({error})") from error
    if path.suffix != ".jsonl":
        texts = [line for line in lines if line]
        if len(texts) != len(names):
            raise InputError(f"{path}: found {len(texts)} prompts, expected {len(names)}, one for each image")
        return texts
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = parse_json(line)
            file, text = Path(entry["file_name"]), entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: expected file_name and text ({error})") from error
        if file.name != str(file):
            raise InputError(f"{path}:{number}: file_name: {str(file)!r} leads out of the folder")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}:{number}: text: found {text!r}, expected a prompt")
        found[file.stem] = text.strip()
    for name in names:
        if name not in found:
            raise InputError(f"{path}: no line for the image {name}")
    return [found[name] for name in names]


def _copy(source: Path, target: Path, original: Path) -> None:
    """The pixels alone, as PNG."""
    try:
        with Image.open(source) as opened, Image.open(original) as reference:
            if opened.size != reference.size:
                raise InputError(
                    f"{source}: {opened.width}x{opened.height}, {original} is {reference.width}x{reference.height}; "
                    f"expected equal sizes, or raters could tell variants apart"
                )
            pixels = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{source}: not a readable image ({error})") from error
    pixels.info.clear()
    try:
        pixels.save(target, "PNG")
    except OSError as error:
        raise cannot_write(target, error) from error
