"""A cache of encoded training data: a folder of safetensors shards with an index, checked and memory-mapped.

    cache.json                the settings; for each shard its file, SHA-256, samples by size, and number skipped
    shard-00000.safetensors   latents.HxW (S, C, h, w) and rows.HxW (S) for each size in pixels; hidden (T, M, K) and
                              pooled (T, P): the texts of this shard, row 0 the empty prompt
    skipped.json              the entries that were not usable, and why

The index is untrusted input: its file names must stay in the folder, its numbers are bounded, and each shard must
match both the index and the model. encode.py makes caches.

Notation: as in pairs.py.
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
from edgeprune.common.files import check_schema, digest, inside, read_json, write_json
from edgeprune.common.hashes import keeping, kept_sha256
from edgeprune.data.pairs import Pairs, Samples
from edgeprune.families import Config, Family
from edgeprune.families.encoders import is_present, read_index
from edgeprune.families.parts import VAE_FLUX2
from edgeprune.residency.model_files import part_files
from edgeprune.residency.weights import header
from edgeprune.sampling.generation import Generation

ShardsChecked = Callable[[int, int], None]
"""Called with the number of shards checked and their total."""

SCHEMA_VERSION = 1
INDEX, SKIPPED = "cache.json", "skipped.json"
Settings = dict[str, Any]
"""A flat object: hashes of what encodes, image sizes, and where the samples come from."""
OF_SAMPLES = ("source", "content", "samples", "buckets", "dtype", "computed_in", "samples_per_shard")
"""The settings that say which samples these are, and how exact. All others must match the model that trains on them."""
_HASHED = (".safetensors", ".json", ".txt", ".model")
"""The file types of weights, configs and tokenizers."""
_MOST_SHARDS, _MOST_SAMPLES = 60_000, 10**9
"""Linux maps at most 65,530 files at once."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class Shard:
    """A shard's entry in the index."""

    file: str
    sha256: str
    sizes: dict[str, int]
    """Samples by size, like {"1024x768": 40}: height and width in pixels."""
    skipped: int

    @property
    def samples(self) -> int:
        """The number of samples of all sizes."""
        return sum(self.sizes.values())


