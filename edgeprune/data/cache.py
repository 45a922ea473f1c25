"""Encoded training data in a folder: shards of safetensors and an index, checked and mapped.

    cache.json                what was encoded and by what; of each shard its file, SHA-256, samples by size, skipped
    shard-00000.safetensors   latents.HxW (S, C, h, w) and rows.HxW (S) for each size in pixels; hidden (T, M, K) and
                              pooled (T, P): texts of this shard, row 0 the empty prompt
    skipped.json              what could not be used, and why

The index is a file like any other that somebody gives us: names stay in the folder, numbers are bounded, and a shard
must be what the index and the model say. What it leaves out: making one (encode.py).

Notation: as in data.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common import fields
from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, shown
from edgeprune.common.files import check_schema, digest, inside, read_json, sha256_file, write_json
from edgeprune.data.pairs import Pairs, Part
from edgeprune.families import Config, Family
from edgeprune.families.encoders import is_present, read_index
from edgeprune.residency.weights import header
from edgeprune.sampling.generation import Generation

SCHEMA_VERSION = 1
INDEX, SKIPPED = "cache.json", "skipped.json"
Settings = dict[str, Any]
"""Flat: hashes of what encodes, sizes, and where the samples are from."""
OF_SAMPLES = ("source", "content", "samples", "buckets", "dtype", "samples_per_shard")
"""The settings that say which samples these are. All others must be those of the model that learns from them."""
_KEPT = (".safetensors", ".json", ".txt", ".model")
"""What weights, configs and tokenizers are written as."""
_MOST_SHARDS, _MOST_SAMPLES = 60_000, 10**9
"""Linux maps up to 65,530 files at once."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class Shard:
    """One file of the folder."""

    file: str
    sha256: str
    sizes: dict[str, int]
    """Samples by size, like {"1024x768": 40}: height and width in pixels."""
    skipped: int

    @property
    def samples(self) -> int:
        """All of it."""
        return sum(self.sizes.values())


