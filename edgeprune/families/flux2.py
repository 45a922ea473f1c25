"""FLUX.2: `Flux2Transformer2DModel`, joint blocks with two streams, then single-stream blocks; packed latents.

Names and shapes follow diffusers; nothing has a bias. All blocks share one modulation, so norms are no components. In a
single block one projection feeds attention and MLP and one reads both: pruning one of the two cuts rows of the first
projection and columns of the second. The pipeline is klein's, which encodes text with Qwen3. Not supported: images as
conditions, and modulation compression (there are only three such layers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.fields import real_number
from edgeprune.families import packing, single
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
from edgeprune.families.encoders import QWEN3, THOUGHTLESS
from edgeprune.families.joint import BLOCK, COMPONENT_OF, attention, check_axes, known_fields, swaps, take_out, width
from edgeprune.families.network import Array, Axes
from edgeprune.families.parts import VAE_FLUX2
from edgeprune.families.surgery import Swap

if TYPE_CHECKING:
    import torch
    from torch import nn


def _hidden(config: Config) -> int:
    """Return the width between a block's MLP layers, after gating has halved it."""
    ratio = real_number({"mlp_ratio": 3.0} | config, "mlp_ratio", WHERE, least=0.1, most=64)
    return int(width(config) * ratio)


def _joint_shapes(d: int, head: int, hidden: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    }
    for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        shapes[f"attn.{n}.weight"] = (d, d)
    for n in ("ff", "ff_context"):
        shapes |= {f"{n}.linear_in.weight": (2 * hidden, d), f"{n}.linear_out.weight": (d, hidden)}
    return shapes


def _single_shapes(d: int, head: int, hidden: int) -> dict[str, Shape]:
    return {
        "attn.to_qkv_mlp_proj.weight": (3 * d + 2 * hidden, d), "attn.to_out.weight": (d, d + hidden),
        "attn.norm_q.weight": (head,), "attn.norm_k.weight": (head,),
    }  # fmt: skip


@functools.lru_cache(maxsize=8)
def _ids(rows: int, columns: int, tokens: int) -> NDArray[np.float32]:
    """Return positions (rows * columns * tokens, 4): time, row, column, word. Read-only: a runtime sends them once."""
    grid = np.meshgrid(0, np.arange(rows), np.arange(columns), np.arange(tokens), indexing="ij")
    flat = np.stack(grid, -1).reshape(-1, 4).astype(np.float32)
    flat.flags.writeable = False
    return flat