@dataclass
class Index:
    """The content of `cache.json`."""

    settings: Settings
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read a folder's index.

        Raises:
            InputError: the file is missing, or a field has the wrong type or range.
        """
        path = folder / INDEX
        data = read_json(path)
        check_schema(path, data.get("schema_version"), SCHEMA_VERSION, "make the cache again, with another -o")
        settings, shards, complete = (data.get(name) for name in ("settings", "shards", "complete"))
        if not isinstance(settings, dict) or not all(isinstance(v, (str, int, float)) for v in settings.values()):
            raise InputError(f"{path}: settings: expected an object of strings and numbers")
        if not isinstance(shards, list) or len(shards) > _MOST_SHARDS:
            raise InputError(f"{path}: shards: expected a list of at most {_MOST_SHARDS}")
        if not isinstance(complete, bool):
            raise InputError(f"{path}: complete: found {shown(complete)}, expected true or false")
        fields.whole_number(settings, "samples_per_shard", f"{path}: settings", most=_MOST_SAMPLES)
        return cls(
            settings=settings,
            shards=[_shard(folder, entry, f"{path}: shards: {i}") for i, entry in enumerate(shards)],
            complete=complete,
        )

    def save(self, folder: Path) -> None:
        """Write the index atomically."""
        write_json(folder / INDEX, {"schema_version": SCHEMA_VERSION} | asdict(self))

    @property
    def identity(self) -> str:
        """A digest of the settings and of every shard."""
        return digest([self.settings, [shard.sha256 for shard in self.shards]])

    @property
    def sizes(self) -> dict[str, int]:
        """The number of samples by size, over all shards."""
        totals: dict[str, int] = {}
        for shard in self.shards:
            for size, count in shard.sizes.items():
                totals[size] = totals.get(size, 0) + count
        return dict(sorted(totals.items()))

    def check_made_by(self, expected: Settings, folder: Path) -> list[str]:
        """Refuse a cache that was encoded differently from how the model to be trained encodes.

        Args:
            expected: the model's settings, see `made_by`.

        Returns:
            The components that could not be compared, since the model's folder lacks their weights.

        Raises:
            InputError: a setting differs; the message names the first.
        """
        absent = [name for name, value in expected.items() if value is None]
        for name in sorted((self.settings.keys() | expected.keys()) - set(OF_SAMPLES)):
            ours, theirs = expected.get(name), self.settings.get(name)
            if ours != theirs and not (name in self.settings and name in absent):
                raise InputError(
                    f"{folder / INDEX}: {shown(name)}: found {_short(theirs)}, expected {_short(ours)} as this model "
                    "has it; encode the data again: edgeprune cache SOURCE --model MODEL -o DIR"
                )
        return absent


def _short(value: Any) -> str:
    """Return a value as messages show it; a hash is shortened."""
    if value is None:
        return "none"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else shown(value)


def _shard(folder: Path, entry: Any, where: str) -> Shard:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: found {shown(entry)}, expected an object")
    file, sha256, sizes = fields.text(entry, "file", where), fields.text(entry, "sha256", where), entry.get("sizes")
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise InputError(
            f"{where}: file: found {shown(file)}, expected the name of a .safetensors file in the same folder"
        )
    inside(folder, file, f"{where}: file")
    if not isinstance(sizes, dict):
        raise InputError(f"{where}: sizes: found {shown(sizes)}, expected an object")
    for size in sizes:
        match = _SIZE.fullmatch(size)
        if not match or max(map(int, match.groups())) > LARGEST:
            raise InputError(f"{where}: sizes: found {shown(size)}, expected HxW in pixels, up to {LARGEST}")
        fields.whole_number(sizes, size, f"{where}: sizes", most=_MOST_SAMPLES)
    skipped = fields.whole_number(entry, "skipped", where, least=0, most=_MOST_SAMPLES)
    return Shard(file=file, sha256=sha256, sizes=sizes, skipped=skipped)


def is_cache(source: str) -> bool:
    """Return whether a `--data` names a cache."""
    return (Path(source) / INDEX).is_file()


def made_by(
    source: Path,
    generation: Generation,
    *,
    drawn: bool,
    variant: str | None = None,
) -> Settings:
    """Return what encoded data depends on: hashes of text encoders, tokenizers and VAE, image size, text length.

    The hash of a component without weights is null: training on encoded data does not need them.

    Args:
        source: the pipeline's folder.
        drawn: the model generates the images, so they also depend on its transformer and its sampling settings.
        variant: of the weights, see residency/model_files.py.
    """
    index = read_index(source)
    components = [n for n, entry in index.items() if isinstance(entry, list) and is_present({n: entry}, n)]
    encoders = ("text_encoder", "tokenizer", "vae") + (("transformer", "scheduler") if drawn else ())
    out: Settings = {}
    for name in sorted(components):
        if name.startswith(encoders):
            paths = [p for p in part_files(source / name, variant) if p.suffix in _HASHED]
            known = name.startswith(("tokenizer", "scheduler")) or any(p.suffix == ".safetensors" for p in paths)
            out[name] = digest([(p.relative_to(source).as_posix(), kept_sha256(p)) for p in paths]) if known else None
    if "vae" in components and index["vae"][-1] == VAE_FLUX2:
        out["latents"] = "normalised"  # by its statistics: older caches have other latents
    names = ["height", "width", "max_sequence_length"]
    if drawn:  # the solver and the range of guidance only where they are not the usual ones, as in older caches
        names += ["num_inference_steps", "guidance_scale", "solver", "guidance_range"]
    settings = generation.to_json()
    return out | {name: settings[name] for name in names if name in settings}


def open_pairs(
    folder: Path,
    family: Family,
    config: Config,
    *,
    progress: ShardsChecked = lambda done, total: None,
) -> Pairs:
    """Check a cache and map its samples.

    Args:
        family: the family of the transformer to be trained.
        config: its config.
        progress: called after each shard.

    Raises:
        InputError: the cache is not finished; or a shard is missing, damaged, or does not match the index and model.
    """
    index = Index.load(folder)
    if not index.complete:
        raise InputError(f"{folder}: the cache is not finished; run its `edgeprune cache` command again to resume it")
    samples = []
    with keeping() as sha256_of:
        for number, shard in enumerate(index.shards):
            path = folder / shard.file
            if not path.is_file():
                raise InputError(f"{path}: no such file, but {INDEX} lists it; run its `edgeprune cache` again")
            if sha256_of(path) != shard.sha256:
                raise InputError(
                    f"{path}: its SHA-256 is not the one in {INDEX}: the file is damaged or was changed; delete it and "
                    "run the cache's `edgeprune cache` command again"
                )
            samples += mapped(path, shard.sizes, family, config)
            progress(number + 1, len(index.shards))
    if len({some.hidden.shape[1] for some in samples}) > 1:
        raise InputError(f"{folder}: shards have texts of different lengths; make the cache again, with another -o")
    if not samples:
        raise InputError(f"{folder / INDEX}: found no samples")
    return Pairs(samples)


def mapped(path: Path, sizes: Mapping[str, int], family: Family, config: Config) -> list[Samples]:
    """Map a shard's samples, by size.

    Raises:
        InputError: the shard does not match the index and the model.
    """
    stored = header(path)
    expected, texts = _expected(stored, sizes, family, config)
    for name in sorted(expected.keys() | stored.keys()):
        (shape, dtypes), (stored_shape, dtype) = expected.get(name, (None, ())), stored.get(name, (None, ""))
        if shape != stored_shape or dtype not in dtypes or not texts:
            raise InputError(
                f"{path}: {shown(name)}: found {shown(stored_shape)} {dtype}, "
                f"expected {shown(shape)} {' or '.join(dtypes)}"
            )
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in stored}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    samples = []
    for size in sizes:
        rows = tensors[f"rows.{size}"]
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= texts:
            raise InputError(f"{path}: rows.{size}: found {low} to {high}, expected texts from 0 to {texts - 1}")
        samples.append(
            Samples(latents=tensors[f"latents.{size}"], rows=rows, hidden=tensors["hidden"], pooled=tensors["pooled"])
        )
    return samples


def _expected(
    stored: Mapping[str, tuple[tuple[int, ...], str]], sizes: Mapping[str, int], family: Family, config: Config
) -> tuple[dict[str, tuple[Any, tuple[str, ...]]], int]:
    """Return the shape and allowed dtypes of each tensor of a shard, and its number of texts.

    Numbers that neither index nor model determine are taken from the shard itself if they are in range.

    Args:
        stored: the shapes and dtypes in the shard's header.
    """

    def axes(name: str, count: int) -> tuple[int, ...]:
        """Return a tensor's shape; zeros if the tensor is missing or has another number of axes."""
        shape = stored.get(name, ((), ""))[0]
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
    return expected, texts
