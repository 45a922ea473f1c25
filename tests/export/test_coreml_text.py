"""A T5 and a Qwen3 as chunks of Core ML packages: equal to the whole, weights of one in memory at a time, resumable."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import T5Config, T5EncoderModel

from edgeprune.common.files import sha256_file
from edgeprune.export import coreml_packages, coreml_text, mil_conversion, modules, parity, to_coreml
from edgeprune.export.coreml_packages import Chain
from edgeprune.export.mil_reference import Package
from edgeprune.export.stored_qwen3 import StoredQwen3
from edgeprune.export.stored_t5 import StoredT5
from edgeprune.quantization.precision import text_precision_of
from edgeprune.quantization.text import prepare_text_encoder

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
VOCAB, TOKENS, LAYERS = 300, 9, 3
Convert = Callable[..., Any]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredT5:
    folder = tmp_path_factory.mktemp("t5") / "text_encoder_3"
    tiny.tiny_t5(VOCAB, layers=LAYERS).half().save_pretrained(folder)
    return StoredT5(folder)


def example(stored: StoredT5, seed: int = 0) -> dict[str, torch.Tensor]:
    return stored.empty().example(batch=1, tokens=TOKENS, seed=seed)


def layers_of(chunk: coreml_text.TextChunk) -> list[str]:
    return list(getattr(chunk, chunk.place)[chunk.stack])


def test_chunks_have_as_many_bytes_as_asked_for(stored: StoredT5) -> None:
    """The table of words counts; each has a layer at least."""
    layer = sum(t.nbytes for t in stored.empty().model.encoder.block[1].state_dict().values())
    table, first = 2 * VOCAB * tiny.T5_WIDTH, layer + 4 * 32 * 2  # with the biases by bucket
    cut = {most: [layers_of(c) for c in coreml_text.split(stored, most)] for most in (1, table + first, 10**9)}
    assert 2 * layer < table + first < 3 * layer
    assert list(cut.values()) == [[["0"], ["1"], ["2"]], [["0"], ["1", "2"]], [["0", "1", "2"]]]
    assert all(t.is_meta for c in coreml_text.split(stored, 1) for t in c.state_dict().values())


def test_t5_xxl_is_thirteen_packages() -> None:
    """The figures of docs/coreml.md."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
    whole: Any = SimpleNamespace(empty=lambda: modules.T5Encoder(prepare_text_encoder(model, text_precision_of)))
    chunks = coreml_text.split(whole, to_coreml.CHUNK_BYTES)
    held = [sum(t.nbytes for n, t in c.state_dict().items() if "embed" not in n) for c in chunks]
    held[0] += 2 * 32128 * 4096
    assert len(chunks) == 13 and round(held[0] / 1e6) == 456 and max(held[1:]) < 390e6


class Watched:
    """Converts, and notes of what; checks that no other chunk's weights, nor what was made of them, are in memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.converted = list[list[str]]()
        self.copies = list[Path]()
        self._weights, self._made = list[tuple[weakref.ref[Any], int]](), list[weakref.ref[Any]]()
        self._convert, self._read = coreml_packages.convert, StoredT5.read
        patch.setattr(coreml_packages, "convert", self.convert)
        patch.setattr(StoredT5, "read", lambda stored, *given: self.read(stored, *given))

    def read(self, stored: StoredT5, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._read(stored, name, dtype)
        if name.endswith("weight_packed"):
            self._weights.append((weakref.ref(tensor), tensor.nbytes))
        return tensor

    def convert(self, module: coreml_text.TextChunk, *given: Any, **how: Any) -> Any:
        own = sum(t.nbytes for n, t in module.state_dict().items() if n.endswith("weight_packed"))
        alive = sum(size for reference, size in self._weights if reference() is not None)
        assert 0 < own == alive and not [made for made in self._made if made() is not None]
        self.converted.append(layers_of(module))
        model = self._convert(module, *given, **how)
        self.copies.append(Path(model.package_path))
        self._made += [weakref.ref(model), weakref.ref(model._mil_program.functions["main"])]
        return model


@pytest.fixture(scope="module")
def chunks(stored: StoredT5, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A package for each layer, by a run that was killed after the second."""
    folder, parts = tmp_path_factory.mktemp("chunks"), coreml_text.split(stored, 1)

    def run(progress: Any) -> dict[str, Any]:
        return coreml_packages.convert_network(
            "t5", coreml_text.loaded(parts, stored), stored.checkpoint(), [example(stored)], folder,
            chunks=len(parts), half=False, progress=progress,
        )  # fmt: skip

    def killed(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if (what, done) == ("t5: converted", 2):
            raise KeyboardInterrupt

    def hashes() -> dict[Path, str]:
        return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}

    gc.disable()  # otherwise it may do, by chance, what the code has to ask for
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as then:
        then.callback(gc.enable)
        patch.setattr(mil_conversion, "LARGEST_CONSTANT", 100)
        watched = Watched(patch)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
        kept = hashes()
        assert watched.converted == [["0"], ["1"]] and len({path.relative_to(folder).parts[0] for path in kept}) == 2
        record = run(lambda *_: None)
    assert watched.converted == [["0"], ["1"], ["2"]] and kept.items() < hashes().items()
    assert len(watched.copies) == LAYERS and not [copy for copy in watched.copies if copy.exists()]
    assert all(t.is_meta for part in parts for t in part.state_dict().values())
    assert record["max_relative"] < 1e-5
    return [folder / f"chunk_{i}.mlpackage" for i in range(1, LAYERS + 1)]


