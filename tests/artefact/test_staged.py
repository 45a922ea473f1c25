"""Parts of a pipeline in memory one after the other: the same numbers as all at once, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from edgeprune.artefact import encoder_layers
from edgeprune.artefact.loading import load, open_transformer
from edgeprune.artefact.staged import StagedPipeline, can_stage
from edgeprune.artefact.text_store import TextStore
from edgeprune.common.files import sha256_file
from edgeprune.families.encoders import CLIP, CLIP_POOLED, T5, text_encoders
from edgeprune.residency.compute import Compute
from edgeprune.residency.streaming import is_streamed
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import Conditioning, encode_pooled, encode_prompts, evaluate, generate
from edgeprune.sampling.generation import Generation
from edgeprune.stages.costs import sample

PROMPTS = ["a red circle", "", "two stars"]


# FLUX has the encoders of an SD3 with T5; families/test_klein.py encodes with klein's.
@pytest.fixture(
    scope="module",
    params=["sd3", "sd3 with T5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "klein"))],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("staged") / "tiny"
    if request.param == "flux":
        tiny.tiny_flux_pipeline(out)
    elif request.param == "klein":
        tiny.tiny_klein_pipeline(out, distilled=False)
    else:
        tiny.tiny_pipeline(out, t5=request.param != "sd3")
    return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the path and name of every tensor that is read."""
    seen, real = list[str](), Weights.__getitem__

    def counted(self: Weights, name: str) -> torch.Tensor:
        seen.append(f"{self.folder.name}/{name}")
        return real(self, name)

    monkeypatch.setattr(Weights, "__getitem__", counted)
    return seen


def staged(folder: Path, **options: Any) -> StagedPipeline:
    return StagedPipeline(folder, open_transformer(folder, quantized=False).running(), Compute(), **options)


def test_what_a_killed_process_left_of_a_prompt_goes(tmp_path: Path) -> None:
    kept = tmp_path / "text_encoder" / "a.safetensors"
    (kept.parent / "a.77.tmp.partial").mkdir(parents=True)
    for path in (kept, kept.with_name("a.78.tmp")):
        path.write_bytes(b"")
    TextStore(tmp_path, tmp_path, None, str).tidy()
    assert list(kept.parent.iterdir()) == [kept]


def test_text_and_images_are_those_of_diffusers(folder: Path) -> None:
    whole, parts, generation = load(folder), staged(folder), Generation.load(folder)
    assert can_stage(folder)
    expected = encode_prompts(whole, PROMPTS, generation.max_sequence_length)
    found = encode_prompts(parts, PROMPTS, generation.max_sequence_length)
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.pooled, expected.pooled)
    assert torch.equal(encode_pooled(parts, PROMPTS, 0), expected.pooled)
    drawn = [generate(pipe, PROMPTS[::2], [1, 2], generation) for pipe in (whole, parts)]
    assert np.array_equal(*drawn)


def test_pooled_text_reads_only_clips(folder: Path, reads: list[str]) -> None:
    pipe, clips = staged(folder), {CLIP, CLIP_POOLED} & {*text_encoders(folder).values()}
    reads.clear()
    pipe.pooled(PROMPTS)
    assert bool(reads) == bool(clips) and not any("SelfAttention" in name for name in reads)


def test_a_prompt_is_encoded_once_for_all_processes(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    texts: Callable[[], TextStore] = lambda: TextStore(tmp_path, folder, None, sha256_file)  # noqa: E731
    length = Generation.load(folder).max_sequence_length
    first = staged(folder, texts=texts()).encode(PROMPTS, length)
    reads.clear()
    again = staged(folder, texts=texts()).encode(PROMPTS[::-1], length)
    assert not any(name.startswith("text_encoder") for name in reads)
    assert torch.equal(again[0], first[0].flip(0)) and torch.equal(again[1], first[1].flip(0))
    (path, *_) = sorted(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])  # as of a full disk: encoded again, not an error
    assert torch.equal(staged(folder, texts=texts()).encode(PROMPTS, length)[0], first[0])
    load_file(path)
    other = TextStore(tmp_path, folder, None, lambda file: sha256_file(file)[::-1])  # another encoder's files
    assert other.key("text_encoder", "a", 77, torch.float32) != texts().key("text_encoder", "a", 77, torch.float32)


