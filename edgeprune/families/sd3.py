"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`, joint blocks with two streams.

Names and shapes follow diffusers. Removal: a branch contributes nothing to its residual stream; a removed
norm keeps its LayerNorm and gets constant modulation. The last block is `context_pre_only`: when it is
removed, the block before takes that form, and its context modulation keeps two of six parts, reordered
(AdaLayerNormZero: shift, scale, gate, …; AdaLayerNormContinuous: scale, shift).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from edgeprune.errors import InputError
from edgeprune.families.base import Config, Producer, ScalingGroup, Shape, Source, Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_MODULATION = re.compile(r"(transformer_blocks\.\d+\.norm1(_context)?|norm_out)\.linear\.(weight|bias)")
_COMPONENT_OF = {
    "norm1": "norm", "norm1_context": "context_norm", "attn": "attn", "attn2": "attn2",
    "ff": "mlp", "ff_context": "context_mlp",
}  # fmt: skip
_MODULE_OF = {component: module for module, component in _COMPONENT_OF.items()}
# Of the context stream, a context_pre_only block still reads keys and values, but writes nothing.
_ABSENT_IN_LAST = ("ff_context.", "attn.to_add_out.")


def _linear(name: str, out: int, inp: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def _block_shapes(d: int, head: int, qk_norm: bool, last: bool, dual: bool) -> dict[str, Shape]:
    shapes = _linear("norm1.linear", (9 if dual else 6) * d, d)
    shapes |= _linear("norm1_context.linear", (2 if last else 6) * d, d)
    if qk_norm:
        shapes |= {f"attn.{n}.weight": (head,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for n in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0"):
        shapes |= _linear(f"attn.{n}", d, d)
    if not last:
        shapes |= _linear("attn.to_add_out", d, d)
    if dual:
        if qk_norm:
            shapes |= {f"attn2.{n}.weight": (head,) for n in ("norm_q", "norm_k")}
        for n in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"attn2.{n}", d, d)
    for n in ("ff",) if last else ("ff", "ff_context"):
        shapes |= _linear(f"{n}.net.0.proj", 4 * d, d) | _linear(f"{n}.net.2", d, 4 * d)
    return shapes


class SD3:
    """See `Family` for what each method means."""

    name = "sd3"
    components = ("norm", "context_norm", "attn", "attn2", "mlp", "context_mlp")
    embedder = "time_text_embed"

    def block_count(self, config: Config) -> int:
        """`num_layers`."""
        count = config.get("num_layers")
        if not isinstance(count, int) or not 1 <= count <= 1000:
            raise InputError(f"transformer/config.json: num_layers: found {count!r}, expected 1 to 1000")
        return count

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """Every tensor of the diffusers state dict."""
        try:
            head = int(config["attention_head_dim"])
            d = int(config["num_attention_heads"]) * head
            patch, channels = int(config["patch_size"]), int(config["in_channels"])
            out_channels = int(config.get("out_channels") or channels)
            table, joint = int(config["pos_embed_max_size"]), int(config["joint_attention_dim"])
            pooled, caption = int(config["pooled_projection_dim"]), int(config["caption_projection_dim"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"transformer/config.json: {error}: expected a number") from error
        shapes: dict[str, Shape] = {
            "pos_embed.pos_embed": (1, table * table, d),
            "pos_embed.proj.weight": (d, channels, patch, patch),
            "pos_embed.proj.bias": (d,),
        }
        for name, size in (("timestep_embedder", 256), ("text_embedder", pooled)):
            shapes |= _linear(f"time_text_embed.{name}.linear_1", d, size)
            shapes |= _linear(f"time_text_embed.{name}.linear_2", d, d)
        shapes |= _linear("context_embedder", caption, joint)
        count = self.block_count(config)
        dual = set(config.get("dual_attention_layers") or ())
        for i in range(count):
            block = _block_shapes(d, head, config.get("qk_norm") is not None, i == count - 1, i in dual)
            shapes |= {f"transformer_blocks.{i}.{n}": shape for n, shape in block.items()}
        return shapes | _linear("norm_out.linear", 2 * d, d) | _linear("proj_out", patch * patch * out_channels, d)

    def is_buffer(self, name: str) -> bool:
        """The position table is fixed."""
        return name == "pos_embed.pos_embed"

    def place(self, name: str) -> tuple[int, str | None] | None:
        """Block and component by diffusers' module names."""
        found = _BLOCK.match(name)
        return (int(found[1]), _COMPONENT_OF.get(found[2].split(".")[0])) if found else None

    def modulates(self, name: str) -> bool:
        """`norm1.linear`, `norm1_context.linear` of blocks, and `norm_out.linear`."""
        return _MODULATION.fullmatch(name) is not None

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """The last block's context MLP, and `attn2` where a block has none."""
        count = self.block_count(config)
        dual = set(config.get("dual_attention_layers") or ())
        return frozenset({(count - 1, "context_mlp")} | {(i, "attn2") for i in range(count) if i not in dual})

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Fewer layers; the dual attention layers are renumbered."""
        dual = set(config.get("dual_attention_layers") or ())
        return config | {
            "num_layers": len(kept),
            "dual_attention_layers": [new for new, old in enumerate(kept) if old in dual],
        }

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumbered names; the new last block loses its context output."""
        d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        sources: dict[str, Source] = {}
        new_of = {old: new for new, old in enumerate(kept)}
        becomes_last = kept[-1] if kept[-1] != self.block_count(config) - 1 else None
        for name in self.tensor_shapes(config):
            place = self.place(name)
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
                if component not in ("norm", "context_norm") or rest.endswith(".weight"):
                    continue
                constant = True
            sources[f"transformer_blocks.{new_of[block]}.{rest}"] = Source(name, rows, constant)
        return sources

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """A stock model of the shorter config with the removed components taken out, on the meta device."""
        import torch
        from diffusers import SD3Transformer2DModel

        shorter = {k: v for k, v in self.shorter_config(config, kept).items() if not k.startswith("_")}
        with torch.device("meta"):
            model = SD3Transformer2DModel(**shorter)
        for new, old in enumerate(kept):
            for component in (c for b, c in sorted(removed) if b == old):
                for swap in self._component_swaps(model.transformer_blocks[new], component, None):
                    setattr(swap.owner, swap.attribute, swap.replacement)
        return cast("nn.Module", model)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Swaps for one branch of one block of a running model."""
        from edgeprune.families.removed import PassThrough

        blocks = self.blocks(model)
        if component is None:
            return [Swap(blocks, str(block), PassThrough())]
        return self._component_swaps(blocks[block], component, mean)

    def _component_swaps(self, block: Any, component: str, mean: torch.Tensor | None) -> list[Swap]:
        from edgeprune.families.removed import ConstantModulation, NoBranch

        module = _MODULE_OF[component]
        if getattr(block, module, None) is None:
            return []
        if component in ("norm", "context_norm"):
            norm = getattr(block, module)
            return [Swap(norm, "linear", ConstantModulation(norm.linear, mean))]
        return [Swap(block, module, NoBranch(2 if component == "attn" else 1))]

    def modulation_input(self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """silu of the timestep plus pooled-prompt embedding: (B, D)."""
        import torch

        embedding = cast("Any", model).time_text_embed(timestep, pooled)
        return torch.nn.functional.silu(embedding)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """`transformer_blocks`."""
        return cast("nn.ModuleList", model.transformer_blocks)

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """`transformer_blocks.N.`."""
        return f"transformer_blocks.{index}."

    def scaling_groups(self, block: nn.Module) -> list[ScalingGroup]:
        """What reads each adaLN output, and the two output projections that read the attended values."""
        from torch import nn

        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        (d,) = cast("Any", block).norm1.norm.normalized_shape
        # Parts of the modulation by position: shift, scale, gate of attention; of the MLP; of the second attention.
        zero = ((0, "attn.to_q attn.to_k attn.to_v"), (3, "ff.net.0.proj"), (6, "attn2.to_q attn2.to_k attn2.to_v"))
        context = ((0, "attn.add_q_proj attn.add_k_proj attn.add_v_proj"), (3, "ff_context.net.0.proj"))
        groups = []
        for norm, members in (("norm1.linear", zero), ("norm1_context.linear", context)):
            if norm not in layers:
                continue
            # AdaLayerNormContinuous of the last block: scale, shift.
            last = layers[norm].out_features == 2 * d
            for part, names in members:
                consumers = tuple(n for n in names.split() if n in layers)
                if consumers and (part + 2) * d <= layers[norm].out_features:
                    shift, scale = (part + 1, part) if last else (part, part + 1)
                    producers = (
                        Producer(norm, (shift * d, (shift + 1) * d)),
                        Producer(norm, (scale * d, (scale + 1) * d), one_plus=True),
                    )
                    groups.append(ScalingGroup(consumers, producers))
        for attention in ("attn", "attn2"):
            consumers = tuple(n for n in (f"{attention}.to_out.0", f"{attention}.to_add_out") if n in layers)
            values = [n for n in (f"{attention}.to_v", f"{attention}.add_v_proj") if n in layers]
            if consumers:
                groups.append(ScalingGroup(consumers, tuple(Producer(n, (0, d)) for n in values)))
        return groups


FAMILY = SD3()
