"""`convert`: a diffusers folder from a single file, and what it would write."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, check_out
from edgeprune.common import extras, heap
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.artefact.convert.opening import Source
    from edgeprune.artefact.convert.plan import Part


@dataclass(frozen=True)
class Conversion:
    """What `convert` writes, or would write."""

    out: Path
    what: str
    """What the file is, in words."""
    converted: tuple[str, ...]
    """The parts written from their tensors: those in the file, and others that are stored in 8 bits."""
    copied: tuple[str, ...]
    """The parts that come from the config as they are, tokenizers and scheduler among them."""
    tensors: int
    """In the file."""
    unneeded: dict[str, int]
    """Tensors of the file that are not needed, by what they are."""
    widened: tuple[str, ...]
    """Dtypes that became bfloat16; all others were kept."""
    guess: str
    """What was concluded from more than shapes; empty if nothing was."""
    converted_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune convert --json` prints."""
        return asdict(self) | {"out": str(self.out)}


def convert(
    file: AnyPath,
    out: AnyPath,
    *,
    config: AnyPath | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Write a diffusers folder from a single file, or from a folder with weights in 8 bits.

    The transformer is never in memory as a whole. The folder gets its name once it is complete and checked.

    Args:
        file: a .safetensors or .gguf file, a transformer's folder, or a pipeline's folder.
        out: the folder to create.
        config: a hub id or a diffusers folder of the same model, for configs, tokenizers and all parts that the file
            does not have. None for a pipeline's folder, which has them.
        revision: a branch, tag or commit of a hub id.
        progress: called after each shard.

    Raises:
        InputError: the file is none of these, or does not fit the config: a tensor is missing, unknown or of another
            shape; or `out` exists.
        MissingExtraError: a package is not installed, such as `gguf` for a GGUF file.
        DiskError: the disk has too little room.
    """
    heap.large_pages()
    conversion, parts, folder = _planned(file, out, config, revision, complete=True)
    from edgeprune.artefact.convert.make import write
    from edgeprune.common.hub_cache import is_hub_id

    name = Path(file).resolve().stem if Path(file).is_file() else Path(file).resolve().name
    named = str(config) if config is not None and not Path(config).exists() and is_hub_id(str(config)) else ""
    write(parts, folder, Path(out), name=name, named=named, progress=progress)
    return conversion


def forecast_convert(
    file: AnyPath, out: AnyPath, *, config: AnyPath | None = None, revision: str | None = None
) -> Conversion:
    """Return what `convert` with these arguments would do. Nothing is written; of a hub id, only configs are fetched.

    Raises:
        InputError: see `convert`.
        MissingExtraError: see `convert`.
    """
    return _planned(file, out, config, revision, complete=False)[0]


def _planned(
    file: AnyPath, out: AnyPath, config: AnyPath | None, revision: str | None, *, complete: bool
) -> tuple[Conversion, list[Part], Path]:
    """Check everything; return what will be done, the parts to write, and the folder with the rest.

    Args:
        complete: fetch the weights that the file does not have.
    """
    path = Path(file)
    check_out(out)
    if Path(out).exists() or Path(out).is_symlink():
        raise InputError(f"-o {out}: exists already; remove it, or use another -o")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a .safetensors or .gguf file")
    extras.require(extras.COMPRESS, "compress")
    from edgeprune.artefact.convert import plan
    from edgeprune.artefact.resolve import resolve

    source, place = _opened(path, config)
    folder = resolve(place, revision, needed=lambda part: False)
    kinds = plan.networks(folder)
    parts, unneeded = plan.from_file(source, folder) if source else ([], {})
    lacking = {name: kind for name, kind in kinds.items() if name not in {part.name for part in parts}}
    if complete or Path(place).is_dir():
        folder = resolve(place, revision, needed=lacking.__contains__)
        parts += filter(None, (plan.from_config(folder, name, kind) for name, kind in lacking.items()))
    if not parts:
        raise InputError(
            f"{path}: a diffusers folder in 16 or 32 bits already; run: edgeprune compress {path} -o small"
        )
    from edgeprune.common.files import read_json
    from edgeprune.residency.model_files import INDEX, parts_of

    written = {part.name for part in parts}
    conversion = Conversion(
        out=Path(out),
        what=source.text if source else "a pipeline in 8 bits",
        converted=tuple(part.name for part in parts),
        copied=tuple(name for name in parts_of(read_json(folder / INDEX)) if name not in written),
        tensors=len(source.stored.shapes) + sum(source.stored.rules.values()) if source else 0,
        unneeded=unneeded,
        widened=tuple(sorted({kind for part in parts for kind in part.widened})),
        guess=source.identity.guess if source else "",
        converted_bytes=sum(sum(part.sizes.values()) for part in parts),
    )
    return conversion, parts, folder


def _opened(path: Path, config: AnyPath | None) -> tuple[Source | None, str]:
    """Return what the file is (None for a whole pipeline), and the folder or hub id with the rest of the model."""
    from edgeprune.artefact.convert.opening import open_file, open_transformer

    if path.is_dir() and (path / "model_index.json").is_file():
        if config is not None:
            raise InputError(f"--config {config}: {path} is a whole pipeline, which has its configs; omit it")
        return None, str(path)
    source = open_transformer(path) if path.is_dir() else open_file(path)
    if source.needs_gguf:
        extras.require(("gguf",), "gguf")
    if config is None:
        raise InputError(source.lacking())
    return source, os.fspath(config)
