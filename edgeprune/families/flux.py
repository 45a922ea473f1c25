"""FLUX.1: `FluxTransformer2DModel`, joint blocks with two streams, then single-stream blocks; packed latents.

Names and shapes follow diffusers. Joint and single blocks share one index (single.py). In a single block text and
image are one stream, and `proj_out` reads the outputs of attention and MLP concatenated: pruning one cuts its columns.
The bias of `proj_out` belongs to the block and stays even if both are gone. Two by two latent pixels form a token
(packing.py). The dev model takes the guidance scale as an input and needs no second evaluation; schnell takes none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.families import packing, single
from edgeprune.families.architecture import (
    STREAMS,
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
from edgeprune.families.encoders import CLIP_POOLED, T5
from edgeprune.families.joint import (
    BLOCK,
    COMPONENT_OF,
    attention,
    check_axes,
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

_MODULATION = re.compile(
    r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm|norm_out)\.linear\.(weight|bias)"
)
# proj_out belongs to no component: pruning one only cuts its columns.
_SINGLE_COMPONENT_OF = {"norm": "norm", "attn": "attn", "proj_mlp": "mlp"}
_MLP_RATIO = 4


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
    """Return positions (rows * columns, 3) of tokens: 0, row, column. Read-only, so a runtime sends them only once."""
    out = np.zeros((rows, columns, 3), np.float32)
    out[..., 1] += np.arange(rows, dtype=np.float32)[:, None]
    out[..., 2] += np.arange(columns, dtype=np.float32)
    flat = out.reshape(-1, 3)
    flat.flags.writeable = False
    return flat


@functools.lru_cache(maxsize=8)
def _text_ids(tokens: int) -> NDArray[np.float32]:
    """Return positions (tokens, 3) of text: all 0. Read-only, as `_ids`."""
    out = np.zeros((tokens, 3), np.float32)
    out.flags.writeable = False
    return out


class Flux:
    """FLUX.1, in all roles of `Family`; the roles describe the methods."""

    name = "flux"
    pipeline = "FluxPipeline"
    vae = "AutoencoderKL"
    overflows = False
    components = ("norm", "context_norm", "attn", "mlp", "context_mlp")
    norms = ("norm", "context_norm")
    embedder = "time_text_embed"
    encoders = (Encoder("text_encoder", CLIP_POOLED), Encoder("text_encoder_2", T5))
    tail = ("norm_out.", "proj_out.")
    streams: Mapping[str, tuple[str, ...]] = {"joint": STREAMS, "single": STREAMS}
    position_inputs = ("img_ids", "txt_ids")
    conditioning_inputs = ("pooled_projections", "timestep", "guidance")

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
        head, d = config_number(config, "attention_head_dim"), width(config)
        channels, patch = config_number(config, "in_channels"), config_number(config, "patch_size", 1)
        check_axes(config, (16, 56, 56))
        out_channels = config_number(config, "out_channels", channels)
        joint, pooled = self.text_widths(config)
        embedders = [("timestep_embedder", 256), ("text_embedder", pooled)]
        if self.takes_guidance(config):
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
        """FLUX.1 has no fixed tables."""
        return False

    def in_block(self, name: str) -> bool:
        """Match both lists of blocks."""
        return single.in_block(name)

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Read block and component from diffusers' module names; single blocks follow the joint ones."""
        if match := BLOCK.match(name):
            return int(match[1]), COMPONENT_OF.get(match[2].split(".")[0])
        if match := single.SINGLE.match(name):
            return config["num_layers"] + int(match[1]), _SINGLE_COMPONENT_OF.get(match[2].split(".")[0])
        return None

    def modulates(self, name: str) -> bool:
        """Match the linear layers of every norm."""
        return _MODULATION.fullmatch(name) is not None

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """A single block has no context of its own; nothing reads the context after the last block."""
        return single.context_noops(config, ("context_norm", "context_mlp"))

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Reduce both numbers of layers."""
        return single.shorter_config(config, kept)

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumber the blocks, and cut the columns of a single block's `proj_out` that read a removed component."""
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
            prefix = single.prefix(new_of[block], joint)
            sources[f"{prefix}{rest}"] = Source(name, columns=columns, constant=constant)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """Return the latent space of packed tokens."""
        return packing.latent_space(config)

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return `joint_attention_dim` and `pooled_projection_dim`."""
        return config_number(config, "joint_attention_dim"), config_number(config, "pooled_projection_dim")

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Count T5's tokens; the model reads only CLIP's pooled text."""
        return max_sequence_length

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Return the settings of the model card: dev's or schnell's.

        A model without the input of guidance is schnell, unless its name or its scheduler, which is dev's, says that it
        was de-distilled: such a model is guided by a second evaluation. Few steps of dev are 8, as in Turbo-Alpha and
        Hyper-SD.
        """
        few = hints.few_steps
        dev = {"guidance_scale": 3.5, "max_sequence_length": 512}
        if self.takes_guidance(config):
            return dev | ({} if few is None else {"num_inference_steps": few or 8})
        if hints.dedistilled or (hints.shifts_by_size and few is None):
            return dev
        return {"num_inference_steps": few or 4, "guidance_scale": 0.0, "max_sequence_length": 256}

    def takes_guidance(self, config: Config) -> bool:
        """Return True for dev."""
        return bool(config.get("guidance_embeds"))

    def guided(self, config: Config, scale: float) -> bool:
        """Return True above 1 if the model does not take the scale as an input."""
        return scale > 1 and not self.takes_guidance(config)

    def guide(self, without: Array, with_text: Array, scale: float) -> Array:
        """Extrapolate from the velocity without the prompt."""
        return extrapolated(without, with_text, scale)

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Say that schnell takes no scale, which diffusers therefore ignores."""
        if self.guided(config, scale):
            return scale, (
                f"guidance scale {scale:g}: the model takes none, so each step is evaluated a second time without "
                "the prompt, as with true_cfg_scale in diffusers; schnell is meant for 0"
            )
        return (scale, "") if self.takes_guidance(config) else guided_above_one(scale)

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Go from 1 to 1 / steps, as in FluxPipeline."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, tokens: int, steps: int) -> float | None:
        """Use the scheduler's rule."""
        return None

    # ---------------------------------------------------------------- surgery

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build a stock model of the shorter config and take the removed components out."""
        import torch
        from diffusers import FluxTransformer2DModel

        from edgeprune.families.removed import ConstantModulation, SingleBlock

        shorter = known_fields(FluxTransformer2DModel, self.shorter_config(config, kept))
        with torch.device("meta"):
            model = FluxTransformer2DModel(**shorter)
            joint = len(model.transformer_blocks)
            for new, old in enumerate(kept):
                gone = sorted(c for b, c in removed if b == old)
                if new < joint:
                    take_out(model.transformer_blocks[new], gone)
                    continue
                block = model.single_transformer_blocks[new - joint]
                if "norm" in gone:
                    block.norm.linear = ConstantModulation(block.norm.linear, None)
                if "attn" in gone or "mlp" in gone:
                    model.single_transformer_blocks[new - joint] = SingleBlock(block, gone)
        return cast("nn.Module", model)

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """FLUX.1 has no fixed tables: never called."""
        raise AssertionError(name)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps for a block, or for one component of it."""
        from edgeprune.families.removed import ConstantModulation, PassThrough, Zeros

        loaded = cast("Any", model)
        joint = len(loaded.transformer_blocks)
        owner, index = (
            (loaded.transformer_blocks, block) if block < joint else (loaded.single_transformer_blocks, block - joint)
        )
        if component is None:
            return [Swap(owner, attribute=str(index), replacement=PassThrough())]
        module = owner[index]
        if block < joint:
            return swaps(module, component, mean)
        if component == "norm":
            constant = ConstantModulation(module.norm.linear, mean)
            return [Swap(module.norm, attribute="linear", replacement=constant)]
        if component == "attn":
            return [Swap(module, attribute="attn", replacement=Zeros(module.norm.linear.in_features))]
        if component == "mlp":
            return [Swap(module, attribute="proj_mlp", replacement=Zeros(module.proj_mlp.out_features))]
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
        """Name the axes as optimum does."""
        return packing.axes(pooled=True, guidance=self.takes_guidance(config))

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Pack the latents; the model itself multiplies timestep and guidance by 1000."""
        out = {
            "hidden_states": packing.pack(latents),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": sigma,
            "img_ids": _ids(*packing.grid_of(latents)),
            "txt_ids": _text_ids(text.shape[1]),
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
        """Return T5's last states and CLIP's pooled text before its projection."""
        return outputs["text_encoder_2"]["last_hidden_state"], outputs["text_encoder"]["pooler_output"]

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the pipeline's `encode_prompt`."""
        hidden, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=max_sequence_length)
        return hidden, pooled

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return silu of the sum of timestep, guidance and pooled-prompt embeddings: (B, D)."""
        import torch

        loaded = cast("Any", model)
        scales = [torch.full_like(timestep, guidance * 1000)] if loaded.config.guidance_embeds else []
        return torch.nn.functional.silu(loaded.time_text_embed(timestep, *scales, pooled))

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """FLUX.1 has no fixed tables."""
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
        """Embed timestep, guidance and pooled text; the numbers stay float32 even in half precision."""
        numbers = [inputs[n].float() * 1000 for n in ("timestep", "guidance") if n in inputs]
        return cast("torch.Tensor", model.time_text_embed(*numbers, inputs["pooled_projections"]))

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
        """Both kinds of blocks take and return both streams."""
        text, image = block(
            hidden_states=image, encoder_hidden_states=text, temb=modulation, image_rotary_emb=tuple(positions)
        )
        return image, text

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Tokens stay packed, so `unembed` needs no grid."""
        return ()

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return packed velocity (B, N, 4 C)."""
        return cast("torch.Tensor", model.proj_out(model.norm_out(image, modulation)))


FAMILY = Flux()