class Flux2:
    """FLUX.2, in all roles of `Family`; the roles describe the methods."""

    name = "flux2"
    pipeline = "Flux2KleinPipeline"
    vae = VAE_FLUX2
    overflows = False
    components = ("attn", "mlp", "context_mlp")
    norms: tuple[str, ...] = ()
    embedder = "time_guidance_embed"
    encoders = (Encoder("text_encoder", QWEN3, states=(9, 18, 27), chat=THOUGHTLESS),)
    tail = ("norm_out.", "proj_out.")
    streams: Mapping[str, tuple[str, ...]] = {"joint": STREAMS, "single": ("joined",)}
    position_inputs = ("img_ids", "txt_ids")
    conditioning_inputs = ("timestep", "guidance")

    def block_count(self, config: Config) -> int:
        """Count joint and single blocks."""
        return single.block_count(config)

    def width(self, config: Config) -> int:
        """Multiply the number of heads by their width."""
        return width(config)

    def kinds(self, config: Config) -> dict[str, range]:
        """Return joint blocks, then single ones."""
        return single.kinds(config)

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """List every tensor of the diffusers state dict."""
        head, d, hidden = config_number(config, "attention_head_dim"), width(config), _hidden(config)
        channels, patch = config_number(config, "in_channels"), config_number(config, "patch_size", 1)
        check_axes(config, (32, 32, 32, 32))
        out_channels = config_number(config, "out_channels", channels)
        sines, text = config_number(config, "timestep_guidance_channels", 256), self.text_widths(config)[0]
        self.block_count(config)
        shapes: dict[str, Shape] = {}
        for name in ("timestep_embedder", *(["guidance_embedder"] if self.takes_guidance(config) else [])):
            shapes[f"time_guidance_embed.{name}.linear_1.weight"] = (d, sines)
            shapes[f"time_guidance_embed.{name}.linear_2.weight"] = (d, d)
        for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
            shapes[f"{name}.linear.weight"] = (parts * d, d)
        shapes |= {"single_stream_modulation.linear.weight": (3 * d, d), "x_embedder.weight": (d, channels)}
        shapes["context_embedder.weight"] = (d, text)
        for i in range(config["num_layers"]):
            shapes |= {f"transformer_blocks.{i}.{n}": s for n, s in _joint_shapes(d, head, hidden).items()}
        for i in range(config["num_single_layers"]):
            shapes |= {f"single_transformer_blocks.{i}.{n}": s for n, s in _single_shapes(d, head, hidden).items()}
        return bounded(shapes | {"norm_out.linear.weight": (2 * d, d), "proj_out.weight": (patch**2 * out_channels, d)})

    def is_buffer(self, name: str) -> bool:
        """FLUX.2 has no fixed tables."""
        return False

    def in_block(self, name: str) -> bool:
        """Match both lists of blocks."""
        return single.in_block(name)

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Read block and component from diffusers' module names.

        In a single block only the norms of queries and keys belong to a component: attention and MLP share the rest.
        """
        if match := BLOCK.match(name):
            return int(match[1]), COMPONENT_OF.get(match[2].split(".")[0])
        if match := single.SINGLE.match(name):
            return config["num_layers"] + int(match[1]), "attn" if match[2].startswith("attn.norm_") else None
        return None

    def modulates(self, name: str) -> bool:
        """Report none: three layers for all blocks are not worth compressing."""
        return False

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """A single block has no context of its own; nothing reads the context after the last block."""
        return single.context_noops(config, ("context_mlp",))

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Reduce both numbers of layers."""
        return single.shorter_config(config, kept)

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumber the blocks, and cut the rows and columns of a single block's projections for a removed component."""
        d, hidden, joint = width(config), _hidden(config), self.shorter_config(config, kept)["num_layers"]
        new_of = {old: new for new, old in enumerate(kept)}
        sources: dict[str, Source] = {}
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
                continue
            block, component = place
            if block not in new_of or (block, component) in removed:
                continue
            rest, left = name.split(".", 2)[2], [c for c in ("attn", "mlp") if (block, c) not in removed]
            source = Source(name)
            if block >= config["num_layers"] and len(left) < 2 and component is None:
                if not left:
                    continue
                attends = left == ["attn"]
                if rest == "attn.to_out.weight":
                    source = Source(name, columns=((0, d) if attends else (d, d + hidden),))
                else:
                    source = Source(name, rows=((0, 3 * d) if attends else (3 * d, 3 * d + 2 * hidden),))
            sources[f"{single.prefix(new_of[block], joint)}{rest}"] = source
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """Return the latent space of packed tokens."""
        return packing.latent_space(config)

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return `joint_attention_dim`, and 0: there is no pooled text."""
        return config_number(config, "joint_attention_dim"), 0

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Count the tokens of the only text encoder."""
        return max_sequence_length

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Return the settings of the pipelines: those of dev and of Klein's base model, or of the distilled Klein."""
        few = {"num_inference_steps": 4, "guidance_scale": 1.0}
        many = {"num_inference_steps": 50, "guidance_scale": 4.0}
        return (few if hints.distilled and not self.takes_guidance(config) else many) | {"max_sequence_length": 512}

    def takes_guidance(self, config: Config) -> bool:
        """Return True for dev."""
        return bool(config.get("guidance_embeds", True))

    def guided(self, config: Config, scale: float) -> bool:
        """Return True above 1 if the model does not take the scale as an input."""
        return scale > 1 and not self.takes_guidance(config)

    def guide(self, without: Array, with_text: Array, scale: float) -> Array:
        """Extrapolate from the velocity without the prompt."""
        return extrapolated(without, with_text, scale)

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Ignore a scale above 1 if the model is distilled, as Flux2KleinPipeline does."""
        if self.takes_guidance(config):
            return scale, ""
        if distilled and scale > 1:
            return 1.0, f"guidance scale {scale:g} is ignored: model_index.json says is_distilled"
        return guided_above_one(scale)

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Go from 1 to 1 / steps, as in the pipelines."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, tokens: int, steps: int) -> float | None:
        """Follow Flux2Pipeline's `compute_empirical_mu`: lines at 10 and 200 steps, interpolated between them."""
        at_200 = 0.00016927 * tokens + 0.45666666
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)

    # ---------------------------------------------------------------- surgery

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build a stock model of the shorter config and take the removed components out."""
        import torch
        from diffusers import Flux2Transformer2DModel

        from edgeprune.families.removed import NoBranch, ParallelAttention

        shorter = known_fields(Flux2Transformer2DModel, self.shorter_config(config, kept))
        with torch.device("meta"):
            model = Flux2Transformer2DModel(**shorter)
            joint = len(model.transformer_blocks)
            for new, old in enumerate(kept):
                gone = sorted(c for b, c in removed if b == old)
                if new < joint:
                    take_out(model.transformer_blocks[new], gone)
                elif gone:
                    block = model.single_transformer_blocks[new - joint]
                    block.attn = NoBranch(1) if len(gone) > 1 else ParallelAttention(block.attn, gone[0])
        return cast("nn.Module", model)

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """FLUX.2 has no fixed tables: never called."""
        raise AssertionError(name)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps for a block, or for one component of it."""
        from edgeprune.families.removed import LaterColumns, PassThrough, Same, Zeros

        loaded = cast("Any", model)
        joint = len(loaded.transformer_blocks)
        if block < joint:
            if component is None:
                return [Swap(loaded.transformer_blocks, attribute=str(block), replacement=PassThrough())]
            return swaps(loaded.transformer_blocks[block], component, mean)
        if component is None:
            return [Swap(loaded.single_transformer_blocks, attribute=str(block - joint), replacement=Same())]
        module = loaded.single_transformer_blocks[block - joint].attn
        if component == "attn":
            return [Swap(module, attribute="to_out", replacement=LaterColumns(module.to_out, module.inner_dim))]
        if component == "mlp":
            return [Swap(module, attribute="mlp_act_fn", replacement=Zeros(module.mlp_hidden_dim))]
        return []

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the joint blocks, then the single ones."""
        return single.blocks(model)

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return `attn`, which both kinds of blocks have."""
        return attention(block)

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """Return the prefix below one of the two lists."""
        return single.block_prefix(model, index)

    # ---------------------------------------------------------------- network

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Name the axes as FLUX.1's."""
        return packing.axes(pooled=False, guidance=self.takes_guidance(config))

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Pack the latents; the model itself multiplies timestep and guidance by 1000."""
        out = {
            "hidden_states": packing.pack(latents),
            "encoder_hidden_states": text,
            "timestep": sigma,
            "img_ids": _ids(*packing.grid_of(latents), 1),
            "txt_ids": _ids(1, 1, text.shape[1]),
        }
        return out | {"guidance": sigma * 0 + guidance} if self.takes_guidance(config) else out

    def call(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Pass the inputs by name."""
        return cast("torch.Tensor", model(**inputs, return_dict=False)[0])

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Unpack the tokens."""
        return packing.unpack(output, shape)

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the hidden states that are read side by side, (B, M, 3 D); there is no pooled text."""
        (encoder,) = self.encoders
        hidden = np.concatenate([outputs[encoder.name][f"hidden_states.{state}"] for state in encoder.states], axis=-1)
        return hidden, np.zeros((len(hidden), 0), np.float32)

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the pipeline's `encode_prompt`; there is no pooled text."""
        hidden, _ = pipe.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return hidden, hidden.new_zeros(len(hidden), 0)

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return silu of the timestep and guidance embedding: (B, D)."""
        import torch

        loaded = cast("Any", model)
        scale = torch.full_like(timestep, guidance * 1000)
        return torch.nn.functional.silu(loaded.time_guidance_embed(timestep, scale))

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """FLUX.2 has no fixed tables."""
        return {}

    def positions(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return cosine and sine of the rotary embedding, (M + N, head width) each."""
        return packing.rotary(model, inputs, exact=exact)

    def embed_tokens(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed tokens and text."""
        return model.x_embedder(inputs["hidden_states"]), model.context_embedder(inputs["encoder_hidden_states"])

    def conditioning(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed timestep and guidance; the result (B, 16 D) has all blocks' modulations, too."""
        import torch

        embedder, conditioning = model.time_guidance_embed, cast("Any", 0)
        for name, layer in (("timestep", "timestep_embedder"), ("guidance", "guidance_embedder")):
            if name in inputs:
                sines = embedder.time_proj(inputs[name].float() * 1000)
                conditioning = conditioning + getattr(embedder, layer)(sines.to(inputs["hidden_states"].dtype))
        shared = (
            model.double_stream_modulation_img,
            model.double_stream_modulation_txt,
            model.single_stream_modulation,
        )
        return torch.cat([conditioning, *(layer(conditioning) for layer in shared)], dim=-1)

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
        """A single block reads both streams as one."""
        d = image.shape[-1]
        _, for_image, for_text, for_single = modulation.split((d, 6 * d, 6 * d, 3 * d), dim=-1)
        angles = tuple(positions)
        if any(hasattr(part, "norm1_context") for part in block.modules()):  # an estimator may have wrapped the block
            text, image = block(image, text, for_image, for_text, image_rotary_emb=angles)
        else:
            text, image = block(image, text, for_single, image_rotary_emb=angles, split_hidden_states=True)
        return image, text

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Tokens stay packed, so `unembed` needs no grid."""
        return ()

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return packed velocity (B, N, 4 C)."""
        embedding = modulation[..., : image.shape[-1]]
        return cast("torch.Tensor", model.proj_out(model.norm_out(image, embedding)))


FAMILY = Flux2()
