"""`verify`: a good model passes; whatever is broken fails the check that is about it, and no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.models.autoencoders.vae import Decoder
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.api.verifying import Verified
from edgeprune.artefact import staged
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.planning.options import PlanOptions
from edgeprune.quantization import int4
from edgeprune.residency.compute import Compute
from edgeprune.residency.weights import Weights
from edgeprune.sampling import latents
from edgeprune.sampling.generation import GenerationOptions
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace
from edgeprune.verify import checks, reference, subject
from edgeprune.verify.checks import CHECKS
from edgeprune.verify.peaks import Peak, watched

TRAINED = BUILTIN / "vae"
"""A VAE that was trained, for pipelines of random weights."""


def with_trained_vae(out: Path) -> Path:
    """Replace a pipeline's VAE."""
    shutil.rmtree(out / "vae")
    return Path(shutil.copytree(TRAINED, out / "vae").parent)


def trained_vae_flux2(out: Path) -> None:
    """Write the trained VAE as FLUX.2's class, whose latents are normalised by statistics."""
    AutoencoderKLFlux2.from_config(  # its own class name would be another one's
        json.loads((TRAINED / "config.json").read_text()) | {"_class_name": "AutoencoderKLFlux2"}
    ).save_pretrained(out)
    path = out / "diffusion_pytorch_model.safetensors"
    statistics = {"bn.running_mean": torch.linspace(-1, 1, 32), "bn.running_var": torch.linspace(0.3, 3, 32)}
    save_file(load_file(next(TRAINED.glob("*.safetensors"))) | statistics, path)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Z-Image that is guided; use `copytree` to change it."""
    out = tmp_path_factory.mktemp("verify") / "z-image"
    with tiny.shallow_z_image():
        tiny.tiny_z_image_pipeline(out, guided=True, layers=2)
        yield with_trained_vae(out)


@pytest.fixture(scope="module", params=["sd3 with T5", "flux", "klein", "z-image"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "z-image":
        return Path(request.getfixturevalue("z_image"))
    out = tmp_path_factory.mktemp("verify") / request.param.split()[0]
    if request.param == "klein":
        tiny.tiny_klein_pipeline(out, distilled=False)
        trained_vae_flux2(out / "vae")
        return out
    if request.param == "flux":
        tiny.tiny_flux_pipeline(out)
    else:
        tiny.tiny_pipeline(out, t5=True)
    return with_trained_vae(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD3 without T5; use `copy` to change it."""
    out = tmp_path_factory.mktemp("verify") / "small"
    tiny.tiny_pipeline(out)
    return with_trained_vae(out)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    """A FLUX.2 klein to change."""
    tiny.tiny_klein_pipeline(tmp_path / "klein")
    trained_vae_flux2(tmp_path / "klein" / "vae")
    return tmp_path / "klein"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 without a block and parts of others, projected, in half precision and INT4."""
    place = tmp_path_factory.mktemp("verify")
    tiny.tiny_flux_pipeline(place / "flux")
    with_trained_vae(place / "flux")
    ws = Workspace(place / "made", str(place / "flux"))
    run_plan(ws, PlanOptions(method="manual", blocks="3", components="1:attn,4:mlp", modulation_rank=8))
    run_prune(ws)
    run_quantize(ws, QuantizeOptions())
    return ws.out


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models leave nothing behind that is worth half a second."""
    monkeypatch.setattr(Compute, "collect", lambda self: None)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves out all checks but these and that of the files, which saves seconds."""
    return lambda *names: monkeypatch.setattr(checks, "CHECKS", ("files", *names))


def failed(found: Verified) -> set[tuple[str, str]]:
    return {(f.check, f.part) for f in found.findings if f.verdict == "fail"}


def change(part: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a part's file."""
    (path,) = part.glob("*.safetensors")
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def misread(monkeypatch: pytest.MonkeyPatch, *wrong: str) -> None:
    """Let edgeprune alone read these tensors upside down."""
    real = Weights.__getitem__

    def read(self: Weights, name: str) -> torch.Tensor:
        tensor = real(self, name)
        return tensor.flip(0) if f"{self.folder.name}/{name}" in wrong else tensor

    monkeypatch.setattr(Weights, "__getitem__", read)


# ------------------------------------------------------------------------------------- good models