def test_they_compute_what_the_whole_computes(stored: StoredT5, chunks: list[Path], tmp_path: Path) -> None:
    coreml_packages.convert_network(
        "t5", coreml_text.loaded(coreml_text.split(stored, 10**9), stored), stored.checkpoint(), [example(stored)],
        tmp_path, half=False,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    feeds = {"input_ids": example(stored, seed=3)["input_ids"].numpy()}
    (whole,) = Chain([tmp_path / "model.mlpackage"]).run(None, feeds)
    opened = list[weakref.ref[Package]]()

    def alone(path: Path) -> Package:
        assert not [package for package in opened if package() is not None]
        package = Package(path)
        opened.append(weakref.ref(package))
        return package

    (found,) = Chain(chunks, alone).run(None, feeds)
    assert parity.relative_error(found, whole)[0] < 1e-5 and len(opened) == LAYERS


def test_what_passes_between_them(chunks: list[Path]) -> None:
    """The stream, in float32; each chunk looks its position biases up in the table."""
    packages = [Package(path) for path in chunks]
    assert [package.inputs for package in packages] == [["input_ids"], ["text_stream_1"], ["text_stream_2"]]
    assert [package.outputs for package in packages] == [["text_stream_1"], ["text_stream_2"], ["last_hidden_state"]]
    for package, lookups in zip(packages, (2, 1, 1), strict=True):
        kinds = {o.name: o.type.tensorType for op in package.operations if op.type == "const" for o in op.outputs}
        shapes = [[d.constant.size for d in kind.dimensions] for kind in kinds.values()]
        assert [257, 2] in shapes and [1, 2, TOKENS, TOKENS] not in shapes
        assert sum(op.type == "gather" for op in package.operations) == lookups
        described = [*package.spec.description.input, *package.spec.description.output]
        streams = {v.type.multiArrayType.dataType for v in described if v.name.startswith("text_stream_")}
        assert streams == {0x10000 | 32}  # float32


@pytest.mark.slow  # above, a T5
def test_qwen3_in_chunks_returns_each_state_that_is_read(tmp_path: Path) -> None:
    """No chunk ends with one, as it would be what passes on, too; every chunk reads the mask."""
    tiny.tiny_qwen3(VOCAB, layers=5).half().save_pretrained(tmp_path / "text_encoder")
    qwen = StoredQwen3(tmp_path / "text_encoder", states=(1, 4))
    inputs = qwen.empty().example(batch=2, tokens=TOKENS)
    given = {name: value[1:] for name, value in inputs.items()}  # a row with padding
    assert 0 < given["attention_mask"].sum() < TOKENS
    parts = coreml_text.split(qwen, 1)
    record = coreml_packages.convert_network(
        "qwen3", coreml_text.loaded(parts, qwen), qwen.checkpoint(), [given], tmp_path, chunks=len(parts), half=False
    )
    assert record["max_relative"] < 1e-5
    paths = [tmp_path / f"chunk_{i}.mlpackage" for i in (1, 2, 3)]
    assert [package.inputs for package in map(Package, paths)] == [
        ["input_ids", "attention_mask"], ["text_stream_1", "attention_mask"], ["text_stream_2", "attention_mask"]
    ]  # fmt: skip
    assert [layers_of(part) for part in parts] == [["0", "1"], ["2"], ["3"]]
    outputs = [["hidden_states_1", "text_stream_1"], ["text_stream_2"], ["hidden_states_4"]]
    assert [package.outputs for package in map(Package, paths)] == outputs
    feeds = {name: value.numpy() for name, value in given.items()}
    found = Chain(paths).run(["hidden_states_1", "hidden_states_4"], feeds)
    with torch.no_grad():
        expected = qwen.checkpoint().reference(**given)
    for a, b in zip(found, expected, strict=True):
        assert parity.relative_error(a, b.numpy())[0] < 1e-5
    everything = Chain(paths).run(["hidden_states_4"], feeds | {"attention_mask": feeds["attention_mask"] * 0 + 1})[0]
    assert parity.relative_error(everything, found[1])[0] > 1e-2
