"""How a convolutional network is computed on strips of rows with the numbers of the whole: what needs which rows.

A network is a list of `Layer`s over values. Each value has one axis along which it lies in rows, from the top of the
image to its bottom. Most layers compute a row from a few rows of their input, so a strip of it suffices. Three need
more, and there the network is divided into segments that run one after the other, each on strips:

- A group norm needs the mean and the variance of all rows. They are added up while its input is written, and the norm
  becomes x * a + b.
- A product of two values (attention) needs its second one whole; of the first a strip suffices.
- Upsampling needs no more than a strip, but rows are cheaper to store before it than to compute twice after it.

A value that passes from one segment to another is stored (strip_store.py); strip_runner.py runs the segments. Knows
nothing of a format: a runtime describes its graph and runs a segment at a number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.common.errors import InputError
from edgeprune.common.pieces import Operation, working
from edgeprune.runtimes.strip_norms import Norm

FEWEST = 8
"""Least rows of a strip besides those that are computed twice: fewer save little, because weights stay."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One operation. It reads values and weights, and makes one value."""

    kind: str
    """`pointwise`, `reduce`, `conv`, `norm`, `upsample`, `reshape`, `transpose`, `softmax` or `matmul`."""
    reads: tuple[int | None, ...]
    """Values in the order of the operation's inputs; None is a weight."""
    makes: int
    weights: int = 0
    """Bytes of its weights, as opened."""
    halo: int = 0
    """Of a `conv`: rows of the input above and below that a row of the output depends on."""
    order: tuple[int, ...] = ()
    """Of a `transpose`: the input's axis, by the output's."""
    axis: int = 0
    """Of a `softmax`."""
    transposed: tuple[bool, bool] = (False, False)
    """Of a `matmul`: whether the last two axes of an operand are swapped first."""
    norm: Norm | None = None


@dataclass(frozen=True)
class Described:
    """A network at one image size; shapes have a batch of one."""

    layers: tuple[Layer, ...]
    """In execution order."""
    shapes: Mapping[int, Shape]
    """Of each value; numbers are float32."""
    source: int
    """The value that the network reads: (1, C, h, w)."""
    result: int
    """The value that it returns: (1, C, H, W)."""


@dataclass(frozen=True)
class Rows:
    """How a value lies in memory: `outer` times `count` rows of `inner` numbers."""

    axis: int
    outer: int
    count: int
    inner: int
    """Numbers of a row; of a value of tokens, those of all tokens in the row."""

    @property
    def size(self) -> int:
        """Bytes of the value."""
        return 4 * self.outer * self.count * self.inner


@dataclass(frozen=True)
class Segment:
    """Layers that are computed together, strip by strip."""

    layers: tuple[int, ...]
    """Places in `Described.layers`, in order."""
    strips: tuple[int, ...]
    """Values of which it reads a strip; all have the same number of rows."""
    whole: tuple[int, ...]
    """Values that it reads whole."""
    norms: tuple[int, ...]
    """Its layers that are norms."""
    makes: tuple[int, ...]
    """Values that later segments read, or the result."""
    rows: int
    """Rows of the values in `strips`."""
    halo: int
    """Rows of a strip at each end that are right only at the image's edge; of a value in `makes`, in proportion."""


@dataclass(frozen=True)
class Plan:
    """A network in segments."""

    network: Described
    rows: Mapping[int, Rows]
    """How each value lies."""
    segments: tuple[Segment, ...]

    def last_reads(self) -> dict[int, int]:
        """Return, for each stored value, the place of the last segment that reads it; of the result, one beyond."""
        last = {v: i for i, one in enumerate(self.segments) for v in (*one.strips, *one.whole)}
        return last | {self.network.result: len(self.segments)}

    def norm_source(self, layer: int) -> int:
        """Return the value whose statistics a norm needs: what it reads, before it was reshaped."""
        first = self.network.layers[_norm_start(self.network, layer)].reads[0]
        assert first is not None  # a norm of weights is a weight
        return first

    def strip_shape(self, value: int, segment: Segment, rows: int) -> Shape:
        """Return the shape of a value in a strip with so many rows of what the segment reads."""
        if value in segment.whole:
            return self.network.shapes[value]
        shape, axis = list(self.network.shapes[value]), self.rows[value].axis
        shape[axis] = shape[axis] * rows // segment.rows
        return tuple(shape)

    def bytes_of(self, segment: Segment, rows: int) -> int:
        """Return the most bytes of values in a strip of so many rows; it is an upper bound."""
        layers = [self.network.layers[i] for i in segment.layers]
        values = {v for one in layers for v in (one.makes, *one.reads) if v is not None}
        sizes = {v: 4 * math.prod(self.strip_shape(v, segment, rows)) for v in values}
        operations = [Operation(0, tuple(v for v in one.reads if v is not None), (one.makes,)) for one in layers]
        # What it reads was allocated by the caller and stays until the next strip.
        kept = {*segment.makes, *segment.strips, *segment.whole}
        return working(operations, sizes, kept)

    def weights_of(self, segment: Segment) -> int:
        """Return the bytes of a segment's weights, as opened."""
        return sum(self.network.layers[i].weights for i in segment.layers)

    def most_stored(self) -> int:
        """Return the most bytes of values that are stored at one time."""
        last, most, stored = self.last_reads(), 0, 0
        for index, segment in enumerate(self.segments):
            stored += sum(self.rows[v].size for v in segment.makes if v != self.network.result)
            most = max(most, stored)
            read = {*segment.strips, *segment.whole} - {self.network.source}
            stored -= sum(self.rows[v].size for v in read if last[v] == index)
        return most


