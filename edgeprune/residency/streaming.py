"""Run a network whose layers stay on disk: each is read when it runs, widened to the computed dtype, and dropped after.

Weights keep the dtype of their file; only the layer that computes is wider. The first layers may stay in memory: as
many as `fitting` finds room for. The operating system reads the next layer while the current one computes.

Layers are filled through their module objects, not through names: modules may be replaced while the network is in use,
as the analysis does, and the replaced ones still get their weights where something reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import nn

from edgeprune.common.pieces import staying

Read = Callable[[str], torch.Tensor]
"""Reads a tensor by its name in the network's state dict, in the dtype of its file."""
Ahead = Callable[[Sequence[str]], None]
"""Asks the operating system to read these tensors in the background."""

PACKED = (".weight_packed", ".weight_scale", ".weight_half")
"""Suffixes of tensors that keep their dtype: packed integers, their scales, and weights in half precision."""
_STREAM = "_edgeprune_layer"
"""Attribute of a module that is a layer of a streamed network."""


class Layer:
    """One layer of a streamed network.

    Args:
        module: the layer, on the meta device.
        names: of its tensors in the network's state dict, by their name in the layer's.
        read: reads a tensor.
        device: to compute on.
        dtype: to compute in; None is that of the file.
        ahead: reads in the background; None reads nothing ahead.
    """

    def __init__(
        self,
        module: nn.Module,
        names: dict[str, str],
        read: Read,
        device: torch.device,
        dtype: torch.dtype | None,
        ahead: Ahead | None = None,
    ) -> None:
        self.module, self.read, self.device, self.dtype, self._ahead = module, read, device, dtype, ahead
        self.places = [(*_place(module, local), name) for local, name in names.items()]
        self.kept: dict[str, torch.Tensor] | None = None
        """Its tensors in the dtype of the file, if they stay in memory."""
        self.uses = 0

    @property
    def names(self) -> list[str]:
        """The names of its tensors in the network's state dict."""
        return [name for *_, name in self.places]

    def load(self) -> dict[str, torch.Tensor]:
        """Return its tensors, in the dtype of the file, on the device that computes."""
        return {name: self.read(name).to(self.device) for name in self.names}

    def keep(self) -> None:
        """Read the tensors, and keep them in memory."""
        self.kept = self.load()

    def running_bytes(self) -> int:
        """Return the bytes of the tensors that the modules get while they run, from their shapes: nothing is read."""
        size = 0
        for module, attribute, name in self.places:
            tensor = _get(module, attribute)
            dtype = tensor.dtype if self.dtype is None or name.endswith(PACKED) else self.dtype
            size += tensor.numel() * dtype.itemsize
        return size

    def fill(self) -> None:
        """Give the modules their weights. Calls nest: only the first fills, and the last drop drops."""
        self.uses += 1
        if self.uses > 1:
            return
        for module, attribute, name in self.places:
            _put(module, attribute, self._widened(name))

    def _widened(self, name: str) -> torch.Tensor:
        """Return a tensor as it computes; as it is stored it is freed before the next one is read."""
        value = self.read(name).to(self.device) if self.kept is None else self.kept[name]
        return value if self.dtype is None or name.endswith(PACKED) else value.to(self.dtype)

    def ahead(self) -> None:
        """Ask the operating system to read the weights that are not in memory."""
        if self._ahead is not None and self.kept is None:
            self._ahead(self.names)

    def drop(self) -> None:
        """Free the weights; what is kept stays in the dtype of its file."""
        self.uses -= 1
        if self.uses:
            return
        for module, attribute, _ in self.places:
            _put(module, attribute, _get(module, attribute).to("meta"))


Named = tuple[nn.Module, dict[str, str]]
"""A layer, and the name of each of its tensors in the network's state dict, by the name in the layer's."""


def fitting(layers: Iterable[Named], dtype: Callable[[str], torch.dtype], room: int) -> int:
    """Return how many of the first layers fit in memory as they are stored.

    Args:
        layers: in the order in which they run.
        dtype: returns the stored dtype of a tensor of the network.
        room: bytes that they may take.
    """
    sizes = (
        sum(tensor.numel() * dtype(names[local]).itemsize for local, tensor in module.state_dict().items())
        for module, names in layers
    )
    sums = list(accumulate(sizes))
    return staying(len(sums), lambda stay: sums[stay - 1], room)


