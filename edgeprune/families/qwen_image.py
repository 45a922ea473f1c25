"""Qwen-Image: `QwenImageTransformer2DModel`, joint blocks with two streams, packed latents, modulation by time alone.

Names and shapes follow diffusers. A removed branch contributes nothing to its residual stream; a removed norm keeps its
LayerNorm and gets constant modulation. Modulation, a third of the weights, reads the timestep only, so its rows are the
same for every prompt.

Text has a length of its own: `hidden` has rows of zeros where a prompt has no tokens. Such a row stays zero in the text
stream before and after each block, by which `run` tells padding that attention leaves out. An image's positions are
counted from its middle, and text stands after them, so that no position depends on the length of a text.

Guidance scales each token of the guided velocity back to the norm that it has with the prompt. Not supported: images as
conditions (Edit, Layered), guidance as an input.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, shown
from edgeprune.families import packing
from edgeprune.families.architecture import (
    STREAMS,
    WHERE,
    Config,
    Encoder,
    Hints,
    LatentSpace,
    Shape,
    Source,
    bounded,
    config_number,
    extrapolated,
    guided_above_one,
)
from edgeprune.families.encoders import DESCRIBING, QWEN2_5_VL
from edgeprune.families.joint import BLOCK, attention, check_axes, known_fields, linear, width
from edgeprune.families.network import Array, Axes
from edgeprune.families.packing import PATCH
from edgeprune.families.parts import VAE_QWEN_IMAGE
from edgeprune.families.surgery import Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

_COMPONENT_OF = {
    "img_mod": "norm", "txt_mod": "context_norm", "attn": "attn", "img_mlp": "mlp", "txt_mlp": "context_mlp",
}  # fmt: skip
_MODULE_OF = {component: module for module, component in _COMPONENT_OF.items()}
_MODULATION = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod\.1|norm_out\.linear)\.(weight|bias)")
_MLP_RATIO, _SINES = 4, 256
_MOST_TEXT, _POSITIONS = 1024, 4096
"""Most tokens of a prompt in QwenImagePipeline, and positions of an axis on each side of an image's middle."""
_FIFTY_STEPS = {"num_inference_steps": 50, "guidance_scale": 4.0}
_OTHER_MODELS = {
    "guidance_embeds": "a model that takes guidance", "zero_cond_t": "Edit", "use_additional_t_cond": "Layered",
    "use_layer3d_rope": "Layered",
}  # fmt: skip
"""Fields that the published text-to-image models have switched off, and what they are for."""


