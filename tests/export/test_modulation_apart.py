"""The modulation in a network of its own: the rows and velocities of the whole transformer, in files and runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
import traced
from quantised import thin, two_blocks

from edgeprune import api, runtimes, targets
from edgeprune.common.errors import InputError, ParityError
from edgeprune.common.files import read_json, write_json
from edgeprune.export import APART, INSIDE, modules, parity, to_onnx, to_openvino
from edgeprune.export.modulation import ModulatedTransformer, Modulation, layers_of
from edgeprune.families import family_of, published
from edgeprune.runtimes import base, modulation, networks
from edgeprune.runtimes.base import Array

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "a drawing of a star above a ring"]
MODELS = {
    "sd3": two_blocks,
    "low rank": lambda: thin(16),
    "flux": lambda: tiny.tiny_flux(joint_attention_dim=tiny.T5_WIDTH, pooled_projection_dim=tiny.TEXT_WIDTH),
}
"""A quantised SD3, guided by a second evaluation; one of projected modulation, less a norm; one that takes guidance."""


# ------------------------------------------------------------------------------------- in torch


@pytest.mark.parametrize("name", ["sd3", "sd3-dual", "flux", "flux-schnell", "low rank"])
def test_rows_replace_every_modulation_layer(name: str) -> None:
    model = (tiny.KINDS | {"low rank": MODELS["low rank"]})[name]()
    whole = modules.Transformer(model)
    example = whole.example(batch=2, height=4, width=6, tokens=5)
    rows = Modulation(model)
    assert set(rows.inputs) == set(whole.family.conditioning_inputs) & set(whole.inputs)
    left = {n: v for n, v in example.items() if n not in rows.inputs}
    with torch.no_grad():
        (expected,), (made,) = whole.reference(**example), rows.reference(**example)
        apart = ModulatedTransformer(model)
        assert list(apart.inputs) == [*left, modulation.ROWS]
        (found,) = apart(*left.values(), made)
    assert made.shape == (2, rows.width)
    assert parity.relative_error(found.numpy(), expected.numpy())[0] < 1e-6
    assert not any(
        whole.family.modulates(f"{n}.weight") for n, layer in model.named_modules() if hasattr(layer, "in_features")
    )


@pytest.mark.parametrize("model", [tiny.tiny_flux2, lambda: thin(0)], ids=["shared by all blocks", "constant"])
def test_a_model_without_such_layers_keeps_its_modulation(model: Any) -> None:
    assert layers_of(model()) == {}


# ------------------------------------------------------------------------------------- exported


SLOW = pytest.mark.slow  # test_modulation_export.py has one of a low rank, test_flux.py FLUX's


@pytest.fixture(scope="module", params=["sd3", pytest.param("low rank", marks=SLOW), pytest.param("flux", marks=SLOW)])
def forms(
    request: pytest.FixtureRequest,
    tiny_folders: tuple[Path, Path],
    quantised_onnx: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Path]]:
    """Exports of a model to ONNX by their form; encoders and VAE are those of `tiny_folders`."""
    root, model = tmp_path_factory.mktemp("forms"), MODELS[request.param]()
    flux = request.param == "flux"
    (tiny.tiny_flux_pipeline if flux else tiny.tiny_pipeline)(root / "source")
    out = {form: root / form for form in (INSIDE, APART)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
        reused = ["vae_decoder"] if flux else ["text_encoder", "text_encoder_2", "vae_decoder"]
        traced.reuse(patch, tiny_folders[1], *reused)
        for form, folder in out.items():
            with patch.context() as whole:
                if (request.param, form) == ("sd3", INSIDE):
                    traced.reuse(whole, quantised_onnx, "transformer")
                record = to_onnx.export(root / "source", folder, modulation=form)
            assert all(one["max_relative"] < 1e-4 for one in record["parity"].values())
    yield out
    shutil.rmtree(root)


def apart(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def same(forms: dict[str, Path], runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare velocities, with guidance and without, of images drawn together; then where rows wait in a file.

    The bound is the one of the issue that asked for the form.
    """
    found = {}
    for form, folder in forms.items():
        with runtimes.load(folder, runtime, threads=1) as model:
            hidden, pooled = model.backend.encode(PROMPTS)
            space = model.settings.family.latents(model.settings.config)
            noise = np.random.default_rng(3).standard_normal((2, space.channels, 8, 8), dtype=np.float32)
            step = model.backend.step(noise, hidden, pooled, np.asarray([0.9, 0.3], np.float32), 2.5)
            drawn = [model.generate_latents(PROMPTS, seed=3, steps=3, guidance_scale=scale) for scale in (1.0, 4.0)]
            found[form] = [step, *drawn]
    assert [apart(a, b) < 1e-5 for a, b in zip(found[APART], found[INSIDE], strict=True)] == [True] * 3
    assert apart(found[APART][1], found[APART][2]) > 1e-3
    monkeypatch.setattr(modulation, "HELD", 0)
    monkeypatch.setattr(networks, "SMALL", 0)
    monkeypatch.setattr(networks, "allowed", lambda: 0)
    with runtimes.load(forms[APART], runtime, threads=1) as model:
        assert apart(model.generate_latents(PROMPTS, seed=3, steps=3, guidance_scale=4.0), found[INSIDE][2]) < 1e-5


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_the_velocities_are_those_of_the_whole(
    forms: dict[str, Path], runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    same(forms, runtime, monkeypatch)


@pytest.mark.slow  # OpenVINO opens the ONNX, see above
@pytest.mark.parametrize("forms", ["sd3"], indirect=True)
def test_openvinos_own_files(forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that OpenVINO GenAI reads are there in the form that it opens alone."""
    source, names = forms[APART].parent / "source", ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
    model = MODELS["sd3"]()
    monkeypatch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
    out = {form: tmp_path / form for form in forms}
    for form, folder in forms.items():
        with pytest.MonkeyPatch.context() as patch:
            traced.reuse(patch, folder, modulation.ROWS, *names)
            to_openvino.export(source, out[form], device=targets.load("cpu-x86"), modulation=form)
    same(out, "openvino", monkeypatch)
    assert {form: (out[form] / "tokenizer" / "openvino_tokenizer.xml").is_file() for form in out} == {
        INSIDE: True, APART: False,
    }  # fmt: skip


def test_the_record_says_the_form_and_the_files_hold_each_weight_once(forms: dict[str, Path]) -> None:
    def weights(folder: Path) -> set[str]:
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        return {tensor.name for tensor in graph.initializer if "." in tensor.name}  # those of the checkpoint

    records = {form: read_json(folder / "edgeprune_export.json") for form, folder in forms.items()}
    assert modulation.WIDTH not in records[INSIDE] and records[APART][modulation.WIDTH] > 64
    assert records[APART]["parity"].keys() - records[INSIDE]["parity"].keys() == {modulation.ROWS}
    whole = weights(forms[INSIDE] / "transformer")
    parts = [weights(forms[APART] / name) for name in ("transformer", modulation.ROWS)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == whole


@pytest.mark.parametrize(
    ("runtime", "small"), [("ort", True), ("ort", False), pytest.param("openvino", False, marks=pytest.mark.slow)]
)
def test_it_runs_once_an_image_and_is_closed_unless_it_is_small(
    forms: dict[str, Path], runtime: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(networks, "SMALL", 0)
    ran, real = list[tuple[str, int]](), networks.NetworkBackend._run
    monkeypatch.setattr(
        networks.NetworkBackend,
        "_run",
        lambda self, name, feeds: ran.append((name, len(feeds))) or real(self, name, feeds),
    )
    with runtimes.load(forms[APART], runtime, threads=1) as model:
        assert (modulation.ROWS in model.backend._networks) is small  # type: ignore[attr-defined]
        model.generate("two red circles", seed=1, steps=5, guidance_scale=4.0)
        assert (modulation.ROWS in model.backend._networks) is small  # type: ignore[attr-defined]
        assert not model.backend._table._places  # type: ignore[attr-defined]
    halves = 1 if model.settings.family.takes_guidance(model.settings.config) else 2
    counts = [(name, count) for name, count in ran if "text" not in name]
    rows = -(-5 * halves // modulation.AT_ONCE)
    assert counts == [(modulation.ROWS, rows), *[("transformer", 1)] * 5, ("vae_decoder", 1)]


@pytest.mark.parametrize("runtime", ["ort", pytest.param("openvino", marks=pytest.mark.slow)])
def test_it_runs_once_for_images_that_are_drawn_together(
    forms: dict[str, Path], runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are a batch each; the network is opened for a group of them, and the rows of one group wait at a time."""
    monkeypatch.setattr("edgeprune.sampling.generation.TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(networks, "SMALL", 0)
    monkeypatch.setattr(modulation, "HELD", 0)
    opened, waiting = list[str](), list[int]()
    with runtimes.load(forms[APART], runtime, threads=1) as model:
        backend: Any = model.backend
        engine, table, width = type(backend._engine), backend._table, backend._table.width
        real_open, real_fill = engine.open, table.fill

        def fill(keys: Any, made: Any) -> None:
            real_fill(keys, made)
            waiting.append(table._store._files[0].seek(0, 2) // (4 * width))

        monkeypatch.setattr(table, "fill", fill)
        monkeypatch.setattr(
            engine, "open", lambda self, place, limit: opened.append(place.name) or real_open(self, place, limit)
        )
        group = base.GROUP
        prompts = [f"{i} red circles" for i in range(2 * group + 1)]
        for guided, count in ((True, group), (True, 2 * group + 1), (False, group)):
            scale = 4.0 if guided else 1.0
            model.generate_latents(prompts[:count], seed=1, steps=2, guidance_scale=scale)
            assert opened.count(modulation.ROWS) == -(-count // group) and set(opened) == {modulation.ROWS}
            negative = guided and not model.settings.family.takes_guidance(model.settings.config)
            full = 2 * (group + negative)
            assert waiting == [full] * (count // group) + [2 * (1 + negative)] * (count % group)
            opened.clear()
            waiting.clear()


def test_engines_take_the_rows(forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's runtime over a fake GPU that takes four rows at once."""
    pytest.importorskip("tensorrt_rtx")
    from trt_fakes import FakeCuda, fake_tensorrt

    from edgeprune.runtimes import trt
    from edgeprune.runtimes.gpu import Gpu

    fake, drawn = FakeCuda(), []
    fake.largest_batch = 4
    monkeypatch.setattr(trt, "vendor", lambda name: fake_tensorrt(fake))
    monkeypatch.setattr(trt, "open_gpu", lambda extra: Gpu(fake))
    for form in (INSIDE, APART):
        source, engines = forms[form], tmp_path / form
        shutil.copytree(source, engines, ignore=shutil.ignore_patterns("*.onnx*"))
        for path in source.glob("*/model.onnx"):
            (engines / path.parent.name / "model.engine").write_text(str(path))
        record = read_json(engines / "edgeprune_export.json")
        write_json(engines / "edgeprune_export.json", record | {"target": "trt", "builder": {"name": "tensorrt"}})
        with runtimes.load(engines, "trt") as model:
            drawn.append(model.generate_latents("two red circles", seed=3, steps=5, guidance_scale=4.0))
    assert apart(*drawn) < 1e-4 and not fake.blocks


@pytest.mark.parametrize("forms", ["sd3"], indirect=True)
def test_its_room_is_that_of_the_device(forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine says of its memory counts, not what the process has of the host's."""
    monkeypatch.setattr(networks, "SMALL", 0)
    limits = list[Any]()
    with runtimes.load(forms[APART], "ort", threads=1) as model:
        backend: Any = model.backend
        engine = type(backend._engine)
        real = engine.open
        monkeypatch.setattr(engine, "room", lambda self: (7, 10**13))
        monkeypatch.setattr(engine, "open", lambda self, place, limit: limits.append(limit) or real(self, place, None))
        backend._limit = 10**13
        model.generate_latents("a star", steps=1)
    assert limits == [7 + networks.RESERVE + modulation.ROOM]


@pytest.mark.parametrize("forms", ["sd3"], indirect=True)
def test_older_versions_of_edgeprune_refuse_it(forms: dict[str, Path], tmp_path: Path) -> None:
    """Their runtimes would miss an input. Early exports of the form have the version of all others."""
    records = {form: read_json(folder / "edgeprune_export.json") for form, folder in forms.items()}
    assert {form: record["schema_version"] for form, record in records.items()} == {INSIDE: 1, APART: 2}
    for version in (1, 2):
        write_json(tmp_path / "edgeprune_export.json", records[APART] | {"schema_version": version})
        assert "ort" in runtimes.candidates(tmp_path)
    write_json(tmp_path / "edgeprune_export.json", records[APART] | {"schema_version": 3})
    with pytest.raises(InputError, match="schema_version: found 3.*a newer edgeprune wrote it"):
        runtimes.candidates(tmp_path)


def test_no_prompt_is_encoded_for_what_an_interrupted_run_has_finished(
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model without modulation layers there are no rows to wait for."""
    encoded = list[Path]()
    model = tiny.stored(tiny.tiny_transformer(num_layers=1))
    monkeypatch.setattr(to_onnx, "open_transformer", lambda *_, **__: model)
    monkeypatch.setattr(to_onnx.text, "encoded", lambda artefact, progress: encoded.append(artefact))
    for layers, expected in (({}, []), ({"norm": model}, [modulation.ROWS])):
        monkeypatch.setattr(to_onnx, "layers_of", lambda _, layers=layers: layers)
        found = to_onnx.sources(tiny_folders[0], lambda name: name != modulation.ROWS, modulation=APART, half=True)
        assert [source.name for source in found] == expected
        assert len(encoded) == len(expected)


@pytest.mark.parametrize("form", [INSIDE, APART])
def test_genais_files_are_where_it_opens_the_folder(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder decides: a model without modulation layers is written whole, whatever was asked for."""
    monkeypatch.setattr(to_openvino.genai, "write", lambda folder: {"tokenizers": {}})
    said = list[str]()
    if form == APART:
        (tmp_path / modulation.ROWS).mkdir()
    found = to_openvino._genai(tmp_path, said.append)  # type: ignore[arg-type]
    assert found == ({} if form == APART else {"tokenizers": {}})
    assert len(said) == (form == APART) and all("--modulation inside" in line for line in said)


def test_wrong_rows_are_refused(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer whose outputs come in another order, both networks differ from torch."""
    real = Modulation.forward

    def swapped(self: Modulation, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        (rows,) = real(self, *tensors)
        return (rows.roll(1, dims=-1) if torch.compiler.is_exporting() else rows,)

    monkeypatch.setattr(Modulation, "forward", swapped)
    with pytest.raises(ParityError, match="modulation: modulation: found a relative error"):
        to_onnx.export(tiny_folders[0], tmp_path / "out", modulation=APART)


# ------------------------------------------------------------------------------------- options


def test_apart_is_what_the_formats_are_written_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def export(*_: Any, **how: Any) -> dict[str, Any]:
        asked.append(how.get("modulation"))
        return {"quantized": False}

    for module in (to_onnx, to_openvino):
        monkeypatch.setattr(module, "export", export)
    monkeypatch.setattr("edgeprune.export.accepts.check", lambda *_: None)
    monkeypatch.setattr("edgeprune.export.accepts.pipeline", lambda *_: None)
    for fmt in ("onnx", "openvino"):
        for form in (None, INSIDE):
            api.export(tmp_path, tmp_path / "out", fmt, modulation=form)
    assert asked == [APART, INSIDE] * 2
    with pytest.raises(InputError, match=r"^--modulation: found 'apart', expected inside for coreml$"):
        api.export(tmp_path, tmp_path / "out", "coreml", modulation=APART)


# ------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("held", [0, modulation.HELD])
def test_rows_are_kept_by_prompt_and_level(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulation, "HELD", held)
    pooled = np.asarray([[1, 2], [3, 4], [1, 2]], np.float32)
    keys = modulation.keys_of(pooled, np.asarray([0.5, 0.5, 0.25], np.float32), 3.0)
    table, rows = modulation.Table(3), np.arange(12, dtype=np.float32).reshape(4, 3)
    assert not table.has(keys[:1])
    table.fill(keys, [rows[:2], rows[2:]])  # the last row is left over
    assert table.has(keys) and not table.has(modulation.keys_of(pooled[:1], np.asarray([0.4]), 3.0))
    assert not table.has(modulation.keys_of(pooled[:1], np.asarray([0.5]), 3.5))
    np.testing.assert_array_equal(table[[keys[2], keys[0]]], rows[[2, 0]])
    table.clear()
    assert not table.has(keys[:1])


@pytest.mark.parametrize("name", list(published.transformers()))
def test_the_rows_of_published_models_are_no_wider_than_accepted(name: str, tmp_path: Path) -> None:
    config = published.transformers()[name]
    family = family_of(config)
    with torch.device("meta"):
        model = family.build(config, list(range(family.block_count(config))), frozenset())
    if not layers_of(model):
        return
    table = modulation.Table.of({modulation.WIDTH: Modulation(model).width}, tmp_path)
    assert table is not None and (name != "sd3.5-large" or table.width == 1_104_128)


@pytest.mark.parametrize("width", [0, 65_536_001, "3", None])
def test_rows_of_no_width_are_refused(width: Any) -> None:
    with pytest.raises(InputError, match=r"^x\.json: modulation_width: found .*, expected a whole number from 1 to"):
        modulation.Table.of({modulation.WIDTH: width}, Path("x.json"))
    assert modulation.Table.of({}, Path("x.json")) is None