def test_a_good_model_passes(folder: Path) -> None:
    found = api.verify(folder)
    assert found.passed and {f.verdict for f in found.findings} == {"pass"}
    assert [*dict.fromkeys(f.check for f in found.findings)] == list(CHECKS)
    text = ["hidden"] if folder.name in ("klein", "z-image") else ["hidden", "pooled"]
    assert [f.part for f in found.findings if f.check == "text"] == text
    encoders = sorted(path.name for path in folder.glob("text_encoder*"))
    assert [f.part for f in found.findings if f.check == "encoders"] == encoders
    assert [f.part for f in found.findings if f.check == "overflow"] == [*encoders, "transformer", "vae"]
    assert all(f.figure < 1e-5 for f in found.findings if f.measure == "relative error" and f.figure is not None)


@pytest.mark.parametrize(
    "folder",
    ["sd3 with T5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flux", "klein", "z-image"))],
    indirect=True,
)
def test_half_precision_within_memory(folder: Path) -> None:
    found = api.verify(folder, dtype="bf16", compute=ComputeOptions("cpu", 8 * 10**9))
    errors = [f for f in found.findings if f.measure == "relative error"]
    assert found.passed
    assert all(f.dtype == "bf16" and f.figure is not None and 1e-4 < f.figure < 0.03 for f in errors)


def test_an_artefact_passes_in_half_precision_and_in_int4(artefact: Path) -> None:
    found = api.verify(artefact)
    assert found.passed
    steps = {f.part: f.figure for f in found.findings if f.check == "step"}
    assert steps.keys() == {"transformer", "transformer_int4"} and max(filter(None, steps.values()), default=0) < 1e-5


# ------------------------------------------------------------------------------------- broken ones


