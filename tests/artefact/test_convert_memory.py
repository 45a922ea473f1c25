"""A conversion holds a shard in memory, not the model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from the system's own account"),
    pytest.mark.filterwarnings("ignore"),
]
WIDTH, JOINT, SINGLE = 512, 3, 6
SCRIPT = """
import re, sys
from pathlib import Path
from edgeprune import api
from edgeprune.residency import shards
import torch, transformers.models.clip, edgeprune.artefact.convert.make
shards.SHARD_BYTES = 4_000_000
status = lambda name: 1024 * int(re.search(name + ":\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, after imports
before = status("VmRSS")
done = api.convert(sys.argv[1], sys.argv[2], config=sys.argv[3])
print(done.converted_bytes, status("VmHWM") - before)
"""


def flux_file(path: Path, tiny_config: Path, kind: str, size: int) -> dict[str, int]:
    """Write a sparse file of FLUX.1's tensors, and change the config to fit; return the config's changes."""
    d = WIDTH
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    config = json.loads(tiny_config.read_text())
    for name, columns in (("time_in", 256), ("vector_in", config["pooled_projection_dim"]), ("guidance_in", 256)):
        linear(f"{name}.in_layer", d, columns)
        linear(f"{name}.out_layer", d, d)
    linear("img_in", d, config["in_channels"])
    linear("txt_in", d, config["joint_attention_dim"])
    linear("final_layer.linear", config["in_channels"], d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    for i in range(JOINT):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            linear(f"{at}_mod.lin", 6 * d, d)
            linear(f"{at}_attn.qkv", 3 * d, d)
            linear(f"{at}_attn.proj", d, d)
            linear(f"{at}_mlp.0", 4 * d, d)
            linear(f"{at}_mlp.2", d, 4 * d)
            shapes |= {f"{at}_attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    for i in range(SINGLE):
        at = f"single_blocks.{i}"
        linear(f"{at}.modulation.lin", 3 * d, d)
        linear(f"{at}.linear1", 7 * d, d)
        linear(f"{at}.linear2", d, 5 * d)
        shapes |= {f"{at}.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    header, at_byte = {}, 0
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1) * size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at_byte, at_byte + count]}
        at_byte += count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at_byte)
    return {
        "num_layers": JOINT, "num_single_layers": SINGLE, "num_attention_heads": 4, "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), [pytest.param("BF16", 2, marks=pytest.mark.slow), ("F8_E4M3", 1)])
def test_the_peak_is_that_of_a_few_shards(kind: str, size: int, tmp_path: Path) -> None:
    tiny.tiny_flux_pipeline(tmp_path / "config")
    path = tmp_path / "config/transformer/config.json"
    changes = flux_file(tmp_path / "x.safetensors", path, kind, size)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    arguments = [str(tmp_path / name) for name in ("x.safetensors", "out", "config")]
    run = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written, rise = map(int, run.stdout.split())
    assert written > 100_000_000
    assert rise < written // 3, f"{rise / 1e6:.0f} MB for {written / 1e6:.0f} MB"
