"""Damage files from outside at random: reading them must end in a result or in an EdgepruneError.

Each attempt starts from a valid document and replaces parts of it with values that readers tend to forget. A short form
runs with the other tests; `make test-hard` tries more than 100,000 files. Vendors' parsers and the building of models
are not fuzzed.
"""

from __future__ import annotations

import collections
import copy
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune import targets
from edgeprune.analysis import contribution
from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import EdgepruneError
from edgeprune.common.files import read_json
from edgeprune.common.terminal import printable
from edgeprune.data.imagefolder import read_samples
from edgeprune.families import family_of
from edgeprune.families.architecture import Hints
from edgeprune.families.encoders import read_index, text_encoders
from edgeprune.planning.plan import PrunePlan
from edgeprune.runtimes.external import check_external
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.user_study import design

SHORT = 40
Counts = tuple[collections.Counter[str], collections.Counter[str]]

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
SMALL = [
    {"num_layers": 3, "num_single_layers": 2} | {k: v for k, v in config.items() if "num_" not in k or "head" in k}
    for config in CONFIGS.values()
]
FOOTPRINT = {"parameters": 10, "bf16_bytes": 20, "int4_bytes": 5}
PLAN = {
    "schema_version": 1, "fingerprint": "ab", "family": "sd3", "num_blocks": 4, "method": "hpp", "blocks": [1, 2],
    "components": [[3, "attn"]], "before": FOOTPRINT, "after": FOOTPRINT, "modulation_rank": 2,
}  # fmt: skip
ANALYSIS = {
    "schema_version": 2, "fingerprint": "ab", "family": "sd3", "num_blocks": 2, "metric": "velocity",
    "prompts": ["a", "b"], "untouched": [0.0, 1.0], "estimator": "reuse",
    "scores": [{"parts": [[0, None]], "scores": [1.0, 2.0]}, {"parts": [[0, "attn"], [1, "mlp"]], "scores": [3, 4]}],
}  # fmt: skip
FIRST = {
    "schema_version": 1, "fingerprint": "", "family": "sd3", "num_blocks": 1, "metric": "m", "prompts": ["a"],
    "untouched": [1.0], "scores": [{"block": 0, "component": None, "scores": [2.0]}],
}  # fmt: skip
SUMMARY = {"metric": "hps", "drop": {"0": -0.1, "1": 0.2}}
MANIFEST = {
    "schema_version": 1, "source": "built-in", "fingerprint": "ab", "family": "sd3", "config": SMALL[0],
    "generation": {"height": 64}, "plan": PLAN, "group_size": 64, "stages": {"plan": {"inputs": "x", "seconds": 1.0}},
    "files": {"transformer/config.json": "00", "edgeprune.json": "00"}, "tools": {"torch": "2"},
}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusion3Pipeline", "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None], "vae": ["diffusers", "AutoencoderKL"], "x": 3,
}  # fmt: skip
GENERATION = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "max_sequence_length": 0}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "base_shift": 0.5,
    "use_dynamic_shifting": True, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    "shift_terminal": 0.1, "time_shift_type": "exponential",
}  # fmt: skip
STUDY = {
    "id": "0123456789abcdef", "title": "t", "mode": "mos", "seed": 0, "variants": ["a", "b"], "prompts": ["p", "q"],
    "files": ["1", "2"], "per_rater": 3, "checks": 1,
}  # fmt: skip
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight_packed": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
    "__metadata__": {"format": "pt"},
}
CACHE = {
    "schema_version": 1, "complete": True,
    "settings": {"vae": "ab", "height": 64, "buckets": False, "samples_per_shard": 64, "guidance_scale": 2.5},
    "shards": [{"file": "shard-00000.safetensors", "sha256": "ab", "sizes": {"64x64": 3, "8x80": 1}, "skipped": 0}],
}  # fmt: skip
SHARD = {
    "rows.8x40": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
    "hidden": {"dtype": "F16", "shape": [1, 1, 2], "data_offsets": [8, 12]},
    "pooled": {"dtype": "F16", "shape": [1, 1], "data_offsets": [12, 14]},
    "latents.8x40": {"dtype": "F16", "shape": [1, 1, 1, 5], "data_offsets": [14, 24]},
}
SHARD_OF = {
    "_class_name": "SD3Transformer2DModel", "in_channels": 1, "patch_size": 1, "pos_embed_max_size": 8,
    "joint_attention_dim": 2, "pooled_projection_dim": 1,
}  # fmt: skip
SINGLE = {
    "double_blocks.0.img_attn.qkv.scale_weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    "double_blocks.0.img_attn.qkv.weight": {"dtype": "F8_E4M3", "shape": [3, 2], "data_offsets": [4, 10]},
    "scaled_fp8": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [10, 12]},
    "img_in.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [12, 24]},
    "__metadata__": {"format": "pt", "modelspec.title": "flux"},
}
SAMPLE = {"file_name": "a.png", "text": "a cat", "seed": 3}
ENTRY = {"location": "model.onnx.data", "offset": "0", "length": "8"}
TARGET = (Path(targets.__file__).parent / "rtx.toml").read_text()
GRID = 'budget = 0.2\nreference = "a"\n[[rows]]\nname = "a"\nseeds = 2\nplan = { method = "koala" }\n'

