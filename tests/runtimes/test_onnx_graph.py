"""ONNX graphs at fixed sizes: what is counted, what is refused, and attention without tokens x tokens numbers."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.common.errors import InputError
from edgeprune.common.pieces import Needs, UncountableError
from edgeprune.runtimes import onnx_attention, ort, piecewise
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.onnx_graph import OnnxGraph, Piece, read_model
from edgeprune.runtimes.ort_pieces import OrtFile
from edgeprune.runtimes.ort_session import session_options
from edgeprune.runtimes.providers import choose

CHOICE = choose(["CPUExecutionProvider"])
OPTIONS = functools.partial(session_options, threads=1, reuse=False)
node = helper.make_node


def saved(
    folder: Path, nodes: Sequence[Any], inputs: Mapping[str, int], outputs: Sequence[str], weights: Sequence[Any] = ()
) -> Path:
    """Write OUT/network/model.onnx; inputs have a number of axes each, all dynamic."""
    given = [
        helper.make_tensor_value_info(
            name, TensorProto.INT64 if "ids" in name else TensorProto.FLOAT, [f"{name}{i}" for i in range(rank)]
        )
        for name, rank in inputs.items()
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "graph", given, made, list(weights))
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def graph_of(path: Path, sliced: bool = True, **shapes: Sequence[int]) -> OnnxGraph:
    return OnnxGraph(path, read_model(path), shapes, path, sliced=sliced)


def whole(path: Path, **arrays: Any) -> dict[str, Array]:
    return ort.OrtNetwork(path, OPTIONS, CHOICE)(**arrays)


def weight(name: str, *shape: int, kind: Any = np.float32) -> Any:
    numbers = np.random.default_rng(len(name)).standard_normal(shape) / shape[0] ** 0.5
    return numpy_helper.from_array((100 * numbers if kind is np.int8 else numbers).astype(kind), name)


def integers(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


# ------------------------------------------------------------------------------------- attention


def attention(folder: Path, masked: bool = False) -> Path:
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Add", ["scores", "one"], ["masked"]),
        node("Softmax", ["masked" if masked else "scores"], ["shares"], axis=-1),
        node("MatMul", ["shares", "v"], ["y"]),
    ]
    if not masked:
        del nodes[2]
    return saved(folder, nodes, dict.fromkeys("qkv", 4), ["y"], [weight("one", 1)] if masked else [])


@pytest.mark.parametrize("tokens", [600, 256, 257, 255])
def test_attention_is_computed_in_slices_of_queries(tokens: int, tmp_path: Path) -> None:
    path = attention(tmp_path)
    feed = {
        name: np.random.default_rng(i).standard_normal((1, 2, tokens + 5 * (name != "q"), 8), dtype=np.float32)
        for i, name in enumerate("qkv")
    }
    shapes = {name: value.shape for name, value in feed.items()}
    largest = [max(graph_of(path, sliced, **shapes).sizes) for sliced in (False, True)]
    rows = onnx_attention.QUERIES if tokens >= 256 else tokens
    assert largest == [2 * tokens * (tokens + 5) * 4, 2 * rows * (tokens + 5) * 4]
    found = piecewise.PiecewiseNetwork(OrtFile(path, OPTIONS, CHOICE), 10**12)(**feed)["y"]
    np.testing.assert_allclose(found, whole(path, **feed)["y"], rtol=1e-5, atol=1e-6)


def test_other_softmaxes_are_left_alone(tmp_path: Path) -> None:
    shapes = dict.fromkeys("qkv", (1, 2, 600, 8))
    assert max(graph_of(attention(tmp_path, masked=True), **shapes).sizes) == 2 * 600**2 * 4
    kept = [
        node("MatMul", ["q", "k"], ["scores"]),
        node("Softmax", ["scores"], ["shares"], axis=2),
        node("MatMul", ["shares", "v"], ["y"]),
    ]
    square = dict.fromkeys("qkv", (1, 2, 600, 600))
    assert "Concat" not in {
        one.op_type for one in graph_of(saved(tmp_path, kept, square_ranks(), ["y"]), **square).nodes
    }
    kept[1] = node("Softmax", ["scores"], ["shares"], axis=-1)
    returned = saved(tmp_path, kept, square_ranks(), ["y", "shares"])
    assert "Concat" not in {one.op_type for one in graph_of(returned, **square).nodes}
    only = saved(tmp_path, kept, square_ranks(), ["y"])
    assert "Concat" in {one.op_type for one in graph_of(only, **square).nodes}


def square_ranks() -> dict[str, int]:
    return dict.fromkeys("qkv", 4)


# ------------------------------------------------------------------------------------- what is counted


def packed(bits: int, group: int, half: bool, uses: int = 1) -> tuple[list[Any], list[Any]]:
    """A product with a packed weight (64, 48), as exports have it."""
    kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    raw = np.random.default_rng(0).integers(0, 255, 64 * 48 * bits // 8, dtype=np.uint8).tobytes()
    nodes = [
        node("Cast", ["scale"], ["wide"], to=TensorProto.FLOAT),
        node("DequantizeLinear", ["packed", "wide"], ["weight"], axis=0, block_size=group),
        *(node("MatMul", ["x" if i == 0 else f"y{i - 1}", "weight"], [f"y{i}"]) for i in range(uses)),
    ]
    kinds = np.float16 if half else np.float32
    return nodes, [
        helper.make_tensor("packed", kind, [64, 48], raw, raw=True),
        weight("scale", 64 // group, 48, kind=kinds),
    ]


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_counted_as_they_are_opened(half: bool, tmp_path: Path) -> None:
    nodes, weights = packed(4, 16, half)
    path = saved(tmp_path, nodes, {"x": 2}, ["y0"], weights)
    scales = 4 * 48 * 4
    (operation,) = graph_of(path, x=(3, 64)).operations
    assert (operation.weights, operation.converted) == (64 * 48 // 2 + scales, scales)
    shapes = {"x": (3, 64)}
    (rounded,) = OnnxGraph(path, read_model(path), shapes, path, sliced=True, scales=3).operations
    assert rounded.weights == 64 * 48 // 2 + 3 * scales


def test_int8_is_unpacked_when_it_runs_just_before_its_product(tmp_path: Path) -> None:
    """ONNX Runtime fuses only some of them. Its order of execution follows from that of a piece's nodes."""
    nodes, weights = packed(8, 64, half=True)
    path = saved(tmp_path, nodes, {"x": 2}, ["y0"], weights)
    graph = graph_of(path, x=(3, 64))
    assert [one.weights for one in graph.operations] == [64 * 48 + 48 * 4, 0]
    assert graph.sizes[graph.operations[0].makes[0]] == 64 * 48 * 4
    both = [node("Neg", ["x"], ["before"]), *nodes[:2], node("MatMul", ["before", "weight"], ["y0"])]
    (piece,) = graph_of(saved(tmp_path, both, {"x": 2}, ["y0"], weights), x=(3, 64)).cut([range(3)])
    assert isinstance(piece, Piece)
    order = [one.op_type for one in onnx.load_model_from_string(piece.model).graph.node]
    assert order == ["Cast", "DequantizeLinear", "Neg", "MatMul"]
    # In the whole file all are unpacked at first, and are alive together.
    first = [one.op_type for one in graph_of(path, sliced=False, x=(3, 64)).nodes]
    assert first == ["DequantizeLinear", "Neg", "MatMul"]


