"""`edgeprune lora`: a file for the pruned model, or a new artefact with the LoRA in its weights and text encoders."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import pair
from safetensors.torch import load_file, save_file
from tiny import T5_WIDTH, TEXT_WIDTH, TOKENS, tiny_flux_pipeline, tiny_step
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.artefact.card import changes
from edgeprune.artefact.loading import load_packed, load_part, load_transformer
from edgeprune.artefact.manifest import Manifest
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.stages import encoders, merge, workspace
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import Workspace

FILE = "diffusion_pytorch_model.safetensors"
CLIP, T5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
NORM = "lora_unet_double_blocks_0_img_attn_norm_key_norm.diff"


@pytest.fixture(scope="module", autouse=True)
def any_error() -> Iterator[None]:
    """A T5's INT4 is kept whatever its error."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PROMPTS", 2), ("BOUND", 9.0), ("LEAST_COSINE", -1.0)):
            patch.setattr(encoders, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, an artefact of it with the second joint block removed, and LoRA files."""
    root = tmp_path_factory.mktemp("lora")
    tiny_flux_pipeline(root / "model")
    ws = Workspace(root / "small", str(root / "model"))
    run_plan(ws, api.PlanOptions(method="manual", blocks="1", components="2:norm"))
    run_prune(ws)
    run_quantize(ws, api.QuantizeOptions(group_size=32))
    encoders.run(ws, "int4", 32)
    del ws  # and its lock
    kohya = pair("lora_unet_double_blocks_0_img_attn_qkv", 192, 64)
    kohya |= pair("lora_unet_double_blocks_1_img_attn_qkv", 192, 64) | pair("lora_unet_img_in", 64, 32)
    kohya |= pair(f"lora_te1_text_model_{CLIP.replace('.', '_')}", 32, 32)
    save_file(kohya, root / "style.safetensors")
    more = pair(f"lora_te3_{T5.replace('.', '_')}", 32, 96) | pair("lora_unet_single_blocks_0_modulation_lin", 192, 64)
    save_file(kohya | more | {NORM: torch.ones(32) / 8}, root / "more.safetensors")
    return root


def run(*words: Any) -> Any:
    from edgeprune.cli import app

    return CliRunner().invoke(app, ["lora", *map(str, words)])


def difference(file: Path, layer: str) -> torch.Tensor:
    tensors = load_file(file)
    up, down, alpha = (tensors[f"{layer}.{n}"] for n in ("lora_up.weight", "lora_down.weight", "alpha"))
    return up @ down * alpha / len(down)


def drawn(model: Any) -> torch.Tensor:
    """Evaluate the transformer of `tiny_flux_pipeline`, whose text is of T5's width."""
    latents, _, sigmas, guidance = tiny_step()
    g = torch.Generator().manual_seed(2)
    text = Conditioning(torch.randn(2, TOKENS, T5_WIDTH, generator=g), torch.randn(2, TEXT_WIDTH, generator=g))
    with torch.no_grad():
        return velocity(model, latents, text, sigmas, guidance)


def test_a_file_for_the_artefact(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "style.safetensors", "--model", folder / "small", "-o", tmp_path / "new.safetensors", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tensors"] == 12 and told["counts"] == {"kept": 9, "changed": 0, "gone": 3, "unused": 0}
    assert set(told["gone"].values()) == {"block 1 is removed"} and told["kept"]["x_embedder"] == "x_embedder"
    assert "12: 9 kept, 3 gone" in done.output
    written = load_file(tmp_path / "new.safetensors")
    assert f"text_encoder.text_model.{CLIP}.lora_A.weight" in written and len(written) == 10
    expected = difference(folder / "style.safetensors", "lora_unet_img_in")
    up, down = (written[f"transformer.x_embedder.lora_{n}.weight"] for n in ("B", "A"))
    torch.testing.assert_close(up @ down, expected)


def test_t5_and_norms_need_merging(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "more.safetensors", "--model", folder / "small", "-o", tmp_path / "new.safetensors")
    assert done.exit_code == 2 or isinstance(done.exception, InputError)
    text = str(done.exception)
    for part in (
        "layers of text_encoder_2 ('lora_te3_",
        f"differences of norms ('{NORM}')",
        "only the bias is left",
        "--merge",
    ):
        assert part in text
    assert not (tmp_path / "new.safetensors").exists()


def test_merging(folder: Path, tmp_path: Path) -> None:
    """Half-precision weights, INT4 weights and text encoders hold the LoRA; the old artefact is untouched."""
    small, out, file = folder / "small", tmp_path / "styled", folder / "more.safetensors"
    before = {path: path.read_bytes() for path in small.rglob("*.safetensors")}
    done = run(file, "--model", small, "-o", out, "--merge", "--scale", "0.5", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["changed"] == {"single_transformer_blocks.0.norm.linear": "constant modulation: folded into its bias"}
    assert sum(told["counts"].values()) == told["tensors"] == 19
    old, new = Weights(small / "transformer"), Weights(out / "transformer")
    expected = {
        "x_embedder.weight": difference(file, "lora_unet_img_in"),
        "transformer_blocks.0.attn.to_k.weight": difference(file, "lora_unet_double_blocks_0_img_attn_qkv")[64:128],
        "transformer_blocks.0.attn.norm_k.weight": torch.ones(32) / 8,
    }
    for name, change in expected.items():
        torch.testing.assert_close(new[name].float(), old[name].float() + change / 2, rtol=1e-3, atol=1e-6)  # rounded
    changed = {name for name in old.shapes if not torch.equal(old[name], new[name])}
    queries = {f"transformer_blocks.0.attn.to_{n}.weight" for n in "qv"}
    assert changed == {*expected, *queries, "single_transformer_blocks.0.norm.linear.bias"}
    for encoder, layer, name in (
        ("text_encoder", CLIP, f"lora_te1_text_model_{CLIP.replace('.', '_')}"),
        ("text_encoder_2", T5, f"lora_te3_{T5.replace('.', '_')}"),
    ):
        was, now = (load_file(root / encoder / "model.safetensors") for root in (small, out))
        stored = next(n for n in was if n.endswith(f"{layer}.weight"))  # versions of transformers prefix it or not
        added = (was[stored].float() + difference(file, name) / 2).half()
        torch.testing.assert_close(now[stored], added, rtol=1e-3, atol=1e-6)
        assert {n for n in was if not torch.equal(was[n], now[n])} == {stored}
    int4, merged, original = (
        load_packed(out / "text_encoder_2", "T5EncoderModel"),
        *(load_part(root / "text_encoder_2", "T5EncoderModel") for root in (out, small)),
    )
    found, styled, plain = (model.get_submodule(T5).weight for model in (int4, merged, original))
    assert (found - styled).norm() < (found - plain).norm() / 2
    assert before == {path: path.read_bytes() for path in small.rglob("*.safetensors")}
    packed, whole = (load_transformer(out, quantized=quantized) for quantized in (True, False))
    styled, plain = drawn(whole), drawn(load_transformer(small, quantized=False))
    assert (drawn(packed) - styled).norm() < (plain - styled).norm() / 2
    manifest = Manifest.load(out)
    assert manifest.encoders == "int4" and manifest.files["text_encoder_2_int4/model.safetensors"]
    assert manifest.group_size == 32 and manifest.loras[0]["scale"] == 0.5
    assert manifest.loras[0]["parts"] == ["text_encoder", "text_encoder_2", "transformer"]
    card = changes(manifest, manifest.prune_plan(out))
    assert "LoRAs merged into the weights and text encoders: more.safetensors (scale 0.5)." in card
    assert card[-1] == "Tokenizers, VAE and scheduler are those of the original."


def test_a_merged_folder_is_not_merged_again(folder: Path, tmp_path: Path) -> None:
    small, out, file = folder / "small", tmp_path / "styled", folder / "style.safetensors"
    assert api.merge_lora(file, small, out).ran
    weights = (out / "transformer" / FILE).read_bytes()
    assert not api.merge_lora(file, small, out).ran and (out / "transformer" / FILE).read_bytes() == weights
    for words in ({"scale": 2.0}, {"file": folder / "more.safetensors"}):
        with pytest.raises(StaleStageError, match="is another artefact than"):
            api.merge_lora(**({"file": file, "model": small, "out": out} | words))  # type: ignore[arg-type]
    for fresh in (False, True):
        with pytest.raises(StaleStageError, match="has a LoRA merged into its weights; plan in the folder that it"):
            api.plan(out, api.PlanOptions(method="manual", blocks="0"), fresh=fresh)
        with pytest.raises(StaleStageError, match="has a LoRA merged into its weights; distill in the folder that it"):
            api.distill(out, api.DistillOptions(steps=1, sensitivity="off"), api.DataOptions("captions"), fresh=fresh)
    assert not api.prune(out).ran and not api.quantize(out, api.QuantizeOptions(group_size=32)).ran
    with pytest.raises(InputError, match="-o .*small: is --model itself"):
        api.merge_lora(file, small, small)


def test_a_second_lora_is_added_to_the_first(folder: Path, tmp_path: Path) -> None:
    small, file = folder / "small", folder / "style.safetensors"
    api.merge_lora(file, small, tmp_path / "one")
    api.merge_lora(file, tmp_path / "one", tmp_path / "two", scale=-1.0)
    assert [lora["scale"] for lora in Manifest.load(tmp_path / "two").loras] == [1.0, -1.0]
    name = "x_embedder.weight"
    was, one, two = (
        Weights(root / "transformer")[name].float() for root in (small, tmp_path / "one", tmp_path / "two")
    )
    assert (one - was).abs().max() > 0.1 and (two - was).abs().max() < 2e-3


def test_a_killed_merge_resumes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, small = folder / "style.safetensors", folder / "small"
    api.merge_lora(file, small, tmp_path / "whole")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge.lora_encoders, "merge", killed)
        api.merge_lora(file, small, tmp_path / "killed")
    assert api.merge_lora(file, small, tmp_path / "killed").ran
    for part in ("transformer", "transformer_int4", "text_encoder"):
        for path in (tmp_path / "whole" / part).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "killed" / part / path.name).read_bytes()


def test_merging_is_refused_where_it_takes_too_long(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages of INT4, before weights are written; `--yes` and `--device` reach them."""
    asked, out, file = list[tuple[str, int | None, float | None]](), tmp_path / "styled", folder / "style.safetensors"
    words = [file, "--model", folder / "small", "-o", out, "--merge", "--device", "cpu"]
    monkeypatch.setattr(workspace, "least", lambda *_: Speeds(1e6, flops=1e-3))
    for said in ("quantize: at least", "encoders: at least"):
        if said.startswith("encoders"):
            monkeypatch.setattr(merge.quantize, "check_time", lambda *_, **__: None)
        for more in ((), ("--time", "2h")):
            refused = run(*words, *more)
            assert str(refused.exception).startswith(said) and "--yes runs it anyway" in str(refused.exception)
        assert not list(out.glob("t*/*"))
    refused = run(*words, "--memory", "10MB")
    assert str(refused.exception).startswith("--memory: found 0.01 GB") and not list(out.glob("t*/*"))

    def written(ws: Workspace, *_: Any) -> None:
        asked.append((str(ws.original.compute.device), ws.original.compute.memory, ws.longest_s))
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_write", written)
    run(*words, "--yes", "--memory", "9GB")
    assert asked == [("cpu", 9 * 10**9, None)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "new"), "expected a file whose name ends in .safetensors; with --merge, a folder"),
        (("-o", "new.safetensors", "--merge"), "expected a folder, which --merge creates"),
        (("-o", "new.safetensors", "--scale", "2"), "--scale: needs --merge"),
        (("-o", "new.safetensors", "--device", "cpu"), "--device, --memory, --yes, --time: are about what --merge"),
        (("-o", "new.safetensors", "--yes"), "--device, --memory, --yes, --time: are about what --merge"),
        (("-o", "new", "--merge", "--scale", "nan"), "--scale: found nan, expected a finite number"),
    ],
)
def test_wrong_options(folder: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    where = [str(tmp_path / word) if word.startswith("new") else word for word in words]
    done = run(folder / "style.safetensors", "--model", folder / "small", *where)
    assert message in str(done.exception) and not list(tmp_path.iterdir())
