"""FLUX.1: `FluxTransformer2DModel`, joint blocks with two streams, then single-stream blocks; packed latents.

Names and shapes follow diffusers. Blocks have one index: the joint ones first, then the single ones. In a single block
text and image are one stream, and `proj_out` reads attention and MLP side by side: without one of them its columns are
cut. The bias of `proj_out` is the block's, and stays even when both are gone. Two by two latent pixels are a token.
The dev model takes the guidance scale as an input and needs no second evaluation; schnell has none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS
from edgeprune.families.base import (
    WHERE,
    Array,
    Axes,
    Config,
    Encoder,
    LatentSpace,
    ScalingGroup,
    Shape,
    Source,
    Swap,
    bounded,
    whole,
)
from edgeprune.families.encoders import CLIP_POOLED, T5
from edgeprune.families.joint import (
    BLOCK,
    COMPONENT_OF,
    attention,
    joint_groups,
    linear,
    linears,
    modulated,
    swaps,
    width,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_MODULATION = re.compile(
    r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm|norm_out)\.linear\.(weight|bias)"
)
_SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.(.+)")
# The columns of proj_out are cut, the rest of it stays: it is no component's.
_SINGLE_COMPONENT_OF = {"norm": "norm", "attn": "attn", "proj_mlp": "mlp"}
_MLP_RATIO, _PATCH, _THETA = 4, 2, 10_000


def _joint_shapes(d: int, head: int) -> dict[str, Shape]:
    shapes = linear("norm1.linear", 6 * d, d) | linear("norm1_context.linear", 6 * d, d)
    shapes |= {f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        shapes |= linear(f"attn.{n}", d, d)
    for n in ("ff", "ff_context"):
        shapes |= linear(f"{n}.net.0.proj", _MLP_RATIO * d, d) | linear(f"{n}.net.2", d, _MLP_RATIO * d)
    return shapes


def _single_shapes(d: int, head: int) -> dict[str, Shape]:
    shapes = linear("norm.linear", 3 * d, d) | linear("proj_mlp", _MLP_RATIO * d, d)
    shapes |= linear("proj_out", d, (1 + _MLP_RATIO) * d)
    shapes |= {f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k")}
    for n in ("to_q", "to_k", "to_v"):
        shapes |= linear(f"attn.{n}", d, d)
    return shapes


@functools.lru_cache(maxsize=8)
def _ids(rows: int, columns: int) -> NDArray[np.float32]:
    """Positions (rows * columns, 3) of tokens: 0, row, column. Read-only: a runtime need not send them twice."""
    out = np.zeros((rows, columns, 3), np.float32)
    out[..., 1] += np.arange(rows, dtype=np.float32)[:, None]
    out[..., 2] += np.arange(columns, dtype=np.float32)
    flat = out.reshape(-1, 3)
    flat.flags.writeable = False
    return flat


@functools.lru_cache(maxsize=8)
def _text_ids(tokens: int) -> NDArray[np.float32]:
    out = np.zeros((tokens, 3), np.float32)
    out.flags.writeable = False
    return out


class Flux:
    """See `Family` for what each method means."""

    name = "flux"
    pipeline = "FluxPipeline"
    components: tuple[str, ...] = ("norm", "context_norm", "attn", "mlp", "context_mlp")
    norms: tuple[str, ...] = ("norm", "context_norm")
    embedder = "time_text_embed"
    encoders: tuple[Encoder, ...] = (
        Encoder("text_encoder", CLIP_POOLED),
        Encoder("text_encoder_2", T5),
    )
    tail: tuple[str, ...] = ("norm_out.", "proj_out.")
    position_inputs = ("img_ids", "txt_ids")

    def block_count(self, config: Config) -> int:
        """`num_layers` joint blocks and `num_single_layers` single ones."""
        total = sum(whole(config, n, least=0, most=MOST_BLOCKS) for n in ("num_layers", "num_single_layers"))
        if not total:
            raise InputError(f"{WHERE}: num_layers and num_single_layers: found 0, expected a block")
        return total

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Every tensor of the diffusers state dict."""
        head, d = whole(config, "attention_head_dim"), width(config)
        channels, patch = whole(config, "in_channels"), whole(config, "patch_size", 1)
        out_channels = whole(config, "out_channels", channels)
        joint, pooled = self.text_widths(config)
        embedders = [("timestep_embedder", 256), ("text_embedder", pooled)]
        if config.get("guidance_embeds"):
            embedders.append(("guidance_embedder", 256))
        shapes: dict[str, Shape] = {}
        for name, size in embedders:
            shapes |= linear(f"time_text_embed.{name}.linear_1", d, size)
            shapes |= linear(f"time_text_embed.{name}.linear_2", d, d)
        shapes |= linear("context_embedder", d, joint) | linear("x_embedder", d, channels)
        self.block_count(config)
        for i in range(config["num_layers"]):
            shapes |= {f"transformer_blocks.{i}.{n}": s for n, s in _joint_shapes(d, head).items()}
        for i in range(config["num_single_layers"]):
            shapes |= {f"single_transformer_blocks.{i}.{n}": s for n, s in _single_shapes(d, head).items()}
        shapes |= linear("norm_out.linear", 2 * d, d) | linear("proj_out", patch * patch * out_channels, d)
        return bounded(shapes)

    def is_buffer(self, name: str) -> bool:
        """There are none."""
        return False

    def table(self, config: Config, name: str) -> torch.Tensor:
        """There is none."""
        raise AssertionError(name)

    def in_block(self, name: str) -> bool:
        """Below one of the two lists."""
        return bool(BLOCK.match(name) or _SINGLE.match(name))

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Block and component by diffusers' module names; single blocks come after the joint ones."""
        if found := BLOCK.match(name):
            return int(found[1]), COMPONENT_OF.get(found[2].split(".")[0])
        if found := _SINGLE.match(name):
            return config["num_layers"] + int(found[1]), _SINGLE_COMPONENT_OF.get(found[2].split(".")[0])
        return None

    def modulates(self, name: str) -> bool:
        """The linear layers of every norm."""
        return _MODULATION.fullmatch(name) is not None

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """A single block has no context of its own; that of the last block is not read again."""
        joint, count = config["num_layers"], self.block_count(config)
        single = {(i, c) for i in range(joint, count) for c in ("context_norm", "context_mlp")}
        return frozenset(single if count > joint else {(joint - 1, "context_mlp")})

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Fewer layers of both kinds."""
        joint = sum(i < config["num_layers"] for i in kept)
        return config | {"num_layers": joint, "num_single_layers": len(kept) - joint}

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumbered names; the columns of a single block's `proj_out` go with what they read."""
        d, joint = width(config), self.shorter_config(config, kept)["num_layers"]
        new_of = {old: new for new, old in enumerate(kept)}
        sources: dict[str, Source] = {}
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
                continue
            block, component = place
            if block not in new_of:
                continue
            rest, columns, constant = name.split(".", 2)[2], None, False
            if rest == "proj_out.weight":
                ranges = (("attn", (0, d)), ("mlp", (d, (1 + _MLP_RATIO) * d)))
                columns = tuple(r for c, r in ranges if (block, c) not in removed)
                if not columns:
                    continue
                columns = columns if len(columns) == 1 else None
            if (block, component) in removed:
                if component not in self.norms or rest.endswith(".weight"):
                    continue
                constant = True
            new = new_of[block]
            prefix = f"transformer_blocks.{new}" if new < joint else f"single_transformer_blocks.{new - joint}"
            sources[f"{prefix}.{rest}"] = Source(name, columns=columns, constant=constant)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """`in_channels` counts those of a token."""
        return LatentSpace(whole(config, "in_channels") // _PATCH**2, _PATCH)

    def text_widths(self, config: Config) -> tuple[int, int]:
        """`joint_attention_dim`, `pooled_projection_dim`."""
        return whole(config, "joint_attention_dim"), whole(config, "pooled_projection_dim")

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """T5's; of CLIP only the pooled text is read."""
        return max_sequence_length

    def defaults(self, config: Config) -> dict[str, Any]:
        """Those of the models' cards: dev, or schnell."""
        if config.get("guidance_embeds"):
            return {"guidance_scale": 3.5, "max_sequence_length": 512}
        return {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}

    def guided(self, config: Config, scale: float) -> bool:
        """Above 1, where the model does not take the scale itself."""
        return scale > 1 and not config.get("guidance_embeds")

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """From 1 to 1 / steps, as FluxPipeline has it."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, tokens: int, steps: int) -> float | None:
        """The scheduler's."""
        return None

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """As optimum names them."""
        image = {0: "batch_size", 1: "packed_height_width"}
        inputs: Axes = {
            "hidden_states": image,
            "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
            "pooled_projections": {0: "batch_size"},
            "timestep": {0: "batch_size"},
            "img_ids": {0: "packed_height_width"},
            "txt_ids": {0: "sequence_length"},
        }
        if config.get("guidance_embeds"):
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
            "pooled_projections": pooled,
            "timestep": sigma,
            "img_ids": _ids(rows, columns),
            "txt_ids": _text_ids(text.shape[1]),
        }
        return out | {"guidance": sigma * 0 + guidance} if config.get("guidance_embeds") else out

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Tokens back to where they were."""
        b, c, h, w = shape
        rows, columns = h // _PATCH, w // _PATCH
        tokens = output.reshape(b, rows, columns, c, _PATCH, _PATCH)
        return tokens.swapaxes(3, 4).swapaxes(2, 4).swapaxes(1, 2).reshape(b, c, h, w)

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """T5's last states, and CLIP's pooled text before any projection."""
        return outputs["text_encoder_2"]["last_hidden_state"], outputs["text_encoder"]["pooler_output"]

    # ---------------------------------------------------------------- modules

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """A stock model of the shorter config with the removed components taken out, on the meta device."""
        import torch
        from diffusers import FluxTransformer2DModel

        from edgeprune.families.removed import ConstantModulation, SingleBlock

        shorter = {k: v for k, v in self.shorter_config(config, kept).items() if not k.startswith("_")}
        with torch.device("meta"):
            model = FluxTransformer2DModel(**shorter)
            joint = len(model.transformer_blocks)
            for new, old in enumerate(kept):
                gone = sorted(c for b, c in removed if b == old)
                if new < joint:
                    for swap in (s for c in gone for s in swaps(model.transformer_blocks[new], c, None)):
                        setattr(swap.owner, swap.attribute, swap.replacement)
                    continue
                single = model.single_transformer_blocks[new - joint]
                if "norm" in gone:
                    single.norm.linear = ConstantModulation(single.norm.linear, None)
                if "attn" in gone or "mlp" in gone:
                    model.single_transformer_blocks[new - joint] = SingleBlock(single, gone)
        return cast("nn.Module", model)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Swaps for one branch of one block of a running model."""
        from edgeprune.families.removed import ConstantModulation, PassThrough, Zeros

        loaded = cast("Any", model)
        joint = len(loaded.transformer_blocks)
        owner, index = (
            (loaded.transformer_blocks, block) if block < joint else (loaded.single_transformer_blocks, block - joint)
        )
        if component is None:
            return [Swap(owner, str(index), PassThrough())]
        if block < joint:
            return swaps(owner[index], component, mean)
        single = owner[index]
        if component == "norm":
            return [Swap(single.norm, "linear", ConstantModulation(single.norm.linear, mean))]
        if component == "attn":
            return [Swap(single, "attn", Zeros(single.norm.linear.in_features))]
        if component == "mlp":
            return [Swap(single, "proj_mlp", Zeros(single.proj_mlp.out_features))]
        return []

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """silu of the timestep plus guidance plus pooled-prompt embedding: (B, D)."""
        import torch

        loaded = cast("Any", model)
        scales = [torch.full_like(timestep, guidance * 1000)] if loaded.config.guidance_embeds else []
        return torch.nn.functional.silu(loaded.time_text_embed(timestep, *scales, pooled))

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """`transformer_blocks`, then `single_transformer_blocks`."""
        loaded = cast("Any", model)
        return [*loaded.transformer_blocks, *loaded.single_transformer_blocks]

    def attention(self, block: nn.Module) -> nn.Module | None:
        """`attn` of both kinds of blocks."""
        return attention(block)

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """`transformer_blocks.N.` or `single_transformer_blocks.N.`."""
        joint = len(cast("Any", model).transformer_blocks)
        return f"transformer_blocks.{index}." if index < joint else f"single_transformer_blocks.{index - joint}."

    def scaling_groups(self, block: nn.Module) -> list[ScalingGroup]:
        """Those of a joint block; of a single one what reads its norm. Its `proj_out` reads more than attention."""
        layers = linears(block)
        if "norm1.linear" in layers or "norm1_context.linear" in layers or "ff.net.2" in layers:
            return joint_groups(block)
        if "norm.linear" not in layers:
            return []
        members = ((0, "attn.to_q attn.to_k attn.to_v proj_mlp"),)
        (d,) = cast("Any", block).norm.norm.normalized_shape
        return modulated(layers, d, "norm.linear", members)

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By `encode_prompt`."""
        hidden, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=max_sequence_length)
        return hidden, pooled

    # ---------------------------------------------------------------- the forward pass in pieces, for exports

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """There are no tables."""
        return {}

    def positions(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Cosine and sine of the rotary embedding, (M + N, head width) each.

        In float32, where diffusers takes float64, which TensorRT and Core ML do not have. Angles stay below a few
        hundred, where float32 is off by 1e-5.
        """
        import torch

        ids = torch.cat((inputs["txt_ids"], inputs["img_ids"])).float()
        theta = model.config.get("rope_theta", _THETA)  # FLUX.2's config says it
        angles = []
        for axis, size in enumerate(model.config.axes_dims_rope):
            speeds = [float(theta ** (-i / size)) for i in range(0, size, 2)]
            angles.append(ids[:, axis, None] * torch.tensor(speeds, device=ids.device))
        # Neighbours share an angle.
        twice = torch.cat(angles, dim=-1)[..., None].expand(-1, -1, 2).flatten(1)
        return twice.cos(), twice.sin()

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, text, and timestep with guidance and pooled text; the two numbers stay float32 in half precision."""
        numbers = [inputs[n].float() * 1000 for n in ("timestep", "guidance") if n in inputs]
        return (
            model.x_embedder(inputs["hidden_states"]),
            model.context_embedder(inputs["encoder_hidden_states"]),
            model.time_text_embed(*numbers, inputs["pooled_projections"]),
        )

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both kinds of blocks take and give both streams."""
        text, image = block(
            hidden_states=image, encoder_hidden_states=text, temb=modulation, image_rotary_emb=tuple(positions)
        )
        return image, text

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Tokens stay packed."""
        return ()

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """(B, N, 4 C)."""
        return cast("torch.Tensor", model.proj_out(model.norm_out(image, modulation)))


FAMILY = Flux()