def test_an_int4_weight_of_two_products_is_unpacked(tmp_path: Path) -> None:
    nodes, weights = packed(4, 16, half=False)
    nodes.append(node("MatMul", ["x", "weight"], ["z"]))
    path = saved(tmp_path, nodes, {"x": 2}, ["y0", "z"], weights)
    assert [one.op_type for one in graph_of(path, x=(3, 64)).nodes] == ["DequantizeLinear", "MatMul", "MatMul"]


def test_a_large_value_of_sizes_alone_passes_from_piece_to_piece(tmp_path: Path) -> None:
    """Else each piece would have a copy that nobody counted."""
    nodes = [
        node("Shape", ["x"], ["all"]),
        node("Gather", ["all", "first"], ["rows"]),
        node("Range", ["zero", "rows", "one"], ["places"]),
        node("Gather", ["table", "places"], ["positions"]),
        node("Add", ["x", "positions"], ["middle"]),
        node("Add", ["middle", "positions"], ["y"]),
    ]
    scalars = [numpy_helper.from_array(np.array(i, np.int64), name) for i, name in enumerate(("zero", "one"))]
    weights = [weight("table", 1000, 64), numpy_helper.from_array(np.array(0, np.int64), "first"), *scalars]
    path = saved(tmp_path, nodes, {"x": 2}, ["y"], weights)
    graph = graph_of(path, x=(900, 64))
    assert [one.op_type for one in graph.nodes] == ["Gather", "Add", "Add"]
    first, second = graph.cut([range(2), range(2, 3)])
    assert set(second.reads) == set(first.makes) and len(second.reads) == 2
    feed = {"x": np.ones((900, 64), np.float32)}
    found = piecewise.PiecewiseNetwork(OrtFile(path, OPTIONS, CHOICE), 1)(**feed)["y"]
    np.testing.assert_allclose(found, whole(path, **feed)["y"], rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8])
