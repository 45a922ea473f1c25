"""FLUX.2: `Flux2Transformer2DModel`, joint blocks with two streams, then single-stream blocks; packed latents.

Names and shapes follow diffusers; nothing has a bias. Modulation is made once for all blocks, so that norms are no
components. A single block has one projection in and one out for attention and MLP together: without one of them its
rows of the first and its columns of the second are cut. The pipeline is Klein's, which reads text by Qwen3.
What it leaves out: the text encoder's export, images as conditions, modulation compression (the layers are three).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import real
from edgeprune.families.base import (
    WHERE,
    Array,
    Axes,
    Config,
    Encoder,
    ScalingGroup,
    Shape,
    Source,
    Swap,
    bounded,
    whole,
)
from edgeprune.families.flux import Flux
from edgeprune.families.joint import BLOCK, COMPONENT_OF, swaps, width

if TYPE_CHECKING:
    import torch
    from torch import nn

_SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.(.+)")
_PATCH = 2


def _hidden(config: Config) -> int:
    """Width between a block's MLP layers, after the gated half is gone."""
    ratio = real({"mlp_ratio": 3.0} | config, "mlp_ratio", WHERE, least=0.1, most=64)
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
    """Positions (rows * columns * tokens, 4): time, row, column, word. Read-only, as a runtime sends such only once."""
    grid = np.meshgrid(0, np.arange(rows), np.arange(columns), np.arange(tokens), indexing="ij")
    flat = np.stack(grid, -1).reshape(-1, 4).astype(np.float32)
    flat.flags.writeable = False
    return flat