@dataclass(frozen=True)
class Window:
    """A strip: rows start to stop are read, and of what is made rows first to last are right and kept."""

    start: int
    stop: int
    first: int
    last: int


def fewest(segment: Segment) -> int:
    """Return the least rows that a strip of a segment may have."""
    return min(segment.rows, FEWEST + 2 * segment.halo if segment.halo else 1)


def windows(rows: int, halo: int, most: int) -> list[Window]:
    """Divide rows into strips of equal height, so that a model of one fixed size computes all of them.

    Args:
        rows: of the image.
        halo: rows at each end of a strip that are wrong, unless they are the image's edge.
        most: rows of a strip; more than twice `halo`.
    """
    if most >= rows:
        return [Window(0, rows, 0, rows)]
    count = math.ceil((rows - 2 * halo) / (most - 2 * halo))
    step = math.ceil((rows - 2 * halo) / count)
    height = step + 2 * halo
    out, first = [], 0
    for index in range(math.ceil((rows - 2 * halo) / step)):
        start = min(index * step, rows - height)
        stop = start + height
        last = rows if stop == rows else stop - halo
        out.append(Window(start, stop, first, last))
        first = last
    return out


def plan(network: Described) -> Plan:
    """Divide a network into segments.

    Raises:
        InputError: a layer mixes rows in a way that strips cannot compute, or there is one row: an axis of length 1
            may be that of the rows or any other.
    """
    height = network.shapes[network.source][2]
    if height < 2:
        raise InputError(f"latents: found {height} row, expected 2 or more")
    rows = _rows(network)
    levels = _levels(network)
    segments = [
        _segment(network, rows, [i for i, found in enumerate(levels) if found == level])
        for level in sorted(set(levels))
    ]
    out = Plan(network, rows, tuple(segments))
    for segment in segments:
        for index in segment.norms:
            norm, lies = network.layers[index].norm, rows[out.norm_source(index)]
            if norm is None or lies.axis != 2 or lies.outer != norm.gamma.size or norm.gamma.size % norm.groups:
                raise _refused("norm", "channels in axis 1 of an image")
    return out


def _norm_start(network: Described, layer: int) -> int:
    """Return the first of the layers that only reshape what a norm reads, or the norm."""
    makers: dict[int | None, int] = {one.makes: i for i, one in enumerate(network.layers)}
    while True:
        maker = makers.get(network.layers[layer].reads[0])
        if maker is None or network.layers[maker].kind != "reshape":
            return layer
        layer = maker


def _refused(kind: str, expected: str) -> InputError:
    return InputError(f"{kind}: found one that strips of rows cannot compute, expected {expected}")


def _rows(network: Described) -> dict[int, Rows]:
    """Return how each value lies in rows."""
    _, _, height, _ = network.shapes[network.source]
    axes, counts = {network.source: 2}, {network.source: height}
    for layer in network.layers:
        axis = _axis(network, layer, axes, counts)
        shape = network.shapes[layer.makes]
        first = next(v for v in layer.reads if v is not None)
        count = counts[first]
        if layer.kind == "upsample":
            count = shape[axis] * count // network.shapes[first][axis]
        if shape[axis] % count:
            raise _refused(layer.kind, f"a multiple of {count} in axis {axis}, in {shape}")
        axes[layer.makes], counts[layer.makes] = axis, count
    out = {}
    for value, axis in axes.items():
        shape = network.shapes[value]
        inner = math.prod(shape[axis:]) // counts[value]
        out[value] = Rows(axis, math.prod(shape[:axis]), counts[value], inner)
    return out


