"""Hostile files: their paths stay in the folder, absurd sizes are refused, and the terminal's cursor stays put."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.errors import InputError
from edgeprune.common.files import check_links, inside, parse_json, read_json
from edgeprune.common.terminal import printable
from edgeprune.data.imagefolder import read_samples
from edgeprune.families import family_of
from edgeprune.families.encoders import read_index
from edgeprune.planning.plan import PrunePlan
from edgeprune.runtimes.external import check_external
from edgeprune.sampling.generation import Generation, latent_factor
from edgeprune.sampling.scheduler import FlowMatch

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
Z_IMAGE = {
    "num_layers": "n_layers", "num_attention_heads": "n_heads", "attention_head_dim": "dim",
    "joint_attention_dim": "cap_feat_dim",
}  # fmt: skip
"""Its names of these fields."""
FOOTPRINT = {"parameters": 1, "bf16_bytes": 2, "int4_bytes": 1}
PLAN: dict[str, Any] = {
    "schema_version": 1, "fingerprint": "", "family": "sd3", "num_blocks": 4, "method": "hpp", "blocks": [1],
    "components": [], "before": FOOTPRINT, "after": FOOTPRINT,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "field", ["num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "in_channels"]
)
@pytest.mark.parametrize("value", [10**9, 10**400, -1, 1.5, True, "3", [3]])
def test_a_config_of_absurd_size_ends_in_a_line(name: str, field: str, value: Any) -> None:
    field = Z_IMAGE.get(field, field) if name.startswith("z-image") else field
    config = CONFIGS[name] | {field: value}
    with pytest.raises(InputError, match=field) as caught:
        family_of(config).tensor_shapes(config)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 60_000, "attention_head_dim": 60_000}, "a width up to"),
        ({"pos_embed_max_size": 60_000}, "pos_embed_max_size"),
        (
            {"num_attention_heads": 64, "attention_head_dim": 1024, "num_layers": 1000, "pos_embed_max_size": 8},
            "weights",
        ),
        ({"dual_attention_layers": 5}, "dual_attention_layers"),
        ({"dual_attention_layers": [[1]]}, "dual_attention_layers"),
    ],
)
def test_numbers_that_are_too_large_together(change: dict[str, Any], says: str) -> None:
    config = CONFIGS["sd3.5-large"] | change
    with pytest.raises(InputError, match=says):
        family_of(config).tensor_shapes(config)


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 10**12}, {"num_blocks": 1e308}, {"blocks": [4]}, {"blocks": "12"}, {"blocks": [0, 1, 2, 3]},
        {"components": [[0]]}, {"components": [[9, "attn"]]}, {"modulation_rank": 10**9}, {"before": {"parameters": 1}},
        {"before": FOOTPRINT | {"parameters": 10**30}}, {"family": None},
    ],
)  # fmt: skip
def test_plans(change: dict[str, Any]) -> None:
    assert PrunePlan.from_json(PLAN, "plan.json").kept == [0, 2, 3]
    with pytest.raises(InputError, match=next(iter(change))):
        PrunePlan.from_json(PLAN | change, "plan.json")


@pytest.mark.parametrize("score", ["NaN", "1e999", "1e300", "true", '"1"', "9" * 400, "9" * 5000])
def test_scores(tmp_path: Path, score: str) -> None:
    path = tmp_path / "analysis.json"
    path.write_text('{"metric": "m", "drop": {"0": -1, "1": SCORE}}'.replace("SCORE", score))
    with pytest.raises(InputError, match="drop|scores|JSON"):
        ContributionReport.load(path)
    path.write_text('{"metric": "m", "drop": {"0": -1, "1": 2}}')
    assert [c.drop for c in ContributionReport.load(path).contributions().values()] == [1, -2]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}', "9" * 5000])
def test_json_that_python_reads_and_nobody_else(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="not readable as JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../../x", "/etc/passwd", "link", "link/x", "loop", "a\0b", "x" * 300]
)
def test_names_lead_out_of_no_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    assert inside(folder, "a/b.json", "x") == folder / "a" / "b.json"
    if name != "loop":  # Python 3.13 resolves it to itself
        with pytest.raises(InputError, match="somewhere"):
            inside(folder, name, "somewhere")
    with pytest.raises(InputError, match="link"):
        check_links(folder)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("text_encoder/../../x", ["transformers", "CLIPTextModel"]), ("vae", ["os", "system"]), ("vae", []),
        ("vae", ["diffusers"]), ("vae", ["diffusers", "../x"]), ("vae", {"a": 1}), ("vae", ["diffusers", None]),
    ],
)  # fmt: skip
def test_the_index_names_folders_beside_it_and_known_libraries(tmp_path: Path, name: str, entry: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    assert "vae" in read_index(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({name: entry}))
    with pytest.raises(InputError, match="expected a class"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "line",
    ['{"file_name": "../a.png", "text": "x"}', '{"file_name": "a.png", "text": 3}', "[" * 100_000, "3"]
    + ['{"file_name": "a.png", "text": "x", "seed": 99999999999999999999}', '{"file_name": "\\u0000", "text": "x"}'],
)
def test_lines_of_metadata(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match="metadata.jsonl:1"):
        read_samples(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="metadata.jsonl"):
        read_samples(tmp_path)


@pytest.mark.parametrize("widths", [[], [1] * 99, "ab", [0], [10**9], None])
def test_the_size_of_a_latent(widths: Any) -> None:
    with pytest.raises(InputError, match="block_out_channels"):
        latent_factor({"block_out_channels": widths}, "vae/config.json")


def test_a_size_by_the_config_is_bounded(tmp_path: Path) -> None:
    for part, config in (
        ("transformer", CONFIGS["sd3.5-large"] | {"sample_size": 60_000}),
        ("vae", {"block_out_channels": [8, 8]}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="height"):
        Generation.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"max_image_seq_len": 256}, {"shift": -1.0}, {"num_train_timesteps": 10**400}, {"base_shift": 10**9}],
)
def test_schedules(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        FlowMatch.from_config(change)


def test_an_overflowing_shift_is_a_line() -> None:
    made = FlowMatch.from_config({"use_dynamic_shifting": True, "max_shift": 10_000})
    with pytest.raises(InputError, match="max_shift"):
        made.sigmas(4, tokens=4096)


def test_external_data_stays_in_the_folder_and_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "w").write_bytes(bytes(16))
    (folder / "link").symlink_to("../secret")

    def write(location: str, offset: object = 0, length: object = 16) -> Path:
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        # Nested: in a subgraph of a node.
        inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner)
        path = folder / "model.onnx"
        path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString())
        return path

    check_external(write("w"))
    for location in ("../secret", str(tmp_path / "secret"), "link", "none", "x" * 300, "sub/../../secret"):
        with pytest.raises(InputError, match="external data"):
            check_external(write(location))
    for offset, length in ((8, 16), (-4, 16), (0, 10**30), (0, -1), ("x", 1)):
        with pytest.raises(InputError, match="expected bytes"):
            check_external(write("w", offset, length))


def test_the_terminal_sees_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeprune.cli.screen import fail, say, table

    text = "a\x1b[31mred\x1b]0;title\x07\x08\u202ecba [bold]b[/bold] é 猫"
    shown = r"a\x1b[31mred\x1b]0;title\x07\x08\u202ecba [bold]b[/bold] é 猫"
    assert printable(text) == shown and printable("two\nlines") == "two\nlines"
    say(text)
    table([(text, "x")])
    with pytest.raises(SystemExit):
        fail(text, 2)
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x08" not in told and told.count(r"\x1b[31m") == 3 and "[bold]b[/bold]" in told


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": ("C64", [2], 0, 16)}, "found C64"),
        ({"a.weight_packed": ("F32", [4], 0, 16)}, "found F32, expected U8"),
        ({"a.weight": ("U8", [16], 0, 16)}, "found U8, expected F32"),
        ({"a": ("F32", [4], 0, 16), "b": ("F32", [0, 2**60], 16, 16)}, "found shape"),
        ({"a": ("F32", [1] * 9 + [4], 0, 16)}, "found shape"),
        ({"a": ("F32", [4], 0, 16), "b": ("F32", [4], 0, 16)}, "not whole safetensors"),
        ({"a": ("F32", [1], 0, 4), "b": ("F32", [2], 8, 16)}, "not whole safetensors"),
        ({"a": ("F32", [8], 0, 32)}, "not whole safetensors"),
    ],
)
def test_headers_of_weights(tmp_path: Path, header: dict[str, tuple[str, list[int], int, int]], says: str) -> None:
    pytest.importorskip("torch")
    from edgeprune.residency.weights import Weights

    entries = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in header.items()}
    raw = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(InputError, match=says):
        Weights(path)


def test_names_in_a_plot_are_no_formulas() -> None:
    pytest.importorskip("matplotlib")
    from edgeprune.analysis import plots

    made = ContributionReport("", "sd3", 1, r"$\bad{$", ["a"], [1.0], {((0, r"$\frac$"),): [0.5]})
    for draw in plots.figures(made).values():
        assert plots.svg(draw).startswith(b"<?xml")


def test_nothing_trusts_remote_code() -> None:
    root = Path(__file__).parents[2]
    for folder in ("edgeprune", "export", "runtimes", "targets"):
        for path in (root / folder).rglob("*.py"):
            source = path.read_text()
            assert "trust_remote_code=True" not in source and "import pickle" not in source, path
            assert "torch.load(" not in source or path.name == "hps_convert.py", path
            assert "allow_pickle=True" not in source, path