class Flux2(Flux):
    """See `Family` for what each method means; what is not here is as in FLUX.1."""

    name = "flux2"
    pipeline = "Flux2KleinPipeline"
    components = ("attn", "mlp", "context_mlp")
    norms: tuple[str, ...] = ()
    embedder = "time_guidance_embed"
    encoders = (Encoder("text_encoder", "Qwen3ForCausalLM"),)
    tail = ("norm_out.", "proj_out.")
    position_inputs = ("img_ids", "txt_ids")

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Every tensor of the diffusers state dict."""
        head, d, hidden = whole(config, "attention_head_dim"), width(config), _hidden(config)
        channels, patch = whole(config, "in_channels"), whole(config, "patch_size", 1)
        out_channels = whole(config, "out_channels", channels)
        sines, text = whole(config, "timestep_guidance_channels", 256), self.text_widths(config)[0]
        self.block_count(config)
        shapes: dict[str, Shape] = {}
        for name in ("timestep_embedder", *(["guidance_embedder"] if config.get("guidance_embeds", True) else [])):
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

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Block and component by diffusers' module names; of a single block only the norms of queries and keys."""
        if found := BLOCK.match(name):
            return int(found[1]), COMPONENT_OF.get(found[2].split(".")[0])
        if found := _SINGLE.match(name):
            return config["num_layers"] + int(found[1]), "attn" if found[2].startswith("attn.norm_") else None
        return None

    def modulates(self, name: str) -> bool:
        """Three layers for all blocks are not worth compressing."""
        return False

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """A single block has no context of its own; that of the last block is not read again."""
        joint, count = config["num_layers"], self.block_count(config)
        single = {(i, "context_mlp") for i in range(joint, count)}
        return frozenset(single if count > joint else {(joint - 1, "context_mlp")})

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumbered names; rows and columns of a single block's projections go with what they are for."""
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
                attended = left == ["attn"]
                if rest == "attn.to_out.weight":
                    source = Source(name, columns=((0, d) if attended else (d, d + hidden),))
                else:
                    source = Source(name, rows=((0, 3 * d) if attended else (3 * d, 3 * d + 2 * hidden),))
            new = new_of[block]
            prefix = f"transformer_blocks.{new}" if new < joint else f"single_transformer_blocks.{new - joint}"
            sources[f"{prefix}.{rest}"] = source
        return sources

    def text_widths(self, config: Config) -> tuple[int, int]:
        """`joint_attention_dim`; there is no pooled text."""
        return whole(config, "joint_attention_dim"), 0

    def defaults(self, config: Config) -> dict[str, Any]:
        """Those of the pipelines, dev's or Klein's."""
        if config.get("guidance_embeds", True):
            return {"num_inference_steps": 50, "guidance_scale": 4.0, "max_sequence_length": 512}
        return {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 512}

    def guided(self, config: Config, scale: float) -> bool:
        """Above 1, where the model does not take the scale itself."""
        return scale > 1 and not config.get("guidance_embeds", True)

    def shift(self, tokens: int, steps: int) -> float | None:
        """Flux2Pipeline's `compute_empirical_mu`: lines at 10 and at 200 steps, between them by steps."""
        at_200 = 0.00016927 * tokens + 0.45666666
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Named as FLUX.1's."""
        image = {0: "batch_size", 1: "packed_height_width"}
        inputs: Axes = {
            "hidden_states": image,
            "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
            "timestep": {0: "batch_size"},
            "img_ids": {0: "packed_height_width"},
            "txt_ids": {0: "sequence_length"},
        }
        if config.get("guidance_embeds", True):
            inputs = {**inputs, "guidance": {0: "batch_size"}}
        return inputs, {"out_hidden_states": image}

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Tokens of two by two latent pixels; the model multiplies timestep and guidance by 1000 itself."""
        b, c, h, w = latents.shape
        rows, columns = h // _PATCH, w // _PATCH
        # (B, C, i, p, j, q) to (B, i, j, C, p, q); numpy and torch share swapaxes, not permute.
        tokens = latents.reshape(b, c, rows, _PATCH, columns, _PATCH).swapaxes(1, 2).swapaxes(2, 4).swapaxes(3, 4)
        out = {
            "hidden_states": tokens.reshape(b, rows * columns, c * _PATCH**2),
            "encoder_hidden_states": text,
            "timestep": sigma,
            "img_ids": _ids(rows, columns, 1),
            "txt_ids": _ids(1, 1, text.shape[1]),
        }
        return out | {"guidance": sigma * 0 + guidance} if config.get("guidance_embeds", True) else out

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Not reached: the export refuses the text encoder."""
        raise InputError("text_encoder: found Qwen3ForCausalLM, which cannot be exported yet")

    # ---------------------------------------------------------------- modules

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """A stock model of the shorter config with the removed components taken out, on the meta device."""
        import torch
        from diffusers import Flux2Transformer2DModel

        from edgeprune.families.removed import NoBranch, ParallelAttention

        shorter = {k: v for k, v in self.shorter_config(config, kept).items() if not k.startswith("_")}
        with torch.device("meta"):
            model = Flux2Transformer2DModel(**shorter)
            joint = len(model.transformer_blocks)
            for new, old in enumerate(kept):
                gone = sorted(c for b, c in removed if b == old)
                if new < joint:
                    for swap in (s for c in gone for s in swaps(model.transformer_blocks[new], c, None)):
                        setattr(swap.owner, swap.attribute, swap.replacement)
                elif gone:
                    single = model.single_transformer_blocks[new - joint]
                    single.attn = NoBranch(1) if len(gone) > 1 else ParallelAttention(single.attn, gone[0])
        return cast("nn.Module", model)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Swaps for one branch of one block of a running model."""
        from edgeprune.families.removed import LaterColumns, PassThrough, Same, Zeros

        loaded = cast("Any", model)
        joint = len(loaded.transformer_blocks)
        if block < joint:
            if component is None:
                return [Swap(loaded.transformer_blocks, str(block), PassThrough())]
            return swaps(loaded.transformer_blocks[block], component, mean)
        if component is None:
            return [Swap(loaded.single_transformer_blocks, str(block - joint), Same())]
        attention = loaded.single_transformer_blocks[block - joint].attn
        if component == "attn":
            return [Swap(attention, "to_out", LaterColumns(attention.to_out, attention.inner_dim))]
        return [Swap(attention, "mlp_act_fn", Zeros(attention.mlp_hidden_dim))] if component == "mlp" else []

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """silu of the timestep and guidance embedding: (B, D)."""
        import torch

        loaded = cast("Any", model)
        scale = torch.full_like(timestep, guidance * 1000)
        return torch.nn.functional.silu(loaded.time_guidance_embed(timestep, scale))

    def scaling_groups(self, block: nn.Module) -> list[ScalingGroup]:
        """None: what makes a block's inputs is shared by all blocks."""
        return []

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By `encode_prompt`; no pooled text."""
        hidden, _ = pipe.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return hidden, hidden.new_zeros(len(hidden), 0)

    # ---------------------------------------------------------------- the forward pass in pieces, for exports

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, text, and (B, 16 D): the embedding of timestep and guidance, and the modulations of all blocks."""
        import torch

        image, embedder = model.x_embedder(inputs["hidden_states"]), model.time_guidance_embed
        found: Any = 0
        for name, layer in (("timestep", "timestep_embedder"), ("guidance", "guidance_embedder")):
            if name in inputs:
                sines = embedder.time_proj(inputs[name].float() * 1000)
                found = found + getattr(embedder, layer)(sines.to(image.dtype))
        made = (model.double_stream_modulation_img, model.double_stream_modulation_txt, model.single_stream_modulation)
        modulation = torch.cat([found, *(layer(found) for layer in made)], dim=-1)
        return image, model.context_embedder(inputs["encoder_hidden_states"]), modulation

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A single block takes both streams as one."""
        d = image.shape[-1]
        _, first, second, single = modulation.split((d, 6 * d, 6 * d, 3 * d), dim=-1)
        angles = tuple(positions)
        if hasattr(block, "norm1"):
            text, image = block(image, text, first, second, image_rotary_emb=angles)
        else:
            text, image = block(image, text, single, image_rotary_emb=angles, split_hidden_states=True)
        return image, text

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """(B, N, 4 C)."""
        embedding = modulation[..., : image.shape[-1]]
        return cast("torch.Tensor", model.proj_out(model.norm_out(image, embedding)))


FAMILY = Flux2()