def _block_shapes(d: int, head: int) -> dict[str, Shape]:
    shapes = linear("img_mod.1", 6 * d, d) | linear("txt_mod.1", 6 * d, d)
    shapes |= {f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        shapes |= linear(f"attn.{name}", d, d)
    for name in ("img_mlp", "txt_mlp"):
        shapes |= linear(f"{name}.net.0.proj", _MLP_RATIO * d, d) | linear(f"{name}.net.2", d, _MLP_RATIO * d)
    return shapes


@functools.lru_cache(maxsize=8)
def _ids(rows: int, columns: int) -> NDArray[np.float32]:
    """Return an image's positions (N, 3): frame, and row and column from the middle. Read-only: sent to a device once.

    Args:
        rows: of tokens.
        columns: of tokens.
    """
    sides = (np.arange(count) - (count - count // 2) for count in (rows, columns))
    flat = np.stack(np.meshgrid(0, *sides, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    flat.flags.writeable = False
    return flat


@functools.lru_cache(maxsize=8)
def _text_ids(first: int, tokens: int) -> NDArray[np.float32]:
    """Return the positions of text (M, 3), the same on each axis."""
    flat = np.repeat(np.arange(first, first + tokens, dtype=np.float32)[:, None], 3, axis=1)
    flat.flags.writeable = False
    return flat


class QwenImage:
    """Qwen-Image, in all roles of `Family`; the roles describe the methods."""

    name = "qwen-image"
    pipeline = "QwenImagePipeline"
    vae = VAE_QWEN_IMAGE
    overflows = False
    components = ("norm", "context_norm", "attn", "mlp", "context_mlp")
    norms = ("norm", "context_norm")
    embedder = "time_text_embed"
    encoders = (Encoder("text_encoder", QWEN2_5_VL, chat=DESCRIBING, padding=False),)
    tail = ("norm_out.", "proj_out.")
    streams: Mapping[str, tuple[str, ...]] = {"joint": STREAMS}
    position_inputs = ("img_ids", "txt_ids")
    conditioning_inputs = ("timestep",)

    def block_count(self, config: Config) -> int:
        """Read `num_layers`."""
        return config_number(config, "num_layers", most=MOST_BLOCKS)

    def width(self, config: Config) -> int:
        """Multiply the number of heads by their width."""
        return width(config)

    def kinds(self, config: Config) -> dict[str, range]:
        """All blocks have two streams."""
        return {"joint": range(self.block_count(config))}

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """List every tensor of the diffusers state dict.

        Raises:
            InputError: the config is of another model of the family, or a field is missing or out of range.
        """
        for field, meant in _OTHER_MODELS.items():
            if (found := config.get(field) or False) is not False:
                raise InputError(f"{WHERE}: {field}: found {shown(found)}, expected false: {meant} is not supported")
        if (patch := config_number(config, "patch_size", PATCH)) != PATCH:
            raise InputError(f"{WHERE}: patch_size: found {patch}, expected {PATCH}, as in the published model")
        head, d, text = config_number(config, "attention_head_dim"), width(config), self.text_widths(config)[0]
        channels = config_number(config, "in_channels")
        out = config_number(config, "out_channels", channels)
        if out * PATCH**2 != channels:
            raise InputError(f"{WHERE}: in_channels, out_channels: found {channels} and {out}, expected four to one")
        check_axes(config, (16, 56, 56))
        shapes = linear("time_text_embed.timestep_embedder.linear_1", d, _SINES)
        shapes |= linear("time_text_embed.timestep_embedder.linear_2", d, d)
        shapes |= {"txt_norm.weight": (text,)} | linear("img_in", d, channels) | linear("txt_in", d, text)
        block = _block_shapes(d, head)
        for i in range(self.block_count(config)):
            shapes |= {f"transformer_blocks.{i}.{name}": shape for name, shape in block.items()}
        return bounded(shapes | linear("norm_out.linear", 2 * d, d) | linear("proj_out", PATCH**2 * out, d))

    def is_buffer(self, name: str) -> bool:
        """Qwen-Image stores no fixed tables."""
        return False

    def in_block(self, name: str) -> bool:
        """Match names below `transformer_blocks`."""
        return BLOCK.match(name) is not None

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Read block and component from diffusers' module names."""
        match = BLOCK.match(name)
        return (int(match[1]), _COMPONENT_OF.get(match[2].split(".")[0])) if match else None

    def modulates(self, name: str) -> bool:
        """Match both modulations of a block, and the one after the last."""
        return _MODULATION.fullmatch(name) is not None

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Nothing reads the context after the last block."""
        return frozenset({(self.block_count(config) - 1, "context_mlp")})

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Reduce the number of layers."""
        return config | {"num_layers": len(kept)}

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumber the blocks; of a removed norm the bias stays, at the mean input."""
        new_of = {old: new for new, old in enumerate(kept)}
        sources: dict[str, Source] = {}
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
                continue
            block, component = place
            gone = place in removed
            if block not in new_of or (gone and (component not in self.norms or name.endswith(".weight"))):
                continue
            sources[f"transformer_blocks.{new_of[block]}.{name.split('.', 2)[2]}"] = Source(name, constant=gone)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """Return the latent space of packed tokens; the longest text has to have positions beside the image."""
        channels = packing.latent_space(config).channels
        return LatentSpace(channels, PATCH, largest=2 * (_POSITIONS - _MOST_TEXT))

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return `joint_attention_dim`, and 0: there is no pooled text."""
        return config_number(config, "joint_attention_dim"), 0

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Count the tokens of the only text encoder that are read."""
        return max_sequence_length

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Return the settings of the model card; of a model whose name says so, few steps without guidance."""
        few = hints.few_steps is not None and not hints.dedistilled
        sampled = {"num_inference_steps": hints.few_steps or 8, "guidance_scale": 1.0} if few else _FIFTY_STEPS
        return {**sampled, "height": 1328, "width": 1328, "max_sequence_length": 512}

    def takes_guidance(self, config: Config) -> bool:
        """Report no: the model is guided by a second evaluation."""
        return False

    def guided(self, config: Config, scale: float) -> bool:
        """Return True above 1."""
        return scale > 1

    def guide(self, without: Array, with_text: Array, scale: float) -> Array:
        """Scale each packed token of the guided velocity to the norm that it has with the prompt."""
        wanted, found = (packing.pack(each) for each in (with_text, extrapolated(without, with_text, scale)))
        norm, changed = ((tokens * tokens).sum(-1)[..., None] ** 0.5 for tokens in (wanted, found))
        return packing.unpack(found * (norm / changed), with_text.shape)

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Follow `true_cfg_scale` of QwenImagePipeline, whose `guidance_scale` no published model takes."""
        return guided_above_one(scale)

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Go from 1 to 1 / steps, as in QwenImagePipeline."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, tokens: int, steps: int) -> float | None:
        """Use the scheduler's rule."""
        return None

    # ---------------------------------------------------------------- surgery

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build a stock model of the shorter config and take the removed components out."""
        import torch
        from diffusers import QwenImageTransformer2DModel

        shorter = known_fields(QwenImageTransformer2DModel, self.shorter_config(config, kept))
        with torch.device("meta"):
            model = QwenImageTransformer2DModel(**shorter)
            for new, old in enumerate(kept):
                for component in sorted(c for b, c in removed if b == old):
                    for swap in self._swaps(model.transformer_blocks[new], component, None):
                        setattr(swap.owner, swap.attribute, swap.replacement)
        # Its table of complex numbers is no buffer, so that no loader fills it.
        model.pos_embed = type(model.pos_embed)(10_000, list(model.config.axes_dims_rope), scale_rope=True)
        return cast("nn.Module", model)

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Qwen-Image stores no fixed tables: never called."""
        raise AssertionError(name)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps for a block, or for one component of it."""
        from edgeprune.families.removed import PassThrough

        blocks = cast("Any", model).transformer_blocks
        if component is None:
            return [Swap(blocks, attribute=str(block), replacement=PassThrough())]
        return self._swaps(blocks[block], component, mean)

    def _swaps(self, block: Any, component: str, mean: torch.Tensor | None) -> list[Swap]:
        """Return the swaps that take a component out of a block; `mean` is None for one on the meta device."""
        from edgeprune.families.removed import ConstantModulation, NoBranch

        module = _MODULE_OF[component]
        if component in self.norms:
            layers = getattr(block, module)
            return [Swap(layers, attribute="1", replacement=ConstantModulation(layers[1], mean))]
        return [Swap(block, attribute=module, replacement=NoBranch(2 if component == "attn" else 1))]

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return `transformer_blocks`."""
        return list(cast("Any", model).transformer_blocks)

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return `attn`, which has weights unless it was removed."""
        return attention(block)

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """Return `transformer_blocks.N.`."""
        return f"transformer_blocks.{index}."

    # ---------------------------------------------------------------- network

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Name the axes as FLUX.1's."""
        return packing.axes(pooled=False, guidance=False)

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Pack the latents; the model itself multiplies the timestep by 1000, and finds padding in the text.

        Raises:
            InputError: a text is longer than QwenImagePipeline takes.
        """
        if (tokens := text.shape[1]) > _MOST_TEXT:
            raise InputError(f"max_sequence_length: found a text of {tokens} tokens, expected up to {_MOST_TEXT}")
        grid = packing.grid_of(latents)
        return {
            "hidden_states": packing.pack(latents),
            "encoder_hidden_states": text,
            "timestep": sigma,
            "img_ids": _ids(*grid),
            "txt_ids": _text_ids(max(grid) // 2, tokens),
        }

    def call(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Pass the inputs by name, with a mask of the text, and rows and columns in place of positions."""
        ids, hidden = inputs["img_ids"], inputs["encoder_hidden_states"]
        rows, columns = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
        out = model(
            hidden_states=inputs["hidden_states"], encoder_hidden_states=hidden, timestep=inputs["timestep"],
            encoder_hidden_states_mask=(hidden != 0).any(-1), img_shapes=[[(1, rows, columns)]] * len(hidden),
            return_dict=False,
        )  # fmt: skip
        return cast("torch.Tensor", out[0])

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Unpack the tokens."""
        return packing.unpack(output, shape)

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the last states after the instruction, with zeros for padding; there is no pooled text."""
        hidden = outputs["text_encoder"]["last_hidden_state"][:, DESCRIBING.unread :]
        return hidden, np.zeros((len(hidden), 0), np.float32)

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the pipeline's `encode_prompt`, and append zeros; there is no pooled text."""
        texts, _ = pipe.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        hidden = texts.new_zeros(len(texts), max_sequence_length, texts.shape[-1])
        hidden[:, : texts.shape[1]] = texts
        return hidden, hidden.new_zeros(len(hidden), 0)

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return silu of the timestep's embedding: (B, D)."""
        import torch

        return torch.nn.functional.silu(cast("Any", model).time_text_embed(timestep / 1000, pooled))

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Qwen-Image stores no fixed tables."""
        return {}

    def positions(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return cosine and sine of the rotary embedding, (M + N, head width) each, the text's first."""
        if not exact:
            return packing.rotary(model, inputs)
        from edgeprune.families.joint_rotary import real

        ids, tokens = inputs["img_ids"], inputs["txt_ids"].shape[0]
        rows, columns = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
        return real(model.pos_embed([(1, rows, columns)], max_txt_seq_len=tokens, device=ids.device))

    def embed_tokens(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed tokens and text, whose padding stays zero."""
        hidden = inputs["encoder_hidden_states"]
        seen, text = (hidden != 0).any(-1, keepdim=True), model.txt_in(model.txt_norm(hidden))
        return model.img_in(inputs["hidden_states"]), text.masked_fill(~seen, 0.0)

    def conditioning(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed the timestep, which stays float32 even in half precision; of the tokens only the dtype is read."""
        return cast("torch.Tensor", model.time_text_embed(inputs["timestep"].float(), inputs["hidden_states"]))

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams and the conditioning."""
        return (*self.embed_tokens(model, inputs), self.conditioning(model, inputs))

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a block with real positions; rows of zeros in the text are padding, and stay zero."""
        from edgeprune.families.joint_rotary import use_real_numbers

        use_real_numbers(block)
        seen = (text != 0).any(-1)
        after, image = block(
            hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=seen, temb=modulation,
            image_rotary_emb=tuple(positions),
        )  # fmt: skip
        return image, after.masked_fill(~seen[..., None], 0.0)

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Tokens stay packed, so `unembed` needs no grid."""
        return ()

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return packed velocity (B, N, 4 C)."""
        return cast("torch.Tensor", model.proj_out(model.norm_out(image, modulation)))


FAMILY = QwenImage()