@dataclass
class Index:
    """What `cache.json` says."""

    settings: Settings
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read a folder's index.

        Raises:
            InputError: none there, or a field is not what it must be.
        """
        path = folder / INDEX
        data = read_json(path)
        check_schema(path, data.get("schema_version"), SCHEMA_VERSION, "make the cache again, with another -o")
        settings, shards, complete = (data.get(name) for name in ("settings", "shards", "complete"))
        if not isinstance(settings, dict) or not all(isinstance(v, (str, int, float)) for v in settings.values()):
            raise InputError(f"{path}: settings: expected an object of texts and numbers")
        if not isinstance(shards, list) or len(shards) > _MOST_SHARDS:
            raise InputError(f"{path}: shards: expected a list of up to {_MOST_SHARDS}")
        if not isinstance(complete, bool):
            raise InputError(f"{path}: complete: found {shown(complete)}, expected true or false")
        fields.whole(settings, "samples_per_shard", f"{path}: settings", most=_MOST_SAMPLES)
        return cls(
            settings, [_shard(folder, entry, f"{path}: shards: {i}") for i, entry in enumerate(shards)], complete
        )

    def save(self, folder: Path) -> None:
        """Write it, by way of a temporary name."""
        write_json(folder / INDEX, {"schema_version": SCHEMA_VERSION} | asdict(self))

    @property
    def identity(self) -> str:
        """Changes when a setting or a sample does."""
        return digest([self.settings, [shard.sha256 for shard in self.shards]])

    @property
    def sizes(self) -> dict[str, int]:
        """Samples by size."""
        found: dict[str, int] = {}
        for shard in self.shards:
            for size, count in shard.sizes.items():
                found[size] = found.get(size, 0) + count
        return dict(sorted(found.items()))

    def check_made_by(self, expected: Settings, folder: Path) -> list[str]:
        """Refuse what was encoded otherwise than the model that shall learn from it does.

        Args:
            expected: see `made_by`.

        Returns:
            The parts that could not be compared, since the model's weights are not there.

        Raises:
            InputError: says the first setting that differs.
        """
        absent = [name for name, value in expected.items() if value is None]
        for name in sorted((self.settings.keys() | expected.keys()) - set(OF_SAMPLES)):
            ours, theirs = expected.get(name), self.settings.get(name)
            if ours != theirs and not (name in self.settings and name in absent):
                raise InputError(
                    f"{folder / INDEX}: {shown(name)}: found {_short(theirs)}, expected {_short(ours)} as this model "
                    "has it; make the data again: edgeprune cache SOURCE --model MODEL -o DIR"
                )
        return absent


def _short(value: Any) -> str:
    """A value for a message; of a hash the beginning."""
    if value is None:
        return "none"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else shown(value)


def _shard(folder: Path, entry: Any, where: str) -> Shard:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: found {shown(entry)}, expected an object")
    file, sha256, sizes = fields.text(entry, "file", where), fields.text(entry, "sha256", where), entry.get("sizes")
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise InputError(f"{where}: file: found {shown(file)}, expected the name of a .safetensors file beside it")
    inside(folder, file, f"{where}: file")
    if not isinstance(sizes, dict):
        raise InputError(f"{where}: sizes: found {shown(sizes)}, expected an object")
    for size in sizes:
        match = _SIZE.fullmatch(size)
        if not match or max(map(int, match.groups())) > LARGEST:
            raise InputError(f"{where}: sizes: found {shown(size)}, expected HxW in pixels, up to {LARGEST}")
        fields.whole(sizes, size, f"{where}: sizes", most=_MOST_SAMPLES)
    return Shard(file, sha256, sizes, fields.whole(entry, "skipped", where, least=0, most=_MOST_SAMPLES))


def is_cache(source: str) -> bool:
    """Whether a `--data` names such a folder."""
    return (Path(source) / INDEX).is_file()


def made_by(
    source: Path, generation: Generation, *, drawn: bool, sha256: Callable[[Path], str] = sha256_file
) -> Settings:
    """What encoded data depends on: the hash of every text encoder, tokenizer and VAE, image size, length of text.

    The hash of a part whose weights are not there is null: where data is encoded already, nobody needs them.

    Args:
        source: the pipeline's folder.
        drawn: the images are the model's own, so they depend on its transformer and on how it is sampled too.
        sha256: of a file.
    """
    parts = [n for n, entry in read_index(source).items() if isinstance(entry, list) and is_present({n: entry}, n)]
    mine = ("text_encoder", "tokenizer", "vae") + (("transformer", "scheduler") if drawn else ())
    out: Settings = {}
    for part in sorted(parts):
        if part.startswith(mine):
            paths = sorted(p for p in (source / part).rglob("*") if p.is_file() and p.suffix in _KEPT)
            known = part.startswith(("tokenizer", "scheduler")) or any(p.suffix == ".safetensors" for p in paths)
            out[part] = digest([(p.relative_to(source).as_posix(), sha256(p)) for p in paths]) if known else None
    names = ["height", "width", "max_sequence_length"]
    names += ["num_inference_steps", "guidance_scale"] if drawn else []
    return out | {name: getattr(generation, name) for name in names}


def open_pairs(
    folder: Path,
    family: Family,
    config: Config,
    *,
    sha256: Callable[[Path], str] = sha256_file,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pairs:
    """The samples of a folder, mapped.

    Args:
        family: of the transformer that shall learn from them.
        config: its config.
        sha256: of a file; it may remember.
        progress: called with shards checked, and how many there are.

    Raises:
        InputError: it is not finished, or a shard is missing, damaged or not as the index and the model say.
    """
    index = Index.load(folder)
    if not index.complete:
        raise InputError(f"{folder}: the cache is not finished; run its `edgeprune cache` again to go on with it")
    parts = []
    for number, shard in enumerate(index.shards):
        path = folder / shard.file
        if not path.is_file():
            raise InputError(f"{path}: no such file, but {INDEX} lists it; run its `edgeprune cache` again")
        if sha256(path) != shard.sha256:
            raise InputError(
                f"{path}: its SHA-256 is not the one in {INDEX}: the file is damaged or was changed; delete it and run "
                "its `edgeprune cache` again"
            )
        parts += mapped(path, shard.sizes, family, config)
        progress(number + 1, len(index.shards))
    if len({part.hidden.shape[1] for part in parts}) > 1:
        raise InputError(f"{folder}: shards have texts of different lengths; make the cache again, with another -o")
    if not parts:
        raise InputError(f"{folder / INDEX}: found no samples")
    return Pairs(parts)


def mapped(path: Path, sizes: Mapping[str, int], family: Family, config: Config) -> list[Part]:
    """A shard's samples by size, mapped.

    Raises:
        InputError: it is not what the index and the model say.
    """
    found = header(path)

    def axes(name: str, count: int) -> tuple[int, ...]:
        """A tensor's shape, zeros where it has another number of axes or is not there."""
        shape = found.get(name, ((), ""))[0]
        return shape if len(shape) == count else (0,) * count

    space = family.latents(config)
    most = LARGEST if space.largest is None else space.largest * space.patch
    hidden_width, pooled_width = family.text_widths(config)
    texts, tokens, _ = axes("hidden", 3)
    expected: dict[str, tuple[Any, tuple[str, ...]]] = {
        "hidden": ((texts, tokens, hidden_width), ("F32", "F16")),
        "pooled": ((texts, pooled_width), ("F32", "F16")),
    }
    for size, count in sizes.items():
        _, _, *sides = axes(f"latents.{size}", 4)
        fits = all(0 < side <= most and side % space.patch == 0 for side in sides)
        expected[f"latents.{size}"] = ((count, space.channels, *(sides if fits else ("h", "w"))), ("F32", "F16"))
        expected[f"rows.{size}"] = ((count,), ("I64",))
    for name in sorted(expected.keys() | found.keys()):
        (shape, kinds), (real, kind) = expected.get(name, (None, ())), found.get(name, (None, ""))
        if shape != real or kind not in kinds or not texts:
            raise InputError(
                f"{path}: {shown(name)}: found {shown(real)} {kind}, expected {shown(shape)} {' or '.join(kinds)}"
            )
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    parts = []
    for size in sizes:
        rows = tensors[f"rows.{size}"]
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= texts:
            raise InputError(f"{path}: rows.{size}: found {low} to {high}, expected texts from 0 to {texts - 1}")
        parts.append(Part(tensors[f"latents.{size}"], rows, tensors["hidden"], tensors["pooled"]))
    return parts