hostile = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 1000, 1001, 65536, 10**9, 2**31, 2**63, 2**64, 10**400, -(10**30)]
        + [0.0, -0.0, 0.5, 1e-300, 1e300, -1e308, float("inf"), float("nan")]
        + ["", "..", "../x", "/etc/passwd", "a/../../b", "\0", "\x1b[31m", "[red]x[/red]", "<script>", "$x$", "x" * 300]
        + ["\ud800", "\u202e", "1e999", "nan", "attn", "U8", "F64", "C64", "F4", "BOOL"]
        + [[], {}, [[]], [None], {"": None}, [0], [[0, "attn"]], [[0, None]], ["diffusers"], [0, 2**63], [4, 2**61]]
    ),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 40), max_size=4),
)


@st.composite
def damaged(draw: st.DrawFn, *documents: Any) -> Any:
    """Draw a document with up to three of its parts replaced, removed, repeated or renamed."""
    root = {"": copy.deepcopy(draw(st.sampled_from(documents)))}
    for _ in range(draw(st.integers(1, 3))):
        owner: Any = root
        key: Any = ""
        while isinstance(owner[key], (dict, list)) and owner[key] and draw(st.integers(0, 3)):
            owner = owner[key]
            key = draw(st.sampled_from(list(owner) if isinstance(owner, dict) else range(len(owner))))
        kind = draw(st.integers(0, 9))
        if kind == 0 and key != "":
            del owner[key]
        elif kind == 1 and isinstance(owner, dict) and key != "":
            owner[draw(st.sampled_from(["..", "\x1b", "text_encoder/../x", "é", "a" * 100]))] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        else:
            owner[key] = copy.deepcopy(draw(hostile))  # the strategy's own list must stay as it is
        if not isinstance(root[""], (dict, list)):
            break
    return root[""]


@st.composite
def torn(draw: st.DrawFn, *contents: bytes) -> bytes:
    """Draw a file that is cut, or has some bytes replaced."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if not data or not draw(st.integers(0, 4)):
            del data[at:]
        else:
            data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(data)


def text_of(document: Any) -> bytes:
    """Return JSON as Python writes it, with NaN, infinities and lone surrogates."""
    return json.dumps(document).encode()


def safetensors(header: Any) -> bytes:
    """Return a safetensors file with this header and 24 zero bytes of data."""
    raw = text_of(header)
    return struct.pack("<Q", len(raw)) + raw + bytes(24)


def gguf(shape: tuple[int, ...] = (3, 2)) -> bytes:
    """Return a GGUF file of one F16 tensor of FLUX.1, whose own shape is in a field, with 24 zero bytes of data."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    name = b"double_blocks.0.img_attn.qkv.weight"
    fields = text(b"comfy.gguf.orig_shape." + name) + struct.pack(f"<IIQ{len(shape)}i", 9, 5, len(shape), *shape)
    fields += text(b"general.name") + struct.pack("<I", 8) + text(b"flux")
    tensor = text(name) + struct.pack("<IQIQ", 1, 6, 1, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + fields + tensor
    return header + bytes(-len(header) % 32) + bytes(24)


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def onnx_file(entry: Any) -> bytes:
    """Return an ONNX model of one tensor with this external data, encoded as protobuf."""
    pairs = entry.items() if isinstance(entry, dict) else [("location", entry)]
    written = [[str(x).encode("utf-8", "surrogatepass") for x in pair] for pair in pairs]
    tensor = b"".join(_field(13, _field(1, key[:100]) + _field(2, value[:1000])) for key, value in written)
    # field 7 graph, field 5 initializer; field 13 fits a byte: 13 << 3 | 2 is 106
    return _field(7, _field(5, _field(8, b"w") + tensor))


def _config(path: Path) -> None:
    config = json.loads(path.read_text())
    if isinstance(config, dict):
        family = family_of(config)
        family.tensor_shapes(config)
        contribution.parts(family, config)
        contribution.fingerprint(config)
        family.defaults(config, Hints())
        family.latents(config)
        family.text_widths(config)


def _plan(path: Path) -> None:
    plan = PrunePlan.load(path)
    assert plan.first_pruned <= plan.num_blocks == len(plan.kept) + len(plan.blocks)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json())), path) == plan


