"""A VAE's decoder in strips with OpenVINO: the pixels of the whole, within the limit, and what is refused."""

from __future__ import annotations

import os
import re
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
pytest.importorskip("diffusers")
from openvino import opset13  # noqa: E402
from openvino_fakes import EXACT  # noqa: E402

from edgeprune.artefact.resolve import BUILTIN  # noqa: E402
from edgeprune.runtimes import openvino as runtime  # noqa: E402
from edgeprune.runtimes import openvino_vae, strip_runner  # noqa: E402
from edgeprune.runtimes.base import Array, read_settings  # noqa: E402
from edgeprune.runtimes.openvino import OpenVinoFile, OpenVinoNetwork  # noqa: E402
from edgeprune.runtimes.openvino_vae import StripDecoder, least  # noqa: E402

PLENTY = 10**9


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model's decoder as IR."""
    from edgeprune.export import graph, loaders, to_onnx, to_openvino

    path = tmp_path_factory.mktemp("vae") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendors' deprecations
        vae = loaders.vae_decoder(BUILTIN, loaders.by_name)
        traced = graph.to_ir(vae, vae.example(batch=2, height=4, width=6), vae.inputs, vae.outputs)
        to_onnx.save("vae_decoder", traced, path)
        to_openvino.converted(path)
    return path.with_name("openvino_model.xml")


def least_of(path: Path, height: int, width: int) -> int:
    return least(OpenVinoFile(path, "CPU", EXACT), (1, 8, height, width))


def noise(height: int, width: int, batch: int = 1) -> Array:
    return np.random.default_rng(height + width).standard_normal((batch, 8, height, width), dtype=np.float32)


def whole(path: Path, latents: Array) -> Array:
    return OpenVinoNetwork(OpenVinoFile(path, "CPU", EXACT))(latent_sample=latents)["sample"]


def strips(path: Path, latents: Array, limit: int) -> Array:
    return StripDecoder(OpenVinoFile(path, "CPU", EXACT), limit)(latent_sample=latents)["sample"]


def apart(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Scratch files are in the folder that is returned, and strips follow the limit: this process has much already."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(openvino_vae, "resident", lambda: 0)
    return tmp_path


def test_at_512_the_pixels_are_those_of_the_whole(decoder: Path, small: Path) -> None:
    latents = noise(64, 64)
    expected = whole(decoder, latents)
    fewest = least_of(decoder, 64, 64)
    for limit in (fewest, fewest + 20_000_000):
        assert apart(strips(decoder, latents, limit), expected) < 2e-5
    assert not list(small.iterdir())


@pytest.mark.parametrize(("height", "width"), [(2, 1), (3, 50), (29, 7)])
def test_odd_sizes(decoder: Path, small: Path, height: int, width: int) -> None:
    latents = noise(height, width)
    expected = whole(decoder, latents)
    for limit in (least_of(decoder, height, width), PLENTY):
        assert apart(strips(decoder, latents, limit), expected) < 2e-5


def test_images_of_a_batch_are_decoded_one_after_the_other(decoder: Path, small: Path) -> None:
    latents = noise(20, 9, batch=2)
    found = strips(decoder, latents, PLENTY)
    assert apart(found, whole(decoder, latents)) < 2e-5
    assert np.array_equal(found[1:], strips(decoder, latents[1:], PLENTY))


def test_an_onnx_file_is_decoded_too(tiny_folders: tuple[Path, Path], small: Path) -> None:
    path = tiny_folders[1] / "vae_decoder" / "model.onnx"
    channels = read_settings(tiny_folders[1]).channels
    latents = np.random.default_rng(0).standard_normal((1, channels, 24, 5), dtype=np.float32)
    fewest = least(OpenVinoFile(path, "CPU", EXACT), latents.shape)
    assert apart(strips(path, latents, fewest), whole(path, latents)) < 2e-5


def test_the_disk_takes_what_was_forecast(decoder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plans = [0], []
    real, run = strip_runner._run, strip_runner.run

    def watched(*given: Any) -> None:
        real(*given)
        plans.append(given[0])
        seen.append(sum(os.fstat(file.fileno()).st_size for file in given[3]._files.values()))
        assert not list(small.iterdir())  # a kill leaves nothing

    monkeypatch.setattr(strip_runner, "_run", watched)
    assert run is openvino_vae.run
    strips(decoder, noise(16, 16), PLENTY)
    assert max(seen) == plans[0].most_stored() > 0


def test_scores_of_attention_never_exist_whole(decoder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    real = runtime.core().compile_model

    class Core:
        read_model = staticmethod(runtime.core().read_model)

        @staticmethod
        def compile_model(model: Any, device: str, config: Any) -> Any:
            largest.append(
                max(int(np.prod(node.get_output_shape(0))) for node in model.get_ops() if node.get_output_size())
            )
            return real(model, device, config)

    monkeypatch.setattr(runtime, "core", Core)
    strips(decoder, noise(64, 64), least_of(decoder, 64, 64))
    assert max(largest) < 64**4 / 2, "tokens x tokens"


def test_below_the_least_it_is_refused(decoder: Path, small: Path) -> None:
    fewest = least_of(decoder, 64, 64)
    assert least_of(decoder, 8, 8) < fewest < least_of(decoder, 128, 64)
    with pytest.raises(InputError, match="latents: found 1 row, expected 2 or more"):
        least_of(decoder, 1, 8)
    refused = f"memory: found {fewest - 1} bytes, expected at least {fewest} to decode latents of 64x64"
    with pytest.raises(InputError, match=re.escape(refused)):
        strips(decoder, noise(64, 64), fewest - 1)


def test_after_an_error_no_scratch_file_stays(decoder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = openvino_vae._OpenedSegment.__call__

    def failing(self: Any, values: Any, affine: Any) -> Any:
        calls.append(1)
        if len(calls) > 10:
            raise InputError("the engine fails")
        return real(self, values, affine)

    monkeypatch.setattr(openvino_vae._OpenedSegment, "__call__", failing)
    with pytest.raises(InputError, match="the engine fails"):
        strips(decoder, noise(64, 64), least_of(decoder, 64, 64))
    assert not list(small.iterdir())


def test_what_is_no_decoder_is_refused(decoder: Path, tmp_path: Path) -> None:
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
        least_of(path, 8, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak")
def test_a_process_keeps_to_the_least(decoder: Path) -> None:
    code = f"""
import re, sys
from pathlib import Path
import numpy as np
from edgeprune.runtimes.openvino import OpenVinoFile, settings_of
from edgeprune.runtimes.openvino_vae import StripDecoder, least
path = Path({str(decoder)!r})
file = OpenVinoFile(path, "CPU", settings_of("CPU", threads=1))
limit = least(file, (1, 8, 64, 64))
StripDecoder(file, limit)(latent_sample=np.zeros((1, 8, 64, 64), np.float32))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(limit, peak)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    limit, peak = map(int, done.stdout.split())
    assert 0.5 * limit < peak <= limit
