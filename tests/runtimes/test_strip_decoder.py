"""A VAE's decoder in strips, with both runtimes: the pixels of the whole, within the limit, and what is refused."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import InputError

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")
import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from openvino import opset13  # noqa: E402
from openvino_fakes import EXACT  # noqa: E402

from edgeprune.artefact.resolve import BUILTIN  # noqa: E402
from edgeprune.runtimes import onnx_vae, openvino_vae, ort, ort_pieces, strip_decoder, strip_runner  # noqa: E402
from edgeprune.runtimes import openvino as runtime_openvino  # noqa: E402
from edgeprune.runtimes.base import Array, read_settings  # noqa: E402
from edgeprune.runtimes.openvino import OpenVinoFile, OpenVinoNetwork  # noqa: E402
from edgeprune.runtimes.ort_session import session_options  # noqa: E402
from edgeprune.runtimes.providers import choose  # noqa: E402
from edgeprune.runtimes.strip_decoder import StripDecoder, least  # noqa: E402

CHOICE = choose(["CPUExecutionProvider"])
OPTIONS = functools.partial(session_options, threads=1, reuse=False)
SEGMENTS = {"openvino": openvino_vae.OpenedSegment, "ort": onnx_vae.OpenedSegment}
Decoder = tuple[str, Path]
"""A runtime and the file it opens."""
PLENTY = 10**9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in model's decoder as IR and as ONNX, by runtime."""
    return exported(BUILTIN, tmp_path_factory.mktemp("vae"))


def exported(artefact: Path, out: Path) -> dict[str, Path]:
    from edgeprune.export import graph, loaders, to_onnx, to_openvino

    path = out / "ir" / "model.onnx"
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendors' deprecations
        vae = loaders.vae_decoder(artefact, loaders.by_vendor)
        traced = graph.to_ir(vae, vae.example(batch=2, height=4, width=6), vae.inputs, vae.outputs)
        to_onnx.save("vae_decoder", traced, path)
        copy = Path(shutil.copytree(path.parent, path.parents[1] / "onnx")) / path.name
        to_openvino.converted(path)
    return {"openvino": path.with_name("openvino_model.xml"), "ort": copy}


@pytest.fixture(autouse=True)
def group_norms(files: dict[str, Path]) -> None:
    """docs/install.md says so: there the decoder runs whole."""
    if any(node.op_type == "InstanceNormalization" for node in onnx.load(files["ort"]).graph.node):
        pytest.skip("this PyTorch exports group norms as instance norms, which strips cannot compute")


@pytest.fixture(params=["openvino", "ort"])
def decoder(request: pytest.FixtureRequest, files: dict[str, Path]) -> Decoder:
    return request.param, files[request.param]


def file_of(runtime: str, path: Path) -> Any:
    return OpenVinoFile(path, "CPU", EXACT) if runtime == "openvino" else ort_pieces.OrtFile(path, OPTIONS, CHOICE)


def least_of(decoder: Decoder, height: int, width: int) -> int:
    return least(file_of(*decoder), (1, 8, height, width))


def noise(height: int, width: int, batch: int = 1) -> Array:
    return np.random.default_rng(height + width).standard_normal((batch, 8, height, width), dtype=np.float32)


def whole(decoder: Decoder, latents: Array) -> Array:
    runtime, path = decoder
    network = OpenVinoNetwork(file_of(*decoder)) if runtime == "openvino" else ort.OrtNetwork(path, OPTIONS, CHOICE)
    return network(latent_sample=latents)["sample"]


def strips(decoder: Decoder, latents: Array, limit: int) -> Array:
    return StripDecoder(file_of(*decoder), limit)(latent_sample=latents)["sample"]


