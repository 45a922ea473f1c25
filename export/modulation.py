"""The adaLN modulation as a network of its own, and the transformer that reads what it returns.

    Modulation(model)         # timestep, pooled text and guidance -> rows (B, T)
    ModulatedTransformer(model)   # reads the rows instead

All modulation layers of a transformer read one vector, which the noise level and the prompt alone decide. So their
outputs are known for all steps before the first, and their weights, a third of SD3.5 Large, need not be in memory while
the transformer runs. A row (T) holds the layers' outputs one after the other, in the order of the model's modules.
Constant modulation, of removed norms, stays in the transformer: it is one vector per norm.

Where modulation depends on time alone (Qwen-Image), the rows of a schedule are the same for every prompt.

Notation: B batch, T outputs of all modulation layers.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any, cast

import torch
from torch import nn

from edgeprune.export import modules
from edgeprune.families import Axes, family_of_model
from edgeprune.families.removed import ConstantModulation
from edgeprune.residency.stored import CPU, StoredTransformer
from edgeprune.residency.streaming import stream
from edgeprune.runtimes.modulation import ROWS
from edgeprune.sampling.denoising import Conditioning


def layers_of(model: Any) -> dict[str, nn.Module]:
    """Return a transformer's modulation layers by name, in the order of a row; empty if nothing can be taken out.

    Layers that all blocks share (FLUX.2) are not listed: they are few, and stay in the transformer.
    """
    family = family_of_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if family.modulates(f"{name}.weight") and not isinstance(module, ConstantModulation)
    }


class Modulation(nn.Module):
    """The embedder and the modulation layers of a transformer.

    Args:
        model: the transformer, which has modulation layers. It is not changed.
        dtype: to compute in; inputs with one number per sample do not tell.
    """

    outputs: Axes = {ROWS: {0: "batch_size"}}

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.family = family_of_model(model)
        inputs, _ = self.family.axes(model.config)
        self.inputs: Axes = {name: inputs[name] for name in inputs if name in self.family.conditioning_inputs}
        layers = cast("dict[str, nn.Linear]", layers_of(model))
        self.names = list(layers)
        self.width = sum(layer.out_features for layer in layers.values())
        """T."""
        self.activation = getattr(_owner(model, self.names[0]), _activation(_owner(model, self.names[0])))
        """What all layers apply to their input; nothing where the embedder has applied it."""
        self.model = _part(model, [self.family.embedder, *self.names])
        self._whole = (model,)  # in a tuple, because it is no part of this network

    @classmethod
    def running(cls, stored: StoredTransformer, dtype: torch.dtype = torch.float32) -> Modulation:
        """Return the modulation of a stored transformer, to compute in `dtype`; its layers are read when they run."""
        module = cls(copy.deepcopy(stored.model), dtype)
        parts = {name: module.model.get_submodule(name) for name in (module.family.embedder, *module.names)}
        layers = [(part, {n: f"{name}.{n}" for n in part.state_dict()}) for name, part in parts.items()]
        stream(layers, stored.weights.__getitem__, device=CPU, dtype=dtype, ahead=stored.weights.ahead)
        return module

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        """Map the tensors named by `inputs`, in that order, to rows (B, T)."""
        tokens = {"hidden_states": torch.zeros(0, dtype=self.dtype, device=tensors[0].device)}
        conditioning = self.family.conditioning(self.model, tokens | dict(zip(self.inputs, tensors, strict=True)))
        vector = self.activation(conditioning)
        return (torch.cat([self.model.get_submodule(name)(vector) for name in self.names], dim=-1),)

    def reference(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """Compute the same output from inputs by name."""
        rows: tuple[torch.Tensor] = self(*(inputs[name] for name in self.inputs))
        return rows

    def example(self, *, batch: int, seed: int = 0, text: Conditioning | None = None) -> dict[str, torch.Tensor]:
        """Return random inputs; of `text`, encoded prompts, its pooled text if it is given."""
        (model,) = self._whole
        whole = modules.Transformer(model).example(batch=batch, height=1, width=1, tokens=1, seed=seed, text=text)
        return {name: whole[name] for name in self.inputs}


class ModulatedTransformer(modules.Transformer):
    """A transformer that reads rows (B, T) of a `Modulation` instead of timestep, pooled text and guidance.

    Args:
        model: the transformer, which has modulation layers. They are taken out of it, in place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        start = 0
        for name, layer in cast("dict[str, nn.Linear]", layers_of(model)).items():
            norm = _owner(model, name)
            setattr(norm, _activation(norm), nn.Identity())
            setattr(norm, name.rpartition(".")[2], Slice(start, start + layer.out_features))
            start += layer.out_features
        self._width = start
        delattr(model, self.family.embedder)
        self.inputs = rows_instead(self.inputs, self.family.conditioning_inputs)

    def embed(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams, and the rows."""
        return (*self.family.embed_tokens(self.model, inputs), inputs[ROWS])

    def example(self, **sizes: Any) -> dict[str, torch.Tensor]:
        """Return random inputs, the rows as well."""
        whole = super().example(**sizes)
        rows = torch.randn(sizes["batch"], self._width, generator=torch.Generator().manual_seed(sizes.get("seed", 0)))
        return {name: rows if name == ROWS else whole[name] for name in self.inputs}


def rows_instead(inputs: Axes, conditioning: Container[str]) -> Axes:
    """Return the inputs of a transformer that reads rows, from those of the whole and those that the rows depend on."""
    return {**{name: axes for name, axes in inputs.items() if name not in conditioning}, ROWS: {0: "batch_size"}}


class Slice(nn.Module):
    """Takes the place of a modulation layer: returns its part of the rows."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (B, T) to (B, stop - start)."""
        return rows[:, self.start : self.stop]


def _owner(model: Any, name: str) -> Any:
    """Return the module that holds the module of this name: the norm of a modulation layer."""
    return model.get_submodule(name.rpartition(".")[0])


def _activation(owner: nn.Module) -> str:
    """Return the name of the module that a modulation layer's input passes before it."""
    return next(name for name, module in owner.named_children() if isinstance(module, (nn.SiLU, nn.Identity)))


def _part(model: Any, names: list[str]) -> nn.Module:
    """Return a network that has only these modules of a model, under their names."""
    part = nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        owner = part
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(leaf, model.get_submodule(name))
    return part
