"""The gradient of gates one block at a time: for a model whose blocks are read when they run.

All states go through one block before the next is read: the weights are read once forward and once backward, and one
block's graph is in memory. The forward pass keeps every block's inputs. The backward pass begins at the last block. It
runs a block again from its inputs, and gets from autograd the gradients of its gates, and those of its inputs for the
block before. What is on disk after a kill is not computed again.

Notation: K projections, J parts, S states, B batch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from edgeprune.common.progress import Steps
from edgeprune.common.tensors import Tensors
from edgeprune.families import Family
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import filled

Project = Callable[[torch.Tensor], list[torch.Tensor]]
"""Returns the K projections of a velocity (B, C, h, w)."""
MakeGates = Callable[[int], torch.Tensor]
"""Makes a block's gates for a batch of B states, puts them in place and returns them: (J of the block, B)."""


class ByBlock:
    """Forward and backward passes of batches of states through a streamed transformer.

    Args:
        model: the transformer.
        batches: the shape of the latents (B, C, h, w) of some states, and the transformer's inputs for them.
        spill: keeps streams, gradients and results.
        parts: names the parts that have gates: slopes that another run left may be those of other parts.
        step: called after each block, forward and backward.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        batches: Iterable[tuple[torch.Size, Tensors]],
        spill: Spill,
        parts: str,
        step: Steps,
    ) -> None:
        self.family, self.model, self.spill, self.parts, self.step = family, model, spill, parts, step
        self.shapes: list[torch.Size] = []
        self.layers: list[nn.Module] = list(family.blocks(model))
        """The blocks themselves; later there may be gates around them."""
        self.modulation: list[torch.Tensor] = []
        for index, (shape, inputs) in enumerate(batches):  # one at a time: those of all states may not fit in memory
            with torch.no_grad():
                image, text, modulation = family.embed(model, inputs)
            if not index:  # they depend on sizes alone
                self.device = image.device
                self.positions, self.grid = family.positions(model, inputs), family.grid(model, inputs)
            self.shapes.append(shape)
            self.modulation.append(modulation)
            if f"0.{index}" not in spill:
                spill.put(f"0.{index}", {"image": image, "text": text})

    @torch.no_grad()
    def forward(self) -> None:
        """Keep the inputs of every block, and the outputs of the last one."""
        for number, layer in enumerate(self.layers):
            if not self._has(str(number + 1)):
                with filled(layer, following=self.layers[min(number + 1, len(self.layers) - 1)]):
                    for index in range(len(self.shapes)):
                        streams = self.spill.get(f"{number}.{index}", self.device)
                        image, text = self._run(layer, index, streams)
                        kept = streams["text"] if text is None else text  # only the last block ends this stream
                        self.spill.put(f"{number + 1}.{index}", {"image": image, "text": kept})
            self.step()

    def end(self, project: Project) -> torch.Tensor:
        """Keep the gradients of the projections for the outputs of the last block.

        Returns:
            The square of the norm of each state's velocity (S,).
        """
        last = len(self.layers)
        norms = []
        for index, shape in enumerate(self.shapes):
            image = self.spill.get(f"{last}.{index}", self.device)["image"].requires_grad_()
            with torch.enable_grad():
                output = self.family.unembed(self.model, image, self.modulation[index], self.grid)
                velocity = self.family.velocity(self.model.config, output, shape).float()
                projected = project(velocity)
            norms.append(velocity.detach().flatten(1).square().sum(1))
            if self._slopes(last - 1) in self.spill or f"gradients.{last}.{index}" in self.spill:
                continue
            found = [torch.autograd.grad(one, image, retain_graph=True)[0] for one in projected]
            self.spill.put(f"gradients.{last}.{index}", {f"image.{k}": each for k, each in enumerate(found)})
        return torch.cat(norms)

    def backward(self, gated: Callable[[int], AbstractContextManager[MakeGates]]) -> list[torch.Tensor]:
        """Return the gradients for the gates of each block: (K, J of the block, S).

        Args:
            gated: a context in which there are gates around the parts of a block.
        """
        for number in reversed(range(len(self.layers))):
            if self._slopes(number) not in self.spill:
                before = self.layers[max(number - 1, 0)]
                with filled(self.layers[number], following=before), gated(number) as make_gates:
                    slopes = [self._back(number, index, make_gates) for index in range(len(self.shapes))]
                self.spill.put(self._slopes(number), {"slopes": torch.cat(slopes, dim=-1)})
                for index in range(len(self.shapes)):
                    self.spill.drop(f"gradients.{number + 1}.{index}")
            self.step()
        return [self.spill.get(self._slopes(number))["slopes"] for number in range(len(self.layers))]

    def _back(self, number: int, index: int, make_gates: MakeGates) -> torch.Tensor:
        """Keep the gradients for a block's inputs; return those for its gates (K, J of the block, B)."""
        streams = {n: t.requires_grad_() for n, t in self.spill.get(f"{number}.{index}", self.device).items()}
        after = self.spill.get(f"gradients.{number + 1}.{index}", self.device)
        gates = make_gates(len(streams["image"]))
        with torch.enable_grad():
            image, text = self._run(self.family.blocks(self.model)[number], index, streams)
        outputs = {"image": image} | ({} if text is None else {"text": text})
        wanted, slopes, kept = (streams["image"], streams["text"], gates), [], Tensors()
        count = sum(name.startswith("image.") for name in after)
        for k in range(count):
            follows = {name: after[key] for name in outputs if (key := f"{name}.{k}") in after}
            to_image, to_text, slope = torch.autograd.grad(
                [outputs[name] for name in follows], wanted, list(follows.values()),
                retain_graph=k + 1 < count, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            slopes.append(slope.detach().cpu())
            kept |= {f"image.{k}": to_image, f"text.{k}": to_text}
        self.spill.put(f"gradients.{number}.{index}", kept)
        return torch.stack(slopes)

    def _run(self, block: nn.Module, index: int, streams: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        modulation = self.modulation[index]
        return self.family.run(block, streams["image"], streams["text"], modulation, self.positions)

    def _slopes(self, number: int) -> str:
        return f"slopes.{self.parts}.{number}"

    def _has(self, number: str) -> bool:
        return all(f"{number}.{index}" in self.spill for index in range(len(self.shapes)))