def apart(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Scratch files are in the folder that is returned, and strips follow the limit: this process has much already."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(strip_decoder, "resident", lambda: 0)
    return tmp_path


def test_at_512_the_pixels_are_those_of_the_whole(decoder: Decoder, small: Path) -> None:
    latents = noise(64, 64)
    expected = whole(decoder, latents)
    fewest = least_of(decoder, 64, 64)
    for limit in (fewest, fewest + 20_000_000):
        assert apart(strips(decoder, latents, limit), expected) < 2e-5
    assert not list(small.iterdir())


@pytest.mark.parametrize(("height", "width"), [(2, 1), (3, 50), (29, 7)])
def test_odd_sizes(decoder: Decoder, small: Path, height: int, width: int) -> None:
    latents = noise(height, width)
    expected = whole(decoder, latents)
    for limit in (least_of(decoder, height, width), PLENTY):
        assert apart(strips(decoder, latents, limit), expected) < 2e-5


def test_images_of_a_batch_are_decoded_one_after_the_other(decoder: Decoder, small: Path) -> None:
    latents = noise(20, 9, batch=2)
    found = strips(decoder, latents, PLENTY)
    assert apart(found, whole(decoder, latents)) < 2e-5
    assert np.array_equal(found[1:], strips(decoder, latents[1:], PLENTY))


@pytest.mark.parametrize("runtime", ["openvino", "ort"])
def test_an_export_to_onnx_is_decoded(runtime: str, tiny_folders: tuple[Path, Path], small: Path) -> None:
    path = tiny_folders[1] / "vae_decoder" / "model.onnx"
    channels = read_settings(tiny_folders[1]).channels
    latents = np.random.default_rng(0).standard_normal((1, channels, 24, 5), dtype=np.float32)
    fewest = least(file_of(runtime, path), latents.shape)
    assert apart(strips((runtime, path), latents, fewest), whole((runtime, path), latents)) < 2e-5


@pytest.mark.parametrize("narrow", [pytest.param(False, marks=pytest.mark.slow), True])
def test_flux2s_decoder_is_decoded(tmp_path: Path, small: Path, narrow: bool) -> None:
    """It begins with a convolution of its own, and may be narrower than its encoder."""
    import tiny

    tiny.tiny_klein_pipeline(tmp_path / "klein")
    if narrow:
        shutil.rmtree(tmp_path / "klein" / "vae")
        tiny.tiny_vae_flux2(decoder_block_out_channels=(4, 8, 8, 12)).save_pretrained(tmp_path / "klein" / "vae")
    files = exported(tmp_path / "klein", tmp_path)
    shutil.rmtree(tmp_path / "klein")
    for runtime, path in files.items():
        latents = noise(24, 6)
        for limit in (least_of((runtime, path), 24, 6), PLENTY):
            assert apart(strips((runtime, path), latents, limit), whole((runtime, path), latents)) < 2e-5


@pytest.mark.slow  # above, that of FLUX.2; tests/families has one of Qwen-Image
def test_qwen_images_decoder_is_decoded(tmp_path: Path, small: Path) -> None:
    """Its norms are of each pixel's channels."""
    import tiny

    tiny.tiny_qwen_image_pipeline(tmp_path / "qwen-image")
    for runtime, path in exported(tmp_path / "qwen-image", tmp_path).items():
        for latents in (noise(24, 6), noise(3, 5)):
            for limit in (least_of((runtime, path), *latents.shape[2:]), PLENTY):
                assert apart(strips((runtime, path), latents, limit), whole((runtime, path), latents)) < 2e-5
        plan = file_of(runtime, path).strips((1, 8, 24, 6)).plan
        assert len(plan.segments) > 3 and least_of((runtime, path), 64, 64) < least_of((runtime, path), 128, 128)


def test_the_disk_takes_what_was_forecast(decoder: Decoder, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plans = [0], []
    real, run = strip_runner._run, strip_runner.run

    def watched(*given: Any) -> None:
        real(*given)
        plans.append(given[0])
        seen.append(sum(os.fstat(file.fileno()).st_size for file in given[3]._files.values()))
        assert not list(small.iterdir())  # a kill leaves nothing

    monkeypatch.setattr(strip_runner, "_run", watched)
    assert run is strip_decoder.run
    strips(decoder, noise(16, 16), PLENTY)
    assert max(seen) == plans[0].most_stored() > 0


def test_scores_of_attention_never_exist_whole(
    files: dict[str, Path], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    real = runtime_openvino.core().compile_model

    class Core:
        read_model = staticmethod(runtime_openvino.core().read_model)

        @staticmethod
        def compile_model(model: Any, device: str, config: Any) -> Any:
            largest.append(
                max(int(np.prod(node.get_output_shape(0))) for node in model.get_ops() if node.get_output_size())
            )
            return real(model, device, config)

    monkeypatch.setattr(runtime_openvino, "core", Core)
    decoder = "openvino", files["openvino"]
    strips(decoder, noise(64, 64), least_of(decoder, 64, 64))
    assert max(largest) < 64**4 / 2, "tokens x tokens"


def test_below_the_least_it_is_refused(decoder: Decoder, small: Path) -> None:
    fewest = least_of(decoder, 64, 64)
    assert least_of(decoder, 8, 8) < fewest < least_of(decoder, 128, 64)
    with pytest.raises(InputError, match="latents: found 1 row, expected 2 or more"):
        least_of(decoder, 1, 8)
    refused = f"memory: found {fewest - 1} bytes, expected at least {fewest} to decode latents of 64x64"
    with pytest.raises(InputError, match=re.escape(refused)):
        strips(decoder, noise(64, 64), fewest - 1)


def test_after_an_error_no_scratch_file_stays(decoder: Decoder, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    opened: Any = SEGMENTS[decoder[0]]
    real = opened.__call__

    def failing(self: Any, values: Any, affine: Any) -> Any:
        calls.append(1)
        if len(calls) > 10:
            raise InputError("the engine fails")
        return real(self, values, affine)

    monkeypatch.setattr(opened, "__call__", failing)
    with pytest.raises(InputError, match="the engine fails"):
        strips(decoder, noise(64, 64), least_of(decoder, 64, 64))
    assert not list(small.iterdir())


def test_what_is_no_decoder_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    decoder = files["openvino"]
    with pytest.raises(InputError, match=r"gone\.xml: no such file"):
        StripDecoder(OpenVinoFile(tmp_path / "gone.xml", "CPU", EXACT), PLENTY)
    (tmp_path / "cut.xml").write_text(decoder.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    with pytest.raises(InputError, match=r"cut\.xml: OpenVINO cannot open it on CPU: .*export again"):
        StripDecoder(OpenVinoFile(tmp_path / "cut.xml", "CPU", EXACT), PLENTY)
    network = StripDecoder(OpenVinoFile(decoder, "CPU", EXACT | {"CACHE_DIR": str(tmp_path / "cache")}), PLENTY)
    with pytest.raises(InputError, match=r"inputs: found \['sample'\], expected latent_sample"):
        network(sample=noise(2, 2))
    network.close()
    network.close()
    with pytest.raises(InputError, match="the runtime is closed"):
        network(latent_sample=noise(2, 2))
    assert network.largest_batch("latent_sample") is None and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("making", "says"),
    [
        (lambda x: opset13.reduce_mean(x, np.array([2]), keep_dims=True), "found ReduceMean .*strips of rows cannot"),
        (lambda x: opset13.convolution(x, np.ones((8, 8, 3, 3), np.float32), [2, 2], [1, 1], [1, 1], [1, 1]), "Convol"),
        (lambda x: opset13.softmax(x, 2), "softmax: .* another axis"),
    ],
)
def test_an_operation_that_strips_cannot_compute_is_named(making: Any, says: str, tmp_path: Path) -> None:
    latents = opset13.parameter(openvino.PartialShape([-1, 8, -1, -1]), np.float32, name="latent_sample")
    latents.output(0).set_names({"latent_sample"})
    path = tmp_path / "other.xml"
    openvino.save_model(openvino.Model([opset13.result(making(latents))], [latents]), path)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{says}"):
        least_of(("openvino", path), 8, 8)


@pytest.mark.parametrize(
    ("kind", "attributes", "says"),
    [
        ("ReduceMean", {}, "y: found ReduceMean .*strips of rows cannot"),
        ("Conv", {"strides": [2, 2], "pads": [1, 1, 1, 1]}, "y: found Conv .*strips of rows cannot"),
        ("Conv", {"pads": [0, 1, 0, 1]}, "y: found Conv .*strips of rows cannot"),
        ("Softmax", {"axis": 2}, "softmax: .* another axis"),
        ("Transpose", {"perm": [0, 1, 3, 2]}, ""),
    ],
)
def test_an_operation_of_onnx_that_strips_cannot_compute(
    kind: str, attributes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    filters = helper.make_tensor("w", TensorProto.FLOAT, [8, 8, 3, 3], np.ones(576, np.float32).tobytes(), raw=True)
    made = helper.make_node(kind, ["latent_sample", "w"][: 1 + (kind == "Conv")], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 8, "h", "w"]) for n in ("latent_sample", "y")]
    graph = helper.make_graph([made], "graph", ends[:1], ends[1:], [filters])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    if says:
        with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{says}"):
            least_of(("ort", path), 8, 8)
    else:
        assert least_of(("ort", path), 8, 8) > 0


PEAK = """
import functools, re, sys
from pathlib import Path
import numpy as np
from edgeprune.runtimes.strip_decoder import StripDecoder, least
path = Path(sys.argv[2])
if sys.argv[1] == "openvino":
    from edgeprune.runtimes.openvino import OpenVinoFile, settings_of
    file = OpenVinoFile(path, "CPU", settings_of("CPU", threads=1))
else:
    from edgeprune.runtimes.ort_pieces import OrtFile
    from edgeprune.runtimes.ort_session import session_options
    from edgeprune.runtimes.providers import choose
    options = functools.partial(session_options, threads=1, reuse=False)
    file = OrtFile(path, options, choose(["CPUExecutionProvider"]))
limit = least(file, (1, 8, 64, 64))
StripDecoder(file, limit)(latent_sample=np.zeros((1, 8, 64, 64), np.float32))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(limit, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak")
def test_a_process_keeps_to_the_least(decoder: Decoder) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, decoder)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    limit, peak = map(int, done.stdout.split())
    assert 0.4 * limit < peak <= limit
