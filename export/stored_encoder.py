"""A text encoder whose weights stay on disk: each is read when it is written or computed, and rounded if need be.

    stored = StoredT5(Path("model/text_encoder_3"))
    stored.traceable(torch.float32)   # is traced; its weights come from stored.read
    stored.checkpoint()               # the file is compared with it

T5-XXL has 4.76 G parameters, 9.5 GB in half precision. One linear layer is in memory at a time, and the embedding. An
artefact has its INT4 already (`text_encoder_3_int4`), the same for every format; other forms are rounded here. CLIPs
are not rounded: CLIP-G takes 2.8 GB in float32, 1.4 in its file.

What is written and what it is compared with have in common that tensors are read by name, strictly, and how a weight
is rounded. All else differs. What is written has packed layers and computes positions in its own way; the comparison
is transformers' own network and forward pass with plain layers, whose weights are what the integers stand for.
transformers' own loader has to read the same numbers, too, of the first block and of everything outside blocks: the
other blocks have the same tensors under other numbers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.artefact.checks import part_weights
from edgeprune.artefact.loading import empty_part, quiet, readable
from edgeprune.artefact.surgery import load_strictly
from edgeprune.artefact.text import form_of, packed_text
from edgeprune.common.errors import EdgepruneError, ParityError
from edgeprune.export.folder import from_pretrained
from edgeprune.families.parts import tensor_of
from edgeprune.quantization.text import PackedText, RoundedText, plain, prepare_text_encoder, unpacked_name
from edgeprune.residency.stored import CPU
from edgeprune.residency.streaming import PACKED, stream

M = TypeVar("M", bound=nn.Module)


class StoredEncoder(ABC, Generic[M]):
    """Structure and weights of one text encoder.

    Args:
        folder: its folder, such as `text_encoder_3`.
        states: of a language model, the hidden states that are read.
        padding: whether those of padding are read.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or a file cannot be read.
    """

    kind: ClassVar[str]
    """Its class in transformers."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Tensors of `module` that keep their dtype whatever it computes in."""
    rounded: ClassVar[bool] = True
    """Whether an export has its weights in one of the forms of precision.py."""

    def __init__(self, folder: Path, states: tuple[int, ...] = (), *, padding: bool = True) -> None:
        weights = part_weights(folder, self.kind)
        assert weights is not None  # its class has a table
        self.folder, self.states, self.padding, self._weights = folder, states, padding, weights
        with readable(folder), quiet():
            self._empty = empty_part(folder, self.kind, states).eval().requires_grad_(False)
            shapes = {n: weights.weights.shapes[weights.names[self._stored(n)][0]] for n in self._empty.state_dict()}
            load_strictly(self._empty, {n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
        packed = packed_text(folder) if self.rounded else None
        self._shapes = shapes
        self._tensors: PackedText | RoundedText | None = packed
        if self.rounded and packed is None:
            self._tensors = RoundedText(self._original, form_of(folder))
        model = copy.deepcopy(self._empty)
        if self._tensors:
            prepare_text_encoder(model, self._tensors.precision)
        self._packed = self.module(model).eval()
        if packed:
            packed.check(model)

    @abstractmethod
    def module(self, model: Any) -> M:
        """Return what is exported around a network of transformers."""

    @abstractmethod
    def made(self, name: str) -> torch.Tensor | None:
        """Return a tensor of `module` that no file has, by name; None for all others."""

    @abstractmethod
    def one_layer(self) -> dict[str, Any]:
        """Return the fields of a config that has the first layer alone."""

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read one tensor of the rounded network by name, in `dtype`; integers, scales and `exact` as they are."""
        made = self.made(name)
        tensor = self._stored_tensor(name) if made is None else made
        return tensor if name.endswith((*PACKED, *self.exact)) else tensor.to(dtype)

    def traceable(self, dtype: torch.dtype) -> M:
        """Return the network with fake tensors on the CPU: shapes and dtypes without data."""
        module = copy.deepcopy(self._packed)
        kept = (*PACKED, *self.exact)
        wanted = {n: (t.shape, t.dtype if n.endswith(kept) else dtype) for n, t in module.state_dict().items()}
        unsaved = {n: t for n, t in module.named_buffers() if n not in wanted}
        with FakeTensorMode():
            fakes = {n: torch.empty(shape, dtype=kind) for n, (shape, kind) in wanted.items()}
            for name, tensor in unsaved.items():
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, torch.empty(tensor.shape, dtype=tensor.dtype))
        module.load_state_dict(fakes, strict=True, assign=True)
        self.tied(module.model)
        return module.requires_grad_(False)

    def tied(self, model: Any) -> None:
        """Make one tensor again of one that the network has under two names, in place."""

    def running(self, dtype: torch.dtype = torch.float32) -> M:
        """Return the network that is written, to compute in `dtype`; its layers are read when they run."""
        module = copy.deepcopy(self._packed)
        self._fill(module, dtype)
        for parameter in module.parameters():  # a layer asks its norms in what to compute, before it is read
            parameter.data = parameter.data.to(dtype)
        self._stream(module.model, self._stored_tensor, dtype)
        return module

    def checkpoint(self) -> M:
        """Return what an export is compared with, in float32: plain layers of rounded weights, read when they run.

        Raises:
            ParityError: transformers' own loader reads other numbers.
            InputError: it cannot load the folder.
        """
        self._check_vendor()
        model = copy.deepcopy(self._empty)
        self._stream(model, self._plain, torch.float32)
        module = self.module(model)
        self._fill(module, torch.float32)
        return module

    def empty(self) -> M:
        """Return the network that is written without weights, on the meta device; `read` has its tensors by name."""
        return copy.deepcopy(self._packed)

    def _fill(self, module: M, dtype: torch.dtype) -> None:
        """Give `module` the tensors that no file has, in place.

        Raises:
            EdgepruneError: this version of transformers has a table that is not known here.
        """
        model: Any = module.model
        stored = {f"model.{name}" for name in model.state_dict()}
        for name, _ in list(module.named_buffers()):
            own = name.removeprefix("model.")
            if self.made(own) is not None:
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, self.read(own, dtype))
            elif name not in stored:
                raise EdgepruneError(
                    f"{self.folder.name}: {own}: found no numbers for it; use another version of transformers"
                )

    def _stored_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the network that is written, by name: integers, scales, or in the dtype of its file."""
        return self._original(name) if self._tensors is None else self._tensors(name)

    def _plain(self, name: str) -> torch.Tensor:
        """Return a tensor of transformers' network by name, with the values that are written."""
        return self._original(name) if self._tensors is None else plain(self._tensors, name, self._shapes[name])

    def _stored(self, name: str) -> str:
        """Return a tensor's name in the table of parts.py from its name in transformers' network."""
        return tensor_of(self.kind, name) or name

    def _original(self, name: str) -> torch.Tensor:
        """Read a tensor of transformers' network by name, in the dtype of its file."""
        return self._weights[self._stored(name)]

    def _stream(self, model: Any, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> None:
        """Let every module that has tensors of its own read them when it runs."""
        layers, known = [], model.state_dict().keys()
        for prefix, layer in model.named_modules():
            own = [name for name in layer.state_dict() if "." not in name and f"{prefix}.{name}" in known]
            if own:
                layers.append((layer, {name: f"{prefix}.{name}" for name in own}))
        stream(layers, read, device=CPU, dtype=dtype, ahead=self._ahead)

    def _ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors, or the weights of which they are made."""
        if isinstance(self._tensors, PackedText):
            self._tensors.ahead(names)
        else:
            self._weights.ahead({self._stored(unpacked_name(name)) for name in names})

    def _check_vendor(self) -> None:
        """Check that transformers' own loader reads the first block and what is outside blocks as it is read here."""
        load = getattr(transformers, self.kind).from_pretrained
        first = from_pretrained(
            lambda *given, **how: load(*given, **how, **self.one_layer(), dtype="auto"), self.folder
        )
        for vendors, tensor in first.state_dict().items():
            name = tensor_of(self.kind, vendors)
            if name is not None and name in self._shapes and not tensor.equal(self._original(name).to(tensor.dtype)):
                raise ParityError(
                    f"{self.folder.name}: {name}: found other numbers with transformers {transformers.__version__} "
                    "than in the file, expected equal; use another version of it"
                )