def test_rows_of_a_table_are_looked_up(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("Gather", ["table", "ids"], ["rows"]), node("Cast", ["rows"], ["y"], to=TensorProto.FLOAT)]
    path = saved(tmp_path, nodes, {"ids": 2}, ["y"], [weight("table", 50, 8, kind=kind)])
    monkeypatch.setattr(piecewise, "TABLE", 50 * 8 * np.dtype(kind).itemsize)
    feed = {"ids": np.array([[3, 49, 3]])}
    network = piecewise.PiecewiseNetwork(OrtFile(path, OPTIONS, CHOICE), 10**12)
    np.testing.assert_array_equal(network(**feed)["y"], whole(path, **feed)["y"])
    assert [type(one) for one in network._pieces] == [piecewise.Lookup, Piece]
    monkeypatch.setattr(piecewise, "TABLE", piecewise.TABLE + 1)
    assert not any(one.alone for one in graph_of(path, ids=(1, 3)).operations)


# ------------------------------------------------------------------------------------- what cannot be counted


def found_when_it_runs(folder: Path) -> Path:
    nodes = [node("NonZero", ["x"], ["places"]), node("Cast", ["places"], ["y"], to=TensorProto.FLOAT)]
    return saved(folder, nodes, {"x": 2}, ["y"])


def engine(limited: bool) -> ort.CpuEngine:
    return ort.CpuEngine(lambda _: OPTIONS, CHOICE, "fp32", limited=limited)


def test_unknown_sizes_are_refused_or_opened_whole(tmp_path: Path) -> None:
    path = found_when_it_runs(tmp_path)
    shapes = {"x": (2, 3)}
    says = r"model\.onnx: places: NonZero: found values whose sizes are known only when it runs.*omit memory"
    with pytest.raises(UncountableError, match=says):
        engine(limited=True).needs(tmp_path, shapes)
    size = path.stat().st_size
    assert engine(limited=False).needs(tmp_path, shapes) == Needs(size, size)
    assert isinstance(engine(limited=False).open(tmp_path, None), ort.OrtNetwork)


def test_other_graphs_that_cannot_be_counted(tmp_path: Path) -> None:
    path = saved(tmp_path, [node("MatMul", ["x", "w"], ["y"])], {"x": 2}, ["y"], [weight("w", 4, 4)])
    with pytest.raises(UncountableError, match=r"model\.onnx: inputs: the model also needs x, found \['z'\]"):
        graph_of(path, z=(1, 4))
    with pytest.raises(UncountableError, match=r"y: MatMul: found inputs of shapes \{'x': \(1, 5\), 'w': \(4, 4\)\}"):
        graph_of(path, x=(1, 5))
    path = saved(tmp_path, [node("Gelu", ["x"], ["y"], domain="com.microsoft")], {"x": 2}, ["y"])
    with pytest.raises(UncountableError, match="y: Gelu: found values whose sizes are known only when it runs"):
        graph_of(path, x=(1, 5))
    path = saved(tmp_path, [node("Cast", ["w"], ["y"], to=1)], {"x": 2}, ["y"], [integers("w", 1)])
    with pytest.raises(UncountableError, match="y: found an output that depends on no input"):
        graph_of(path, x=(1, 5))