def test_few_prompts_are_in_a_layer_that_is_read_once_for_all(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five prompts, two at a time; and where the memory is short, one after the other."""
    prompts, length = ["a", "two stars", "a ring", "", "a red circle"], Generation.load(folder).max_sequence_length
    whole, seen, real = staged(folder).encode(prompts, length), list[int](), StagedPipeline._streamed

    def streamed(*arguments: Any, **options: Any) -> Any:
        encoder = real(*arguments, **options)
        for name, module in encoder.named_modules():
            if name.endswith((".layer_norm1", ".layer.0.layer_norm", ".input_layernorm")):
                module.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
        return encoder

    monkeypatch.setattr(StagedPipeline, "_streamed", streamed)
    for limit, expected in (({"AT_ONCE": 2}, [2, 2, 1]), ({"_MOST_BYTES": 0}, [1] * 5)):
        with monkeypatch.context() as patch:
            for name, value in limit.items():
                patch.setattr(encoder_layers, name, value)
            # What waits between two layers always fits: at first, and again whenever that is asked.
            patch.setattr(encoder_layers, "spare", lambda *_: 10**12)
            pipe = staged(folder)
            reads.clear()
            found = pipe.encode(prompts, length)
        assert seen and seen == expected * (len(seen) // len(expected))
        seen.clear()
        assert {Counter(reads)[name] for name in reads if name.startswith("text_encoder")} == {1}
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_prompts_that_do_not_fit_together_read_the_layers_again(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = Generation.load(folder).max_sequence_length
    whole = staged(folder).encode(PROMPTS, length)
    monkeypatch.setattr(encoder_layers, "spare", lambda *_: 0)
    pipe = staged(folder)
    reads.clear()
    found = pipe.encode(PROMPTS, length)
    layers = {Counter(reads)[n] for n in reads if n.startswith("text_encoder") and (".layers." in n or ".block." in n)}
    assert layers == {len(PROMPTS)}
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_prompt_of_t5_xxl_in_a_layer() -> None:
    """What a layer of T5-XXL takes for a prompt of 256 tokens: scores of 64 heads, and five times its inner width."""
    config, stream = SimpleNamespace(d_model=4096, num_heads=64, d_ff=10240), torch.empty(100, 256, 4096, device="meta")
    one = 4 * 256 * (3 * 64 * 256 + 5 * 10240 + 6 * 4096)
    assert 120e6 < one < 130e6
    for memory, expected in ((2 * one, 1), (8 * one, 1), (24 * one, 3), (None, 7), (10**12, 64)):
        assert encoder_layers.rows_of(T5, config, Compute(memory=memory))(stream) == expected


def test_encoders_stay_for_many_batches(folder: Path, reads: list[str]) -> None:
    pipe = staged(folder).apart(hold=True)
    length = Generation.load(folder).max_sequence_length
    pipe.encode(PROMPTS, length)
    reads.clear()
    pipe.encode(["another"], length)
    assert not any(name.startswith("text_encoder") for name in reads)


def test_blocks_are_read_when_they_run_unless_they_are_kept(folder: Path, reads: list[str]) -> None:
    stored = open_transformer(folder, quantized=False)
    family, whole = stored.family, open_transformer(folder, quantized=False).load()
    generation, draw = Generation.load(folder), torch.Generator().manual_seed(0)
    latents, text, sigma, guidance = sample(family, dict(whole.config), folder, generation)
    noisy = (
        torch.randn(latents.shape, generator=draw),
        Conditioning(*(torch.randn(part.shape, generator=draw) for part in (text.hidden, text.pooled))),
        sigma + 0.5,
        guidance,
    )
    with torch.no_grad():
        expected = evaluate(whole, *noisy)
    sizes = [sum(t.nbytes for t in block.state_dict().values()) for block in family.blocks(whole)]
    for kept in (0, 1, len(sizes)):
        model = stored.running(keep=sum(sizes[:kept]) // 2)  # the files are in half precision
        blocks = family.blocks(model)
        reads.clear()
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(evaluate(model, *noisy), expected)
        assert all(is_streamed(block) for block in blocks)
        assert all(tensor.is_meta for block in blocks for tensor in block.state_dict().values())
        assert len(reads) == 2 * sum(len(block.state_dict()) for block in blocks[kept:])


def test_all_of_an_encoder_is_on_the_device_that_computes(folder: Path) -> None:
    """With meta as the second device: what stayed with the processor would be found by its kind."""
    pipe = StagedPipeline(folder, None, Compute(torch.device("meta")))
    for name, kind in text_encoders(folder).items():
        encoder = pipe._streamed(name, kind, torch.float32)
        tensors = [*encoder.parameters(), *encoder.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}, name


def test_several_processes_may_encode_the_same_prompt(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from edgeprune.artefact.text_store import TextStore\n"
        "store = TextStore(Path(sys.argv[1]), Path('model'), None, lambda file: 'x')\n"
        "for _ in range(60): store.put('a.safetensors', {'x': torch.ones(1000)})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in running] == [("", 0)] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