def _axis(network: Described, layer: Layer, axes: Mapping[int, int], counts: Mapping[int, int]) -> int:
    """Return the axis of the rows of what a layer makes."""
    first, *rest = [v for v in layer.reads if v is not None]
    shape, before, axis = network.shapes[layer.makes], network.shapes[first], axes[first]
    if layer.kind == "pointwise":
        if any(axes[v] != axis or not _spreads(network.shapes[v], shape, axis) for v in (first, *rest)):
            raise _refused("pointwise", "values of one shape, or of one number in other axes than that of the rows")
        return axis
    if layer.kind == "reduce":
        if len(shape) != len(before) or not _spreads(shape, before, axis):
            raise _refused("reduce", "another axis than that of the rows")
        return axis
    if layer.kind in ("conv", "norm", "upsample"):
        if axis != 2 and layer.kind != "norm":
            raise _refused(layer.kind, "rows in axis 2")
        return axis
    if layer.kind == "reshape":
        outer = math.prod(before[:axis])
        for place, size in enumerate(shape):
            if math.prod(shape[:place]) == outer and size % counts[first] == 0:
                return place
        raise _refused("reshape", f"one that keeps {outer} times the rows, in {before} to {shape}")
    if layer.kind == "transpose":
        return layer.order.index(axis)
    if layer.kind == "softmax":
        if layer.axis % len(shape) == axis:
            raise _refused("softmax", "another axis than that of the rows")
        return axis
    if layer.kind == "matmul":
        return _product_axis(layer, axes, network.shapes)
    raise InputError(f"{layer.kind}: an operation that cannot be computed in strips of rows")


def _spreads(shape: Shape, to: Shape, axis: int) -> bool:
    """Return whether a value has another one's shape, or one number where that has more, but not along its rows."""
    sizes = zip(shape, to, strict=False)
    return len(shape) == len(to) and all(a == b or (a == 1 and place != axis) for place, (a, b) in enumerate(sizes))


def _product_axis(layer: Layer, axes: Mapping[int, int], shapes: Mapping[int, Shape]) -> int:
    """Return the axis of the rows of a matrix product; they have to be rows of one operand that are not summed over."""
    place = 0 if layer.reads[0] is not None else 1
    value = layer.reads[place]
    assert value is not None  # a product of two weights is a weight
    rank, axis = len(shapes[value]), axes[value]
    if axis >= rank - 2 and layer.transposed[place]:
        axis = 2 * rank - 3 - axis
    if axis == rank - 1 - place:
        raise _refused("matmul", "a sum over another axis than that of the rows")
    return axis


def _breaks(network: Described) -> set[tuple[int, int]]:
    """Return the inputs, as (layer, place), that have to be whole before the layer is computed on a strip."""
    out = set()
    for index, layer in enumerate(network.layers):
        if layer.kind == "upsample":
            out.add((index, 0))
        if layer.kind == "matmul" and None not in layer.reads:
            out.add((index, 1))
        if layer.kind == "norm":
            out.add((_norm_start(network, index), 0))
    return out


def _levels(network: Described) -> list[int]:
    """Return the segment of each layer: as late as possible without more segments, so that little is stored."""
    breaks = _breaks(network)
    earliest: dict[int, int] = {network.source: 0}
    for i, layer in enumerate(network.layers):
        read = [(earliest[v] + ((i, place) in breaks)) for place, v in enumerate(layer.reads) if v is not None]
        earliest[layer.makes] = max(read)
    latest: dict[int, int] = {network.result: earliest[network.result]}
    for i, layer in reversed(list(enumerate(network.layers))):
        for place, value in enumerate(layer.reads):
            if value is not None:
                level = latest[layer.makes] - ((i, place) in breaks)
                latest[value] = min(level, latest.get(value, level))
    return [latest[layer.makes] for layer in network.layers]


def _segment(network: Described, rows: Mapping[int, Rows], places: Sequence[int]) -> Segment:
    layers = [network.layers[i] for i in places]
    made = {one.makes for one in layers}
    inside = set(places)
    second = {one.reads[1] for one in layers if one.kind == "matmul" and None not in one.reads}
    read = dict.fromkeys(v for one in layers for v in one.reads if v is not None and v not in made)
    whole = tuple(v for v in read if v in second)
    strips = tuple(v for v in read if v not in second)
    for one in layers:
        both = {one.reads[0]} if one.kind == "matmul" else set(one.reads)
        if both & set(whole):
            raise _refused(one.kind, "a value that is read whole to be read so by every layer")
    heights = {rows[v].count for v in strips}
    if len(heights) != 1:
        raise _refused("segment", f"values of one height, in {sorted(heights)}")
    (height,) = heights
    outside = {v for i, one in enumerate(network.layers) if i not in inside for v in one.reads} | {network.result}
    makes = tuple(one.makes for one in layers if one.makes in outside)
    wrong = dict.fromkeys(read, 0)
    for one in layers:
        margin = max(wrong[v] for v in one.reads if v is not None) + one.halo
        if one.kind == "upsample":
            margin *= rows[one.makes].count // height
        wrong[one.makes] = margin
    halo = max(math.ceil(wrong[v] * height / rows[v].count) for v in makes)
    norms = tuple(i for i in places if network.layers[i].kind == "norm")
    return Segment(tuple(places), strips, whole, norms, makes, height, halo)