def test_a_cache_has_no_limit(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    from edgeprune import runtimes

    with pytest.raises(InputError, match="cache_dir: found it with memory, expected one of them"):
        runtimes.load(tiny_folders[1], "ort", memory=10**10, cache_dir=tmp_path)


def test_every_weight_is_counted(tiny_folders: tuple[Path, Path]) -> None:
    """The whole also counts attention that is not sliced."""
    path = tiny_folders[1] / "transformer" / "model.onnx"
    shapes = {
        "hidden_states": (1, 8, 16, 16),
        "encoder_hidden_states": (1, 16, 64),
        "pooled_projections": (1, 64),
        "timestep": (1,),
    }
    plain, sliced = (OrtFile(path, OPTIONS, CHOICE).graph(shapes, sliced=s).measured() for s in (False, True))
    total = sum(one.weights for one in plain.operations)
    stored = path.with_name("model.onnx.data").stat().st_size
    assert stored <= total < 1.1 * stored
    assert sum(one.weights for one in sliced.operations) == pytest.approx(total, rel=1e-3)
    assert plain.needs().whole > sliced.needs().whole


# ------------------------------------------------------------------------------------- what is opened

PEAK = """
import functools, re, sys
from pathlib import Path
import numpy as np
from edgeprune.runtimes.ort_pieces import OrtFile
from edgeprune.runtimes.ort_session import session_options
from edgeprune.runtimes.piecewise import PiecewiseNetwork
from edgeprune.runtimes.providers import choose
def read(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
options = functools.partial(session_options, threads=1, reuse=False)
file = OrtFile(Path(sys.argv[1]), options, choose(["CPUExecutionProvider"]))
before = read("VmRSS")
network = PiecewiseNetwork(file, 10**12)
network(x=np.ones((8, 2048), np.float32))
print(read("VmHWM") - before, read("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak")
def test_opening_int4_leaves_no_copies(tmp_path: Path) -> None:
    """ONNX Runtime makes copies of all weights; in the heap, they would stay."""
    nodes, weights = list[Any](), list[Any]()
    rng = np.random.default_rng(0)
    for i, (rows, columns) in enumerate([(2048, 8192), (8192, 2048)] * 6):
        raw = rng.integers(0, 255, rows * columns // 2, dtype=np.uint8).tobytes()
        weights.append(helper.make_tensor(f"packed{i}", TensorProto.INT4, [rows, columns], raw, raw=True))
        weights.append(numpy_helper.from_array(np.full((rows // 64, columns), 1e-3, np.float32), f"scale{i}"))
        nodes += [
            node("DequantizeLinear", [f"packed{i}", f"scale{i}"], [f"weight{i}"], axis=0, block_size=64),
            node("MatMul", [f"x{i}" if i else "x", f"weight{i}"], [f"x{i + 1}"]),
        ]
    path = saved(tmp_path, nodes, {"x": 2}, ["x12"], weights)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    size = sum(one.weights for one in graph_of(path, x=(8, 2048)).operations)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, kept = (int(word) for word in done.stdout.split())
    assert peak < 1.7 * size and kept < 1.3 * size, (peak / size, kept / size)


def test_values_do_not_wait_for_others_of_their_size(tiny_folders: tuple[Path, Path]) -> None:
    from edgeprune import runtimes

    with runtimes.load(tiny_folders[1], "ort", threads=1) as model:
        engine = model.backend._engine  # type: ignore[attr-defined]
        assert isinstance(engine, ort.CpuEngine) and not engine.options_of("transformer")().enable_mem_reuse
