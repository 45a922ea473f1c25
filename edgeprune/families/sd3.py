"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`, joint blocks with two streams.

Names and shapes follow diffusers. A removed branch contributes nothing to its residual stream; a removed norm keeps its
LayerNorm and gets constant modulation. The last block is `context_pre_only`: if it is removed, the new last block takes
that form, and its context modulation keeps two of six parts, reordered (AdaLayerNormZero: shift, scale, gate, ...;
AdaLayerNormContinuous: scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, shown
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
from edgeprune.families.encoders import CLIP, T5
from edgeprune.families.joint import (
    BLOCK,
    COMPONENT_OF,
    attention,
    known_fields,
    linear,
    swaps,
    take_out,
    width,
)
from edgeprune.families.network import Array, Axes
from edgeprune.families.surgery import Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

_MODULATION = re.compile(r"(transformer_blocks\.\d+\.norm1(_context)?|norm_out)\.linear\.(weight|bias)")
# A context_pre_only block reads keys and values from the context stream but does not write to it.
_ABSENT_IN_LAST = ("ff_context.", "attn.to_add_out.")
_MOST_POSITIONS = 2**30
"""Limit on the numbers in the position table; SD3.5 Medium's has 2 ** 27.8."""


def _dual(config: Config) -> frozenset[int]:
    """Return the indices of blocks with a second attention."""
    layers = config.get("dual_attention_layers") or []
    if not isinstance(layers, (list, tuple)) or not all(type(i) is int for i in layers):
        raise InputError(f"{WHERE}: dual_attention_layers: found {shown(layers)}, expected a list of indices")
    return frozenset(layers)


def _block_shapes(d: int, head: int, qk_norm: bool, last: bool, dual: bool) -> dict[str, Shape]:
    shapes = linear("norm1.linear", (9 if dual else 6) * d, d)
    shapes |= linear("norm1_context.linear", (2 if last else 6) * d, d)
    if qk_norm:
        shapes |= {f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for n in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0"):
        shapes |= linear(f"attn.{n}", d, d)
    if not last:
        shapes |= linear("attn.to_add_out", d, d)
    if dual:
        if qk_norm:
            shapes |= {f"attn2.{n}.weight": (head,) for n in ("norm_q", "norm_k")}
        for n in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"attn2.{n}", d, d)
    for n in ("ff",) if last else ("ff", "ff_context"):
        shapes |= linear(f"{n}.net.0.proj", 4 * d, d) | linear(f"{n}.net.2", d, 4 * d)
    return shapes


class SD3:
    """Stable Diffusion 3, in all roles of `Family`; the roles describe the methods."""

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    vae = "AutoencoderKL"
    overflows = False
    components = ("norm", "context_norm", "attn", "attn2", "mlp", "context_mlp")
    norms = ("norm", "context_norm")
    embedder = "time_text_embed"
    encoders = (
        Encoder("text_encoder", CLIP),
        Encoder("text_encoder_2", CLIP),
        Encoder("text_encoder_3", T5, optional=True),
    )
    tail = ("norm_out.", "proj_out.")
    streams: Mapping[str, tuple[str, ...]] = {"joint": STREAMS}
    position_inputs: tuple[str, ...] = ()
    conditioning_inputs = ("pooled_projections", "timestep")

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
        """List every tensor of the diffusers state dict."""
        head, d = config_number(config, "attention_head_dim"), width(config)
        channels, patch, table = (config_number(config, n) for n in ("in_channels", "patch_size", "pos_embed_max_size"))
        if table * table * d > _MOST_POSITIONS:  # diffusers computes the table even on the meta device
            raise InputError(
                f"{WHERE}: pos_embed_max_size: {table} makes a table of {table * table * d} numbers, "
                f"expected up to {_MOST_POSITIONS}"
            )
        config_number({"sample_size": 128} | config, "sample_size")  # the position table is scaled by it
        out_channels = config_number({"out_channels": 16} | config, "out_channels", channels)
        if (norm := config.get("qk_norm")) not in (None, "rms_norm"):
            raise InputError(f"{WHERE}: qk_norm: found {shown(norm)}, expected 'rms_norm' or null")
        (joint, pooled), caption = self.text_widths(config), config_number(config, "caption_projection_dim")
        shapes: dict[str, Shape] = {
            "pos_embed.pos_embed": (1, table * table, d),
            "pos_embed.proj.weight": (d, channels, patch, patch),
            "pos_embed.proj.bias": (d,),
        }
        for name, size in (("timestep_embedder", 256), ("text_embedder", pooled)):
            shapes |= linear(f"time_text_embed.{name}.linear_1", d, size)
            shapes |= linear(f"time_text_embed.{name}.linear_2", d, d)
        shapes |= linear("context_embedder", caption, joint)
        count = self.block_count(config)
        dual = _dual(config)
        for i in range(count):
            block = _block_shapes(d, head, config.get("qk_norm") is not None, i == count - 1, i in dual)
            shapes |= {f"transformer_blocks.{i}.{n}": shape for n, shape in block.items()}
        shapes |= linear("norm_out.linear", 2 * d, d) | linear("proj_out", patch * patch * out_channels, d)
        return bounded(shapes)

    def is_buffer(self, name: str) -> bool:
        """Match the position table."""
        return name == "pos_embed.pos_embed"

    def in_block(self, name: str) -> bool:
        """Match names below `transformer_blocks`."""
        return BLOCK.match(name) is not None

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Read block and component from diffusers' module names."""
        match = BLOCK.match(name)
        return (int(match[1]), COMPONENT_OF.get(match[2].split(".")[0])) if match else None

    def modulates(self, name: str) -> bool:
        """Match `norm1.linear` and `norm1_context.linear` of blocks, and `norm_out.linear`."""
        return _MODULATION.fullmatch(name) is not None

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Return the last block's context MLP, and `attn2` of every block without one."""
        count = self.block_count(config)
        dual = _dual(config)
        return frozenset({(count - 1, "context_mlp")} | {(i, "attn2") for i in range(count) if i not in dual})

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Reduce the number of layers and renumber the dual attention layers."""
        dual = _dual(config)
        return config | {
            "num_layers": len(kept),
            "dual_attention_layers": [new for new, old in enumerate(kept) if old in dual],
        }

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumber the blocks; the new last block loses its context output."""
        d = width(config)
        sources: dict[str, Source] = {}
        new_of = {old: new for new, old in enumerate(kept)}
        becomes_last = kept[-1] if kept[-1] != self.block_count(config) - 1 else None
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
                continue
            block, component = place
            if block not in new_of:
                continue
            rest = name.split(".", 2)[2]
            rows = None
            if block == becomes_last:
                if rest.startswith(_ABSENT_IN_LAST):
                    continue
                if component == "context_norm":
                    rows = ((d, 2 * d), (0, d))  # scale, shift
            constant = False
            if (block, component) in removed:
                if component not in self.norms or rest.endswith(".weight"):
                    continue
                constant = True
            sources[f"transformer_blocks.{new_of[block]}.{rest}"] = Source(name, rows, constant=constant)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """Read channels, patch and size of the position table."""
        return LatentSpace(
            channels=config_number(config, "in_channels"),
            patch=config_number(config, "patch_size"),
            largest=config_number(config, "pos_embed_max_size"),
        )

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return `joint_attention_dim` and `pooled_projection_dim`."""
        return config_number(config, "joint_attention_dim"), config_number(config, "pooled_projection_dim")

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Add CLIP's tokens and T5's."""
        return prompt_tokens + max_sequence_length

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Return the settings of Turbo's model card for a model of that name; the others are those of `Generation`."""
        if hints.few_steps is None or hints.dedistilled:
            return {}
        return {"num_inference_steps": hints.few_steps or 4, "guidance_scale": 0.0}

    def takes_guidance(self, config: Config) -> bool:
        """Report no: SD3 is guided by a second evaluation."""
        return False

    def guided(self, config: Config, scale: float) -> bool:
        """Return True above 1."""
        return scale > 1

    def guide(self, without: Array, with_text: Array, scale: float) -> Array:
        """Extrapolate from the velocity without the prompt."""
        return extrapolated(without, with_text, scale)

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Report a scale below 1, which Turbo's users may give."""
        return guided_above_one(scale)

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Use the scheduler's levels."""
        return None

    def shift(self, tokens: int, steps: int) -> float | None:
        """Use the scheduler's rule."""
        return None

    # ---------------------------------------------------------------- surgery

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build a stock model of the shorter config and take the removed components out."""
        import torch
        from diffusers import SD3Transformer2DModel

        shorter = known_fields(SD3Transformer2DModel, self.shorter_config(config, kept))
        with torch.device("meta"):
            model = SD3Transformer2DModel(**shorter)
        for new, old in enumerate(kept):
            take_out(model.transformer_blocks[new], (c for b, c in sorted(removed) if b == old))
        return cast("nn.Module", model)

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Compute sines and cosines of column and row, as PatchEmbed does; each is computed once for all positions."""
        import torch
        from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

        side, half = config_number(config, "pos_embed_max_size"), width(config) // 2
        base = config_number(config, "sample_size") // config_number(config, "patch_size")
        places = torch.arange(side, dtype=torch.float32) / (side / base)
        line = get_1d_sincos_pos_embed_from_grid(half, places, output_type="pt").float().to(dtype)
        table = torch.empty(side, side, 2 * half, dtype=dtype)
        table[..., :half], table[..., half:] = line, line[:, None]
        return table.view(1, side * side, 2 * half)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps for a block, or for one component of it."""
        from edgeprune.families.removed import PassThrough

        if component is None:
            owner = cast("Any", model).transformer_blocks
            return [Swap(owner, attribute=str(block), replacement=PassThrough())]
        return swaps(self.blocks(model)[block], component, mean)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return `transformer_blocks`."""
        return list(cast("Any", model).transformer_blocks)

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return `attn`, which both streams share."""
        return attention(block)

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """Return `transformer_blocks.N.`."""
        return f"transformer_blocks.{index}."

    # ---------------------------------------------------------------- network

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Name the axes as diffusers does."""
        latents = {0: "batch_size", 2: "height", 3: "width"}
        inputs: Axes = {
            "hidden_states": latents,
            "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
            "pooled_projections": {0: "batch_size"},
            "timestep": {0: "batch_size"},
        }
        return inputs, {"out_hidden_states": latents}

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Pass the latents on unpacked."""
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": sigma * 1000,
        }

    def call(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Pass the inputs by name."""
        return cast("torch.Tensor", model(**inputs, return_dict=False)[0])

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Return the output, which is the velocity."""
        return output

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Concatenate both CLIPs by width, pad with zeros to K, then append T5's tokens, or zeros without T5."""
        clips = [outputs[e.name] for e in self.encoders[:2]]
        # hidden_states.0 is the embedding, .n the last layer; SD3 reads the last but one.
        states = [sorted((int(k.rpartition(".")[2]), k) for k in o if k.startswith("hidden_states.")) for o in clips]
        joined = np.concatenate([o[s[-2][1]] for o, s in zip(clips, states, strict=True)], axis=-1)
        wide = self.text_widths(config)[0]
        joined = np.pad(joined, ((0, 0), (0, 0), (0, wide - joined.shape[-1])))
        absent = {"last_hidden_state": np.zeros((len(joined), max_sequence_length, wide), np.float32)}
        last = outputs.get("text_encoder_3", absent)["last_hidden_state"]
        return np.concatenate([joined, last], axis=1), np.concatenate([o["text_embeds"] for o in clips], axis=-1)

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the pipeline's `encode_prompt`, which appends zero tokens if T5 is absent."""
        hidden, _, pooled, _ = pipe.encode_prompt(
            *(prompts,) * 3, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return hidden, pooled

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return silu of the sum of timestep and pooled-prompt embeddings: (B, D)."""
        import torch

        embedding = cast("Any", model).time_text_embed(timestep, pooled)
        return torch.nn.functional.silu(embedding)

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split the position table into rows and columns if that loses nothing."""
        from edgeprune.families.positions import SeparatePatchEmbed, separate

        halves = separate(read("pos_embed.pos_embed"))
        if halves is None:
            return {}
        # The model gets tensors of the same kind as its others, real or fake.
        like = model.pos_embed.pos_embed
        empty = {name: like.new_empty(tensor.shape) for name, tensor in halves.items()}
        model.pos_embed = SeparatePatchEmbed(model.pos_embed, **empty)
        return {f"pos_embed.{name}": tensor for name, tensor in halves.items()}

    def positions(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return nothing: the patch embedding adds its position table."""
        return ()

    def embed_tokens(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed patches with their positions, and text."""
        return model.pos_embed(inputs["hidden_states"]), model.context_embedder(inputs["encoder_hidden_states"])

    def conditioning(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed the timestep with the pooled text."""
        return cast("torch.Tensor", model.time_text_embed(inputs["timestep"], inputs["pooled_projections"]))

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
        """The last block returns no text."""
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=modulation)
        return image, text

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Divide the latents' sides by the patch."""
        patch = int(model.config.patch_size)
        return tuple(n // patch for n in inputs["hidden_states"].shape[-2:])

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Map (B, N, p p C) to (B, C, h, w) with at most five axes at a time, as Core ML allows."""
        import torch

        patch = int(model.config.patch_size)
        out = model.proj_out(model.norm_out(image, modulation))
        channels_first = out.unflatten(-1, (patch**2, -1)).transpose(2, 3).flatten(2).transpose(1, 2)
        velocity = channels_first.unflatten(2, grid)
        return torch.nn.functional.pixel_shuffle(velocity, patch) if patch > 1 else velocity


FAMILY = SD3()
