"""Write a conversion: the file's tensors under diffusers' names, and everything else from the config folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgeprune.artefact import licensing
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.convert.plan import Part
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.writing import complete_tokenizer, copy_part, remove_mark, write_transformer
from edgeprune.common.files import cannot_write, inside, need_space, read_json, replace_folder, write_json
from edgeprune.common.progress import Progress
from edgeprune.residency.model_files import GENERATION, INDEX, part_files, parts_of, small_files
from edgeprune.residency.weights import FILE


def copied_bytes(config: Path, parts: Sequence[Part]) -> int:
    """Return the bytes that are copied from the config folder."""
    written = {part.name for part in parts}
    names = [name for name in parts_of(read_json(config / INDEX)) if name not in written]
    return sum(path.stat().st_size for name in names for path in part_files(config / name))


def write(parts: Sequence[Part], config: Path, out: Path, *, name: str, named: str, progress: Progress) -> None:
    """Write a diffusers folder, check it, and only then give it its name.

    Args:
        parts: the networks that are written tensor by tensor.
        config: the pipeline's folder with everything else.
        out: the folder to create.
        name: of the model in the file; guesses of sampling steps read it later.
        named: the config folder as the user named it; a hub id is kept for the same reason.
        progress: called after each shard and each copied part.

    Raises:
        InputError: a file cannot be read.
        DiskError: the disk is full.
    """
    need_space(out, sum(sum(part.sizes.values()) for part in parts) + copied_bytes(config, parts))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _settings(partial, config, named)
        written = {part.name for part in parts}
        for part in parts:
            _write_part(part, partial, config, name, progress)
        for other in parts_of(read_json(config / INDEX)):
            if other not in written:
                copy_part(config / other, partial / other)
                complete_tokenizer(partial / other)
                progress(f"copied {other}")
        check_pipeline(partial)
        replace_folder(partial, out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_part(part: Part, folder: Path, config: Path, name: str, progress: Progress) -> None:
    """Write one network: its tensors, then its small files."""
    order = sorted(part.pieces, key=lambda target: (part.pieces[target].names[0], target))
    sizes = part.sizes
    settings = part.config | ({"_name_or_path": name} if part.name == HALF else {})
    write_transformer(
        folder, part.name, settings, [{target: sizes[target]} for target in order],
        lambda i: {order[i]: part.pieces[order[i]].read()},
        inputs="", progress=progress, file=FILE if part.name in (HALF, "vae") else "model.safetensors",
    )  # fmt: skip
    remove_mark(folder, part.name)
    for path in small_files(config / part.name):
        if path.name != "config.json":
            shutil.copyfile(path, folder / part.name / path.name)


def _settings(folder: Path, config: Path, named: str) -> None:
    """Write what belongs to no part: the index, settings of images, license files and the card."""
    index = read_json(config / INDEX)
    write_json(folder / INDEX, index | ({"_name_or_path": named} if named else {}))
    licensing.copy(config, folder)
    for file in (GENERATION, licensing.CARD):
        if (config / file).is_file():
            shutil.copyfile(inside(config, file, "link"), folder / file)