def test_a_tensor_that_is_misread_is_found(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1.weight")
    misread(monkeypatch, "transformer/transformer_blocks.1.attn.to_k.weight", "/".join(encoder))
    text = {("text", "hidden"), ("text", "pooled"), ("encoders", encoder[0])}
    assert failed(api.verify(small)) == text | {("step", "transformer")}


def test_a_layer_of_qwen3_that_is_misread_is_found(
    klein: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("text", "encoders")
    misread(monkeypatch, "text_encoder/model.layers.20.mlp.up_proj.weight")  # read by one state of three
    assert failed(api.verify(klein)) == {("text", "hidden"), ("encoders", "text_encoder")}


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image whose VAE was not trained."""
    out = tmp_path_factory.mktemp("verify") / "qwen-image"
    tiny.tiny_qwen_image_pipeline(out, num_layers=2)
    (out / "synth.json").write_text("{}")
    return out


def test_a_good_qwen_image_passes(qwen_image: Path) -> None:
    found = api.verify(qwen_image)
    assert found.passed and [f.check for f in found.findings if f.verdict == "not judged"] == ["vae"]
    assert {(f.check, f.part) for f in found.findings} >= {("text", "hidden"), ("step", "transformer")}


@pytest.mark.parametrize(
    ("tensor", "check"),
    [
        ("text_encoder/model.layers.1.mlp.up_proj.weight", ("encoders", "text_encoder")),
        ("transformer/transformer_blocks.1.img_mod.1.bias", ("step", "transformer")),
    ],
)
def test_a_tensor_of_qwen_image_that_is_misread_is_found(
    qwen_image: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], tensor: str, check: tuple[str, str]
) -> None:
    only(check[0])
    misread(monkeypatch, tensor)
    assert check in failed(api.verify(qwen_image))


@pytest.mark.parametrize(
    ("tensor", "check"),
    [
        ("transformer/context_refiner.0.attention.to_k.weight", ("step", "transformer")),
        ("text_encoder/model.layers.0.mlp.up_proj.weight", ("encoders", "text_encoder")),
    ],
)
def test_a_tensor_of_z_image_that_is_misread_is_found(
    z_image: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], tensor: str, check: tuple[str, str]
) -> None:
    only("encoders", "step")
    misread(monkeypatch, tensor)
    assert failed(api.verify(z_image)) == {check}


@pytest.mark.parametrize(("layer", "verdict"), [(5, "warning"), (27, "pass")])
def test_what_only_unread_layers_of_qwen3_compute_does_not_matter(
    klein: Path, only: Callable[..., None], layer: int, verdict: str
) -> None:
    """The last state that is read is what layer 26 says."""
    only("encoders", "overflow")
    change(klein / "text_encoder", lambda name, t: t * 300 if f".{layer}.mlp." in name else t)
    found = {f.part: f for f in api.verify(klein).findings if f.check == "overflow"}
    assert found["text_encoder"].verdict == verdict
    assert ("layers.5." in found["text_encoder"].advice) == (layer == 5)


def test_statistics_of_a_vae_that_are_misread_are_found(
    klein: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("vae")
    assert api.verify(klein).passed
    monkeypatch.setattr(latents.Statistics, "to_vae", lambda self, x: x)
    assert failed(api.verify(klein)) == {("vae", "vae")}
    monkeypatch.undo()
    only("vae")
    change(klein / "vae", lambda name, t: -t if name == "bn.running_var" else t)
    (finding,) = [f for f in api.verify(klein).findings if f.check == "vae"]
    assert finding.verdict == "fail" and "bn.running_var: found -" in finding.advice


def test_wrongly_unpacked_integers_are_found(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("step")
    right = int4.unpack
    monkeypatch.setattr(int4, "unpack", lambda packed, bits: right(packed, bits).roll(1, dims=1))
    assert failed(api.verify(artefact)) == {("step", "transformer_int4")}


def test_overflow_fails_where_float16_computes(copy: Path, only: Callable[..., None]) -> None:
    change(copy / "text_encoder", lambda name, t: t * 1e4 if ".layers.0.mlp.fc" in name and "weight" in name else t)
    found = api.verify(copy)
    rows = [f for f in found.findings if f.verdict != "pass"]
    assert found.passed and {(f.verdict, f.check) for f in rows} == {("warning", "overflow")}
    assert [f.part for f in rows] == ["text_encoder", "transformer"]  # which reads that encoder's states
    assert all(f.figure is not None and f.figure > 65504 for f in rows)
    assert "encoder.layers.0.mlp.fc2: float16 overflows" in rows[0].advice
    only("encoders", "overflow")
    found = api.verify(copy, dtype="fp16")
    assert {("encoders", "text_encoder"), ("overflow", "text_encoder")} <= failed(found)


def test_a_vae_that_loses_the_picture_is_found(copy: Path, only: Callable[..., None]) -> None:
    only("vae")
    change(copy / "vae", lambda name, t: t * 0 if name.startswith("decoder.conv_out") else t)
    assert failed(api.verify(copy)) == {("vae", "vae")}
    (copy / "synth.json").write_text("{}")
    found = api.verify(copy)
    assert found.passed and [f.verdict for f in found.findings if f.check == "vae"] == ["not judged"]


def test_a_picture_in_tiles_is_the_same(
    small: Path, klein: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("vae")
    monkeypatch.setattr(Compute, "left", lambda self: 0)
    monkeypatch.setattr(staged, "TILES", (8,))
    for model in (small, klein):
        seen = list[tuple[int, ...]]()
        hook = register_module_forward_pre_hook(
            lambda module, given, seen=seen: seen.append(given[0].shape) if isinstance(module, Decoder) else None
        )
        try:
            assert api.verify(model, generation=GenerationOptions(height=128, width=128)).passed
        finally:
            hook.remove()
        assert len(seen) > 1 and max(shape[-1] for shape in seen) == 8


def test_a_damaged_file_is_found(artefact: Path, copy: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(artefact, tmp_path / "changed"))
    path = next((changed / "transformer_int4").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01"[path.read_bytes()[-1] == 0 :][:1])
    short = copy / "text_encoder" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:1000])
    for place, words in ((changed, f"{path}: its SHA-256 is not the one"), (copy, f"{short}: not whole safetensors")):
        found = api.verify(place)
        assert [f.verdict for f in found.findings] == ["fail", *["not judged"] * (len(CHECKS) - 1)]
        assert found.findings[0].advice.startswith(words)


def test_a_tensor_that_is_no_number_is_found(copy: Path) -> None:
    change(copy / "text_encoder", lambda name, t: t / 0 if name.endswith("layers.0.mlp.fc2.weight") else t)
    found = api.verify(copy)
    assert ("text", "") in failed(found) and not found.passed
    assert "found NaN or infinity" in next(f.advice for f in found.findings if f.verdict == "fail")


# ------------------------------------------------------------------------------------- the command


def test_the_time_of_a_large_model_is_said_first(
    small: Path, monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("vae")
    monkeypatch.setattr(subject, "is_small", lambda numbers: False)
    monkeypatch.setattr(subject, "evaluation_seconds", lambda *_: 600.0)
    said: list[str] = []
    api.verify(small, compute=ComputeOptions("cpu"), progress=lambda what, *_: said.append(what))
    (line,) = [words for words in said if "at least" in words]
    assert line.startswith("verify: the steps take at least 20 min at 64x64 here, on cpu")
    assert re.search(r"on cpu, in \d+\.\d\d GB of memory or more; --height and --width", line)
    assert said.index(line) < said.index("verify: VAE")
    for more in (["--time", "10m"], ["--time", "19m"]):
        refused = CliRunner().invoke(app, ["verify", str(small), "--device", "cpu", *more])
        assert isinstance(refused.exception, InputError), refused.output
        assert "20 min at 64x64 here, on cpu; --height and" in (why := str(refused.exception)) and "--yes runs" in why
    monkeypatch.setattr(subject, "evaluation_seconds", lambda *_: 3600.0)
    assert "--yes runs" in str(CliRunner().invoke(app, ["verify", str(small)]).exception)
    assert CliRunner().invoke(app, ["verify", str(small), "--yes"]).exit_code == 0


def test_exit_codes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = CliRunner().invoke(app, ["verify", str(copy), "--memory", "8GB", "--device", "cpu", "--json"])
    assert good.exit_code == 0, good.output
    shown = json.loads(good.stdout.splitlines()[-1])
    assert (shown["passed"], shown["device"], shown["height"]) == (True, "cpu", 64)
    assert shown["findings"][1] == {
        "check": "text", "part": "hidden", "verdict": "pass", "measure": "relative error", "figure": 0.0,
        "bound": 1e-3, "dtype": "fp32", "advice": "",
    }  # fmt: skip
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    bad = CliRunner().invoke(app, ["verify", str(copy)])
    assert bad.exit_code == 1 and "failed: files" in bad.stderr
    with pytest.raises(InputError, match=r"--memory: found 0.00 GB, expected at least"):
        api.verify(BUILTIN, compute=ComputeOptions("cpu", 1000))
    monkeypatch.setattr(staged, "can_stage", lambda folder: False)
    with pytest.raises(InputError, match="verify knows the text encoders CLIP, T5, Qwen3 and Qwen2.5-VL alone"):
        api.verify(BUILTIN)


# ------------------------------------------------------------------------------------- the reference


def test_the_reference_reads_weights_when_they_are_needed(folder: Path) -> None:
    pipe = reference.image_pipeline(folder, "transformer", torch.device("cpu"), None)
    with watched(pipe.transformer) as peak:
        pooled = {"sd3": 64, "flux": tiny.TEXT_WIDTH}.get(folder.name, 0)
        width = tiny.QWEN_WIDTH if folder.name == "z-image" else tiny.T5_WIDTH
        inputs = {"hidden": torch.randn(1, 40, width), "pooled": torch.randn(1, pooled)}
        size = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
        after = reference.step(pipe, torch.randn(1, 8, 8, 8), **inputs, factor=8, **size)
    assert after.shape == (1, 8, 8, 8) and after.isfinite().all()
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert peak.value > 0 and peak.module


def test_the_reference_is_strict(copy: Path) -> None:
    with pytest.raises(InputError, match=r"found no such tensor"):
        path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        del tensors["proj_out.bias"]
        save_file(tensors, path)
        reference.image_pipeline(copy, "transformer", torch.device("cpu"), None)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_unpacked_alike(bits: int) -> None:
    least = -(2 ** (bits - 1))
    values = torch.arange(least, -least).repeat(4, 32)[:, :128]
    packed, scale = int4.pack(values, bits), torch.rand(4, 2).half()
    assert torch.equal(reference.unpacked(packed, scale, 128), int4.dequantize(packed, scale, bits, torch.float32))


def test_the_peak_is_where_the_largest_number_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1, bias=False))
    torch.nn.init.constant_(model[2].weight, 1e5)
    with watched(model) as peak:
        model(torch.ones(1, 2) * 3)
    assert peak.module == "2" and peak.value > 10
    gone = Peak()
    gone.see("a", (torch.tensor([1.0, float("nan")]), None))
    gone.see("b", torch.tensor([2.0]))
    assert gone == Peak(float("inf"), "a")
