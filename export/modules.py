"""The torch modules that are traced for an export, with example inputs and the names of their axes.

Each holds the diffusers or transformers network as `model`. The exporters strip this prefix, so tensors in a file have
the names of the checkpoint.

Notation: B batch, C latent channels, h w latent height and width, f pixels per latent pixel, M text tokens, K text
width, P pooled width, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from edgeprune.families import Axes, family_of_model
from edgeprune.families.parts import vae_widths
from edgeprune.quantization.int4 import PackedLinear
from edgeprune.sampling.denoising import Conditioning, network_inputs


class Transformer(nn.Module):
    """A transformer with positional inputs and outputs, assembled from the family's embed, run and unembed steps.

    `reference` is diffusers' own forward pass; exports are compared with it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.family = model, family_of_model(model)
        self.inputs, self.outputs = self.family.axes(model.config)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        """Map the tensors named by `inputs`, in that order, to the one named by `outputs`."""
        family, model, inputs = self.family, self.model, dict(zip(self.inputs, tensors, strict=True))
        positions = family.positions(model, inputs)
        text: torch.Tensor | None
        image, text, modulation = self.embed(inputs)
        for block in family.blocks(model):
            assert text is not None  # only the last block drops the text stream
            image, text = family.run(block, image, text, modulation, positions)
        return (family.unembed(model, image, modulation, family.grid(model, inputs)),)

    def embed(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams and the modulation before the first block, see `Network.embed`."""
        return self.family.embed(self.model, inputs)

    def reference(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """Compute the same output with the model's own forward pass."""
        return (self.family.call(self.model, inputs),)

    def example(
        self, *, batch: int, height: int, width: int, tokens: int, seed: int = 0, text: Conditioning | None = None
    ) -> dict[str, torch.Tensor]:
        """Return random inputs; `height` and `width` count image tokens. Texts after the first are padded, if any are.

        Args:
            batch: rows.
            height: image tokens in a column.
            width: image tokens in a row.
            tokens: text tokens.
            seed: of the random numbers.
            text: encoded prompts to use instead of random text: at least `batch` of them, of `tokens` tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        space, widths = self.family.latents(self.model.config), self.family.text_widths(self.model.config)
        shape = batch, space.channels, height * space.patch, width * space.patch
        latents = torch.randn(shape, generator=generator)
        condition = Conditioning(
            torch.randn(batch, tokens, widths[0], generator=generator),
            torch.randn(batch, widths[1], generator=generator),
        )
        if text is not None:
            condition = Conditioning(text.hidden[:batch], text.pooled[:batch])
        elif not all(encoder.padding for encoder in self.family.encoders):
            condition.hidden[1:, tokens - tokens // 2 :] = 0
        sigma = torch.rand(batch, generator=generator)
        return network_inputs(self.model, latents, condition, sigma, guidance=4 * float(sigma[0]))


class TextEncoder(nn.Module):
    """A CLIP text encoder.

    CLIPTextModelWithProjection returns the projected pooled text, the last state, then every hidden state (0 = the
    embedding). CLIPTextModel returns the last state and the pooled text, without projection: OpenVINO GenAI takes the
    pooled text from the second output.
    """

    inputs: Axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        states = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(self.config.num_hidden_layers + 1))]
        sequence = {0: "batch_size", 1: "sequence_length"}
        self.outputs: Axes = {"last_hidden_state": sequence, "pooler_output": {0: "batch_size"}}
        if hasattr(model, "text_projection"):
            self.outputs = {"text_embeds": {0: "batch_size"}, **dict.fromkeys(states, sequence)}

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode ids (B, M) int64 to pooled text (B, P) and, with a projection, states (B, M, D)."""
        if "pooler_output" in self.outputs:
            plain = self.model(input_ids=input_ids)
            return (plain.last_hidden_state, plain.pooler_output)
        out = self.model(input_ids=input_ids, output_hidden_states=True)
        return (out.text_embeds, out.last_hidden_state, *out.hidden_states)

    def example(self, *, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random words followed by end tokens; each row has another length."""
        generator = torch.Generator().manual_seed(seed)
        end = self.config.eos_token_id
        # CLIP configs from before transformers 4.24 say 2, although the tokenizer's end token is the vocabulary's last.
        last = self.config.vocab_size - 1 if end == 2 else end
        ids = torch.randint(0, min(self.config.vocab_size, last) - 1, (batch, tokens), generator=generator)
        for row in range(batch):
            ids[row, max(1, tokens - 1 - row) :] = last
        return {"input_ids": ids}


class LayeredEncoder(nn.Module, ABC):
    """A text encoder whose layers are run here one by one, so that an export can cut it between them.

    Args:
        model: a network of transformers.
    """

    stack: ClassVar[str]
    """Where the model has its layers; beside them it has `embed_tokens`."""
    norm: str = ""
    """What is beside the layers and norms what is returned."""
    shared: ClassVar[str]
    """The name of the buffer that all layers need for positions."""
    inputs: Axes
    outputs: Axes

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config

    @property
    def inner(self) -> Any:
        """What has the layers."""
        return self.model.get_submodule(self.stack.rpartition(".")[0])

    @property
    def layers(self) -> Any:
        """The layers."""
        return self.model.get_submodule(self.stack)

    @property
    @abstractmethod
    def returned(self) -> dict[int, str]:
        """Maps a layer's index to the output that is taken after it."""

    @staticmethod
    @abstractmethod
    def around(shared: torch.Tensor, tokens: torch.Tensor, *others: torch.Tensor) -> tuple[Any, ...]:
        """Return what each layer gets besides the stream.

        Args:
            shared: the buffer.
            tokens: ids (B, M), or the stream (B, M, K).
            others: the other inputs.
        """

    @staticmethod
    @abstractmethod
    def run(layer: Any, hidden: torch.Tensor, *around: Any) -> torch.Tensor:
        """Run one layer on the stream (B, M, K), float32."""

    def as_read(self, state: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return a hidden state (B, M, K) as the network returns it; `others` are the inputs besides the ids."""
        return state


class T5Encoder(LayeredEncoder):
    """T5EncoderModel's last hidden state, without a mask: in SD3 and FLUX every token also attends to padding.

    The residual stream stays float32 even if everything else is half precision: T5-XXL's exceeds 65,504. Position
    biases come from a table indexed by distance. T5 computes the bucket with logarithms, whose rounding could pick
    another bucket on another runtime. `reference` is transformers' own forward pass; exports are compared with it.
    """

    inputs: Axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    outputs: Axes = {"last_hidden_state": {0: "batch_size", 1: "sequence_length"}}
    stack, norm, shared = "encoder.block", "final_layer_norm", "bias"
    bias: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        attention = model.encoder.block[0].layer[0].SelfAttention
        # All distances from this one on share a bucket.
        farthest = int(self.config.relative_attention_max_distance)
        self._buckets = attention._relative_position_bucket(
            torch.arange(-farthest, farthest + 1), bidirectional=True,
            num_buckets=self.config.relative_attention_num_buckets, max_distance=farthest,
        )  # fmt: skip
        self.register_buffer("bias", self.table(attention.relative_attention_bias.weight.detach()))

    def table(self, weight: torch.Tensor) -> torch.Tensor:
        """Return position biases by distance (2 * farthest + 1, heads) from those by bucket (buckets, heads)."""
        return weight[self._buckets]

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        """Encode ids (B, M) int64 to the last hidden state (B, M, K)."""
        encoder = self.model.encoder
        around = self.around(self.bias, input_ids)
        hidden = encoder.embed_tokens(input_ids).float()
        for block in encoder.block:
            hidden = self.run(block, hidden, *around)
        return (encoder.final_layer_norm(hidden),)

    @property
    def returned(self) -> dict[int, str]:
        """The last state is all that is read."""
        return {len(self.layers) - 1: "last_hidden_state"}

    @staticmethod
    def around(shared: torch.Tensor, tokens: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the position biases (1, heads, M, M)."""
        return (position_bias(shared, tokens),)

    @staticmethod
    def run(layer: Any, hidden: torch.Tensor, *around: torch.Tensor) -> torch.Tensor:
        """Run one layer, see `run_t5_block`."""
        return run_t5_block(layer, hidden, *around)

    def reference(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        """Compute the same output with the model's own forward pass."""
        return (self.model(input_ids=input_ids).last_hidden_state,)

    def example(self, *, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random words, an end token, then padding; each row has another length."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.config.vocab_size, (batch, tokens), generator=generator)
        for row in range(batch):
            end = tokens - 1 - row * (tokens // batch)
            ids[row, end:] = self.config.pad_token_id
            ids[row, end] = self.config.eos_token_id
        return {"input_ids": ids}


def position_bias(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return a T5's position biases (1, heads, M, M) from those by distance (2 * farthest + 1, heads).

    Args:
        table: see T5Encoder.table.
        tokens: (B, M, ...); only M is read.
    """
    farthest = table.shape[0] // 2
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    distances = (positions[None, :] - positions[:, None]).clamp(-farthest, farthest) + farthest
    return nn.functional.embedding(distances, table).permute(2, 0, 1)[None]


def run_t5_block(block: Any, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Run one layer of a T5 on float32 (B, M, K).

    transformers' own feed-forward reads `wo.weight`, which would unpack a PackedLinear.
    """
    attention, feed_forward = block.layer
    hidden = attention(hidden, position_bias=bias)[0]
    dense, x = feed_forward.DenseReluDense, feed_forward.layer_norm(hidden)
    inner = dense.act(dense.wi_0(x)) * dense.wi_1(x) if hasattr(dense, "wi_0") else dense.act(dense.wi(x))
    out: torch.Tensor = dense.wo(inner.float())
    return hidden + out


class VaeDecoder(nn.Module):
    """A VAE's decoder. The caller scales and shifts the latents."""

    inputs: Axes = {"latent_sample": {0: "batch_size", 2: "latent_height", 3: "latent_width"}}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        factor = 2 ** (len(vae_widths(self.config)) - 1)
        # optimum evaluates the names of output axes, so they are expressions.
        self.outputs: Axes = {
            "sample": {0: "batch_size", 2: f"latent_height * {factor}", 3: f"latent_width * {factor}"}
        }

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        """Decode latents (B, C, h, w) to images (B, 3, h * f, w * f) in about -1..1."""
        return (self.model.decode(latent_sample, return_dict=False)[0],)

    def example(self, *, batch: int, height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random latents of `height` by `width` latent pixels."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.config.get("z_dim") or self.config.latent_channels
        return {"latent_sample": torch.randn(batch, channels, height, width, generator=generator)}


def half_inputs(example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a network's inputs to half precision, except those with one number per sample (timestep, guidance).

    These stay float32: near 1000, half precision has steps of 0.5.
    """
    return {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in example.items()}


M = TypeVar("M", bound=nn.Module)


def widen(module: M) -> M:
    """Set a network to float32 and evaluation, in place; quantised layers keep the scales and biases they store."""
    packed = {m: (m.weight_scale, m.bias) for m in module.modules() if isinstance(m, PackedLinear)}
    module.eval().to(torch.float32)
    for layer, (scale, bias) in packed.items():
        layer.weight_scale, layer.bias = scale, bias
    return module