def _analysis(path: Path) -> None:
    report = ContributionReport.load(path)
    contributions = [*report.contributions().values(), *report.joint().values()]
    assert all(c.drop == c.drop and abs(c.drop) < 1e300 for c in contributions)


def _scheduler(path: Path) -> None:
    scheduler = FlowMatch.from_config(read_json(path))
    scheduler.sigmas(4, tokens=256)


def _index(path: Path) -> None:
    read_index(path.parent)
    assert all(name.isidentifier() for name in text_encoders(path.parent))


def _manifest(path: Path) -> None:
    from edgeprune.artefact.manifest import Manifest  # imports torch, which the other targets do not need

    manifest = Manifest.load(path.parent)
    manifest.prune_plan(path.parent)
    manifest.verify(path.parent, "transformer")


def _images(path: Path) -> None:
    for sample in read_samples(path.parent):
        assert sample.path.is_relative_to(path.parent.resolve())
        assert printable(sample.text).isprintable() or "\n" in sample.text


def _study(path: Path) -> None:
    study = design.read(path.parent)
    if study.per_rater < 100 and study.checks < 100:
        design.trials(study, 1)


def _weights(path: Path) -> None:
    from edgeprune.residency.weights import Weights

    Weights(path)


def _single(path: Path) -> None:
    from edgeprune.artefact.convert.opening import open_file

    source = open_file(path)
    assert source.text and "\n" not in source.command()
    for name, shape in source.stored.shapes.items():
        assert tuple(source.stored.read(name).shape) == shape


def _cache(path: Path) -> None:
    from edgeprune.data.cache import Index

    index = Index.load(path.parent)
    assert all(
        0 < shard.samples < 10**12 and Path(shard.file).name == shard.file for shard in index.shards if shard.sizes
    )
    index.check_made_by({"vae": "ab", "height": 64, "guidance_scale": 2.5}, path.parent)
    assert index.identity and sum(index.sizes.values()) == sum(shard.samples for shard in index.shards)


def _shard(path: Path) -> None:
    import torch

    from edgeprune.data.cache import mapped
    from edgeprune.data.pairs import Pairs

    (part,) = mapped(path, {"8x40": 1}, family_of(SHARD_OF), SHARD_OF)
    assert Pairs([part]).batch(2, 0.5, torch.Generator()).latents.shape == (2, 1, 1, 5)


def _grid(path: Path) -> None:
    from edgeprune.compare.grid import Grid
    from edgeprune.stages.options import CompressOptions

    grid = Grid.load(path, CompressOptions())
    assert sum(row.seeds for row in grid.rows) < 10**6