def stream(
    layers: Iterable[Named],
    read: Read,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    stay: int = 0,
    ahead: Ahead | None = None,
) -> list[Layer]:
    """Let layers of a network read their weights when they run.

    Args:
        layers: in the order in which they run, on the meta device.
        read: reads a tensor of the network.
        device: to compute on.
        dtype: to compute in; None is that of the file.
        stay: how many of the first layers stay in memory, in the dtype of their file.
        ahead: reads the next layer's tensors in the background while a layer computes.
    """
    made = [Layer(module, names, read, device, dtype, ahead) for module, names in layers]
    for index, layer in enumerate(made):
        if index < stay:
            layer.keep()
        following = made[(index + 1) % len(made)]
        layer.module.register_forward_pre_hook(lambda *_, layer=layer, next=following: _begin(layer, next))
        layer.module.register_forward_hook(lambda *_, layer=layer: layer.drop(), always_call=True)
        setattr(layer.module, _STREAM, layer)
    return made


def _begin(layer: Layer, following: Layer) -> None:
    layer.fill()
    if layer.uses == 1 and following is not layer:  # otherwise `filled` has said which is next
        following.ahead()


def release(network: nn.Module) -> None:
    """Free the layers that a network keeps in memory; from now on they are read when they run."""
    for module in network.modules():
        if is_streamed(module):
            getattr(module, _STREAM).kept = None


@contextlib.contextmanager
def filled(module: nn.Module, *, following: nn.Module | None = None) -> Iterator[None]:
    """Hold a layer's weights in memory inside the context; does nothing for a network that is not streamed.

    Args:
        module: the layer.
        following: the one that is read next; it is read in the background.
    """
    layer = getattr(module, _STREAM, None)
    if layer is None:
        yield
        return
    layer.fill()
    after = getattr(following, _STREAM, None)
    if after is not None and after is not layer:
        after.ahead()
    try:
        yield
    finally:
        layer.drop()


def held_bytes(network: nn.Module) -> int:
    """Return the bytes of weights that a network has in memory while it runs, with its largest streamed layer."""
    layers: list[Layer] = [getattr(m, _STREAM) for m in network.modules() if is_streamed(m)]
    held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()) if not t.is_meta)
    held += sum(tensor.nbytes for layer in layers for tensor in (layer.kept or {}).values())
    return held + largest_running_bytes(network)


def largest_running_bytes(network: nn.Module) -> int:
    """Return the bytes of the largest streamed layer of a network while it runs; 0 if none is streamed."""
    return max((getattr(m, _STREAM).running_bytes() for m in network.modules() if is_streamed(m)), default=0)


def is_streamed(module: nn.Module) -> bool:
    """Return whether a layer of a network reads its weights when it runs."""
    return hasattr(module, _STREAM)


def any_streamed(layers: Iterable[nn.Module]) -> bool:
    """Return whether one of these layers, or a layer that another module stands in for, reads its weights when it runs.

    Args:
        layers: of a network. One that is replaced by a module around it, such as a recorder, counts.
    """
    return any(is_streamed(module) for layer in layers for module in (layer, *layer.children()))


def computes_like(layers: Iterable[nn.Module]) -> torch.Tensor:
    """Return an empty tensor of the device and dtype in which the first layer that reads its weights computes.

    Args:
        layers: of a network of which one reads its weights when it runs, in a dtype that was chosen.
    """
    streams: Iterable[Layer] = (getattr(layer, _STREAM) for layer in layers if is_streamed(layer))
    first = next(iter(streams))
    return torch.empty(0, dtype=first.dtype, device=first.device)


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner), attribute


def _get(module: nn.Module, attribute: str) -> torch.Tensor:
    found: torch.Tensor = getattr(module, attribute)
    return found


def _put(module: nn.Module, attribute: str, value: torch.Tensor) -> None:
    """Set a parameter or a buffer. The parameter is a new object: a graph may still need the old one's numbers."""
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[attribute] = value
