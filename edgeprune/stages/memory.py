"""The memory that work takes at least, counted from shapes: what is resident at a time, with its activations.

Networks are in memory one after the other (artefact/staged.py): each text encoder, of which one layer computes, then
the transformer, of which one block computes unless it is small, then the VAE. Blocks that stay and samples that pass a
block together take what is left of the memory, so they are not counted. On a GPU only its own memory is.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgeprune.artefact.staged import TILES, can_stage
from edgeprune.common.files import read_json
from edgeprune.families import Shape
from edgeprune.families.encoders import LONG, QWEN2_5_VL, T5, text_encoders
from edgeprune.families.parts import BY_ROW, text_config
from edgeprune.planning.fit import read_shapes, stored_shapes, transformer_activations, vae_activations
from edgeprune.quantization.quantize import feedback_bytes, rounding_bytes
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.running import PROCESS_BYTES, least_bytes
from edgeprune.sampling.denoising import VelocityInputs
from edgeprune.sampling.generation import images_at_once, latent_factor, longest_prompt
from edgeprune.stages.costs import sample, surroundings_bytes
from edgeprune.stages.work import Subject

SAVED_WIDTHS = 16
"""Widths of a token that autograd keeps of a block whose weights need no gradients: 13 of FLUX.1's single blocks, 14 of
its joint ones, 16 of SD3.5 Large's, 24 of SD3.5 Medium's."""
_STORED = 2
"""Bytes of a weight in the file of a large model."""
_LAYER = re.compile(r"\.(?:block|layers)\.(\d+)\.")


@dataclass(frozen=True)
class Memory:
    """The bytes that a pipeline takes at least where it computes, with those of the process."""

    subject: Subject
    compute: Compute

    @property
    def process(self) -> int:
        """Before any network is loaded."""
        held = 0 if can_stage(self.subject.source) else surroundings_bytes(self.subject.source)
        return held + (PROCESS_BYTES if self.compute.device.type == "cpu" else 0)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype that the transformer computes in."""
        return self._computed(self.subject.numbers, fits_half=not self.subject.family.overflows)

    def encoding(self, prompts: int, *, pooled: bool = False) -> int:
        """While prompts are encoded; see `work.encoding`."""
        source = self.subject.source
        if not prompts or not can_stage(source):
            return self.process
        kinds = {name: kind for name, kind in text_encoders(source).items() if not (pooled and kind in LONG)}
        states = {encoder.name: encoder.states for encoder in self.subject.family.encoders}
        return self.process + max(
            (self._encoder(source / n, k, states.get(n, ())) for n, k in kinds.items()), default=0
        )

    def evaluating(self, prompts: int, *, states: int = 0, beside: int = 0, gradients: bool = False) -> int:
        """While prompts are encoded, or samples pass through the transformer.

        Args:
            prompts: how many, besides the empty one.
            states: samples whose latents are kept.
            beside: bytes that are needed meanwhile.
            gradients: of gates on the blocks, too.
        """
        latents, condition, *_ = self._sample
        kept = (1 + prompts) * condition.hidden.nbytes + states * latents.nbytes
        running = self.transformer(prompts, gradients=gradients)
        return max(self.encoding(1 + prompts), self.process + running + kept + beside)

    def transformer(self, samples: int, *, gradients: bool = False) -> int:
        """Of the transformer while it runs, without those of the process; see `running` in residency/running.py.

        Args:
            samples: that it evaluates.
            gradients: of gates on the blocks, too.
        """
        subject, parts = self.subject, self._parts()
        outside, small = sum(parts.pop(None, [])), self.compute.memory is None and is_small(subject.numbers)
        together = images_at_once(self._image_tokens)
        one = transformer_activations(subject.family, subject.config, self.tokens)
        working = one * (min(together, samples * subject.per_step) if small else 1)  # others wait for room
        if gradients:  # fewer run together, and of one block, where blocks are read when they run
            rows, blocks = (min(16, together), len(parts)) if small else (max(1, together // 4), 1)
            graph = SAVED_WIDTHS * blocks * subject.family.width(subject.config) * self.tokens
            working = max(working, (one + graph) * rows)
        if small:
            return 4 * subject.numbers + working * self.itemsize
        return least_bytes(max(parts.values(), key=sum), outside, _STORED, self.itemsize, working * self.itemsize)

    def drawing(self, images: int) -> int:
        """While images are drawn, of one transformer after the other, and held."""
        held = 3 * images * self.subject.generation.height * self.subject.generation.width
        return max(self.evaluating(images), self.decoding()) + held

    def reporting(self, images: int) -> int:
        """While images of both models are drawn: the VAE stays while the second transformer runs, if there is room."""
        freed = self.compute.memory is not None
        weights = 0 if freed else 4 * sum(map(math.prod, stored_shapes(self.subject.source / "vae").values()))
        return max(self.drawing(2 * images), self.evaluating(images, beside=weights))

    def decoding(self) -> int:
        """While the VAE decodes an image, in tiles if memory is short: no block of the transformer is needed then."""
        outside = sum(self._parts().get(None, [])) * self.itemsize
        return self.process + outside + vae_bytes(self.subject)

    def reading(self, images: int) -> int:
        """While images and their captions are encoded."""
        return max(self.encoding(images + 1), self.process + vae_bytes(self.subject))

    def rounding(self, *, calibrated: bool = False) -> int:
        """While blocks are pruned, or rounded to INT4: a block as it is read and as it is written.

        Args:
            calibrated: with the moments of the inputs, see quantization/feedback.py.
        """
        blocks = [shapes for block, shapes in self._shapes().items() if block is not None]
        if calibrated:  # what is outside the blocks is not there any more
            subject = self.subject
            running = self.itemsize * transformer_activations(subject.family, subject.config, self.tokens)
            return self.process + max(feedback_bytes(one, _STORED, self.itemsize, running) for one in blocks)
        if self.compute.device.type != "cpu":
            return 0
        sizes = [[math.prod(shape) for shape in shapes] for shapes in blocks]
        return self.process + 2 * _STORED * max(map(sum, sizes)) + rounding_bytes(max(map(max, sizes)), _STORED)

    @property
    def tokens(self) -> int:
        """Of an image and its text."""
        return self._image_tokens + self._sample[1].hidden.shape[1]

    @property
    def _image_tokens(self) -> int:
        latents = self._sample[0]
        return latents.shape[-1] * latents.shape[-2] // self.subject.family.latents(self.subject.config).patch ** 2

    @property
    def _sample(self) -> VelocityInputs:
        return sample(self.subject.family, self.subject.config, self.subject.source, self.subject.generation)

    def _computed(self, numbers: int, *, fits_half: bool) -> int:
        return self.compute.dtype(torch.bfloat16, numbers, fits_half=fits_half).itemsize

    def _parts(self) -> dict[int | None, list[int]]:
        """Return the weights of each tensor of each block, and under None of those outside."""
        return {block: [math.prod(shape) for shape in shapes] for block, shapes in self._shapes().items()}

    def _shapes(self) -> dict[int | None, list[Shape]]:
        """Return the shapes of each block's tensors, and under None of those outside."""
        shapes = defaultdict[int | None, list[Shape]](list)
        for name, shape in self.subject.family.tensor_shapes(self.subject.config).items():
            place = self.subject.family.place(self.subject.config, name)
            shapes[None if place is None else place[0]].append(shape)
        return dict(shapes)

    def _encoder(self, folder: Path, kind: str, states: Sequence[int]) -> int:
        """Return the bytes of a text encoder: what is outside its layers, a layer, and a prompt in its MLP.

        Args:
            folder: the encoder's.
            kind: its class.
            states: of a language model, the hidden states that are read; the rest is not, and words by row.
        """
        parts, config = Counter[str](), read_json(folder / "config.json")
        config = text_config(config) if kind == QWEN2_5_VL else config
        shapes = stored_shapes(folder)
        for name, shape in read_shapes(folder, kind, states).items():
            layer = _LAYER.search(name)
            if name != BY_ROW:
                parts[layer[1] if layer else ""] += math.prod(shape)
        numbers = sum(map(math.prod, shapes.values()))
        outside, computed = parts.pop("", 0), self._computed(numbers, fits_half=kind not in LONG)
        is_t5 = kind == T5
        length = self.subject.generation.max_sequence_length if kind in LONG else longest_prompt(self.subject.source)
        wide, narrow = config["d_ff" if is_t5 else "intermediate_size"], config["d_model" if is_t5 else "hidden_size"]
        activations: int = length * (3 * wide + 2 * narrow)
        return computed * (outside + activations) + (_STORED + computed) * max(parts.values(), default=0)


def vae_bytes(subject: Subject) -> int:
    """Return the bytes of the VAE and its activations for one image, or for a tile of it, in float32."""
    folder, path = subject.source / "vae", subject.source / "vae" / "config.json"
    weights, config = sum(map(math.prod, stored_shapes(folder).values())), read_json(path)
    sides = (
        min(side, TILES[-1] * latent_factor(config, path))
        for side in (subject.generation.height, subject.generation.width)
    )
    return 4 * (weights + vae_activations(config, *sides))