TARGETS: dict[str, tuple[str, st.SearchStrategy[bytes], Callable[[Path], object], int]] = {
    "plan": ("plan.json", damaged(PLAN).map(text_of), _plan, 14_000),
    "analysis": ("analysis.json", damaged(ANALYSIS, FIRST, SUMMARY).map(text_of), _analysis, 14_000),
    "manifest": ("edgeprune.json", damaged(MANIFEST).map(text_of), _manifest, 12_000),
    "json": ("plan.json", torn(text_of(PLAN), text_of(ANALYSIS)), _plan, 4_000),
    "config": ("config.json", damaged(*SMALL).map(text_of), _config, 12_000),
    "index": ("model_index.json", damaged(INDEX).map(text_of), _index, 8_000),
    "generation": ("generation.json", damaged(GENERATION).map(text_of), lambda p: Generation.load(p.parent), 6_000),
    "scheduler": ("scheduler_config.json", damaged(SCHEDULER).map(text_of), _scheduler, 6_000),
    "study": ("study.json", damaged(STUDY).map(text_of), _study, 4_000),
    "images": ("metadata.jsonl", damaged(SAMPLE).map(text_of), _images, 6_000),
    "header": ("model.safetensors", damaged(HEADER).map(safetensors), _weights, 10_000),
    "safetensors": ("model.safetensors", torn(safetensors(HEADER)), _weights, 4_000),
    "single": ("flux.safetensors", damaged(SINGLE).map(safetensors), _single, 6_000),
    "gguf": ("flux.gguf", torn(gguf(), gguf((2, 3))), _single, 6_000),
    "cache": ("cache.json", damaged(CACHE).map(text_of), _cache, 8_000),
    "shard": ("shard.safetensors", damaged(SHARD).map(safetensors), _shard, 6_000),
    "external": ("model.onnx", damaged(ENTRY).map(onnx_file), check_external, 6_000),
    "onnx": ("model.onnx", torn(onnx_file(ENTRY)), check_external, 4_000),
    "target": ("x.toml", torn(TARGET.encode()), lambda p: targets.parse("x", p.read_text(errors="replace")), 3_000),
    "grid": ("grid.toml", torn(GRID.encode()), _grid, 1_500),
}
"""By name: the file, its contents, its reader, and how many contents `make test-hard` tries."""


def attempts(name: str, examples: int, tried: Counts, folder: Path) -> Callable[[], None]:
    """Return a test of one target that tries `examples` contents of its file in `folder`."""
    file, contents, read, _ = TARGETS[name]
    path = folder / file
    (folder / "model.onnx.data").write_bytes(bytes(8))

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(contents)
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        tried[0][name] += 1
        try:
            read(path)
        except EdgepruneError as error:
            tried[1][name] += 1
            assert len(str(error)) < 5000, "the message is longer than a line"

    return attempt


def _try(name: str, examples: int, tried: Counts) -> None:
    with tempfile.TemporaryDirectory() as folder:
        attempts(name, examples, tried, Path(folder))()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "grid"])
def test_a_few(name: str, tried: Counts) -> None:
    _try(name, SHORT, tried)


@pytest.mark.hard
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str, tried: Counts) -> None:
    before = tried[0][name]
    _try(name, TARGETS[name][3], tried)
    assert tried[0][name] - before >= TARGETS[name][3] // 2, "hypothesis ran out of inputs"


def test_many_are_more_than_100_000() -> None:
    assert sum(count for *_, count in TARGETS.values()) >= 100_000


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "grid"])
def test_undamaged_files_are_read(name: str, tmp_path: Path) -> None:
    """Undamaged files must be readable, or the fuzzer would only see refusals."""
    documents = {
        "plan": PLAN, "analysis": ANALYSIS, "manifest": MANIFEST | {"files": {}}, "json": PLAN, "config": SMALL[0],
        "index": INDEX, "generation": GENERATION, "scheduler": SCHEDULER, "study": STUDY,
    }  # fmt: skip
    files = {"header": safetensors(HEADER), "safetensors": safetensors(HEADER), "target": TARGET.encode()}
    files |= {"single": safetensors(SINGLE), "gguf": gguf()}
    files |= {"cache": text_of(CACHE), "shard": safetensors(SHARD)}
    files |= {"external": onnx_file(ENTRY), "onnx": onnx_file(ENTRY), "images": text_of(SAMPLE)}
    (tmp_path / "model.onnx.data").write_bytes(bytes(8))
    path = tmp_path / TARGETS[name][0]
    path.write_bytes(files[name] if name in files else text_of(documents[name]))
    TARGETS[name][2](path)
