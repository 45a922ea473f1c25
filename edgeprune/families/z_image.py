"""Z-Image: `ZImageTransformer2DModel`, single-stream blocks over image and text; Turbo, and base with guidance.

Names and shapes follow diffusers. Before the blocks, two refiners each go over the image's tokens and the text's. They
are outside the blocks: no plan removes them, and they are in memory whenever the model is. A block's norms before and
after a branch belong to the branch. Its modulation reads 256 numbers only, so it is no component and is not compressed.

Text has a length of its own: `hidden` has rows of zeros where a prompt has no tokens. Image and text are each padded to
a multiple of 32 with a learned token. The first axis of the positions counts text, and the image stands after it, so
a row's rotary positions depend on the length of its text. Therefore `conditioning` carries the length besides the
modulation input.

Time runs the other way, 1 - sigma, and the model's output is the negated velocity. Not supported: images as conditions
(Omni, with SigLIP), other patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, real_number, shown
from edgeprune.families import padding
from edgeprune.families.architecture import (
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
from edgeprune.families.encoders import QWEN3, THOUGHTFUL
from edgeprune.families.joint import known_fields, linear
from edgeprune.families.network import Array, Axes
from edgeprune.families.packing import PATCH
from edgeprune.families.parts import VAE
from edgeprune.families.surgery import Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")
_BRANCH = {
    "attn": ("attention", "attention_norm1", "attention_norm2"),
    "mlp": ("feed_forward", "ffn_norm1", "ffn_norm2"),
}
"""A component's branch, and its norms, by module."""
_COMPONENT_OF = {module: component for component, modules in _BRANCH.items() for module in modules}
_MODULATION, _TIMESTEP, _SINES = 256, 1024, 256
"""Width of the modulation input at most, between the layers that make it, and before them."""
_PATCHED = "2-1"
"""Name of the layers for a token of two by two latent pixels of one frame: no other is published."""


def _block_shapes(config: Config, *, modulated: bool) -> dict[str, Shape]:
    d, head = config_number(config, "dim"), _head(config)
    hidden = int(d / 3 * 8)
    shapes: dict[str, Shape] = {f"attention.{n}.weight": (d, d) for n in ("to_q", "to_k", "to_v", "to_out.0")}
    if config.get("qk_norm", True):
        shapes |= {f"attention.{n}.weight": (head,) for n in ("norm_q", "norm_k")}
    shapes |= {"feed_forward.w1.weight": (hidden, d), "feed_forward.w3.weight": (hidden, d)}
    shapes |= {"feed_forward.w2.weight": (d, hidden)}
    shapes |= {f"{n}.weight": (d,) for _, *norms in _BRANCH.values() for n in norms}
    return shapes | (linear("adaLN_modulation.0", 4 * d, min(d, _MODULATION)) if modulated else {})


def _head(config: Config) -> int:
    """Return the width of a head, which the axes of positions share.

    Raises:
        InputError: the heads do not divide the width, or the axes are not three even numbers with this sum.
    """
    d, heads, axes = config_number(config, "dim"), config_number(config, "n_heads"), config.get("axes_dims")
    if d % heads:
        raise InputError(f"{WHERE}: n_heads: found {heads}, expected a divisor of dim, {d}")
    even = isinstance(axes, (list, tuple)) and all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
    if not even or len(axes or ()) != 3 or sum(axes or ()) != d // heads:
        raise InputError(f"{WHERE}: axes_dims: found {shown(axes)}, expected three even numbers, sum {d // heads}")
    return d // heads


def _lengths(config: Config) -> tuple[int, int, int]:
    """Return how many positions each axis has: text and image, rows, columns.

    Raises:
        InputError: they are not three whole numbers that have room for a row of text.
    """
    found = config.get("axes_lens")
    whole = isinstance(found, (list, tuple)) and all(type(n) is int and 1 <= n <= 2**16 for n in found)
    if not whole or len(found or ()) != 3 or (found or [0])[0] <= padding.MULTIPLE + 1:
        raise InputError(f"{WHERE}: axes_lens: found {shown(found)}, expected three numbers, the first above 33")
    text, rows, columns = map(int, found or ())
    return text, rows, columns


class ZImage:
    """Z-Image, in all roles of `Family`; the roles describe the methods."""

    name = "z-image"
    pipeline = "ZImagePipeline"
    vae = VAE
    overflows = True
    """Source: issue 14 of the repository Tongyi-MAI/Z-Image, where float16 draws black images; ComfyUI clamps (its pull
    request 11057)."""
    components = ("attn", "mlp")
    norms: tuple[str, ...] = ()
    embedder = "t_embedder"
    encoders = (Encoder("text_encoder", QWEN3, states=(35,), chat=THOUGHTFUL, after=1, padding=False),)
    tail = ("all_final_layer.",)
    streams: Mapping[str, tuple[str, ...]] = {"single": ("joined",)}
    position_inputs = ("img_ids",)
    conditioning_inputs = ("timestep", "text_lengths")

    def block_count(self, config: Config) -> int:
        """Read `n_layers`; the refiners do not count."""
        return config_number(config, "n_layers", most=MOST_BLOCKS)

    def width(self, config: Config) -> int:
        """Read `dim`."""
        return config_number(config, "dim")

    def kinds(self, config: Config) -> dict[str, range]:
        """All blocks read image and text as one stream."""
        return {"single": range(self.block_count(config))}

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        """List every tensor of the diffusers state dict."""
        d, text = self.width(config), self.text_widths(config)[0]
        _lengths(config)
        for field, expected in (("all_patch_size", [PATCH]), ("all_f_patch_size", [1])):
            if (found := config.get(field, expected)) not in (expected, tuple(expected)):
                raise InputError(
                    f"{WHERE}: {field}: found {shown(found)}, expected {expected}, as in the published model"
                )
        if (found := config.get("siglip_feat_dim")) is not None:
            raise InputError(f"{WHERE}: siglip_feat_dim: found {shown(found)}, expected null: Omni is not supported")
        for field, default in (("rope_theta", 256.0), ("t_scale", 1000.0), ("norm_eps", 1e-5)):
            real_number({field: default} | config, field, WHERE, least=1e-12, most=1e12)
        channels, vector = config_number(config, "in_channels") * PATCH**2, min(d, _MODULATION)
        shapes: dict[str, Shape] = {"x_pad_token": (1, d), "cap_pad_token": (1, d), "cap_embedder.0.weight": (text,)}
        shapes |= linear("cap_embedder.1", d, text) | linear(f"all_x_embedder.{_PATCHED}", d, channels)
        shapes |= linear("t_embedder.mlp.0", _TIMESTEP, _SINES) | linear("t_embedder.mlp.2", vector, _TIMESTEP)
        shapes |= linear(f"all_final_layer.{_PATCHED}.linear", channels, d)
        shapes |= linear(f"all_final_layer.{_PATCHED}.adaLN_modulation.1", d, vector)
        refiners = config_number(config, "n_refiner_layers", least=0, most=MOST_BLOCKS)
        for name, count in (
            ("noise_refiner", refiners),
            ("context_refiner", refiners),
            ("layers", self.block_count(config)),
        ):
            block = _block_shapes(config, modulated=name != "context_refiner")
            shapes |= {f"{name}.{i}.{n}": shape for i in range(count) for n, shape in block.items()}
        return bounded(shapes)

    def is_buffer(self, name: str) -> bool:
        """Z-Image has no fixed tables."""
        return False

    def in_block(self, name: str) -> bool:
        """Match names below `layers`."""
        return _BLOCK.match(name) is not None

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        """Read block and component from diffusers' module names."""
        match = _BLOCK.match(name)
        return (int(match[1]), _COMPONENT_OF.get(match[2].split(".")[0])) if match else None

    def modulates(self, name: str) -> bool:
        """Report none: the layers read 256 numbers already."""
        return False

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        """Every block has both branches."""
        return frozenset()

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        """Reduce the number of layers."""
        return config | {"n_layers": len(kept)}

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        """Renumber the blocks."""
        new_of = {old: new for new, old in enumerate(kept)}
        sources: dict[str, Source] = {}
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
            elif place[0] in new_of and place not in removed:
                sources[f"layers.{new_of[place[0]]}.{name.split('.', 2)[2]}"] = Source(name)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        """Read the channels; the axes of positions limit a side."""
        channels, most = config_number(config, "in_channels"), min(_lengths(config)[1:])
        return LatentSpace(channels, PATCH, most, multiple=padding.MULTIPLE)

    def text_widths(self, config: Config) -> tuple[int, int]:
        """Return `cap_feat_dim`, and 0: there is no pooled text."""
        return config_number(config, "cap_feat_dim"), 0

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        """Count the most tokens of the only text encoder, padded."""
        return padding.whole(max_sequence_length)

    def defaults(self, config: Config, hints: Hints) -> dict[str, Any]:
        """Return the settings of the model cards: Turbo's for a model of that name, or those of the base model."""
        if hints.few_steps is None or hints.dedistilled:
            return {"num_inference_steps": 50, "guidance_scale": 5.0, "max_sequence_length": 512}
        return {"num_inference_steps": hints.few_steps or 8, "guidance_scale": 0.0, "max_sequence_length": 512}

    def takes_guidance(self, config: Config) -> bool:
        """Report no: the base model is guided by a second evaluation."""
        return False

    def guided(self, config: Config, scale: float) -> bool:
        """Return True above 1."""
        return scale > 1

    def guide(self, without: Array, with_text: Array, scale: float) -> Array:
        """Extrapolate from the velocity without the prompt."""
        return extrapolated(without, with_text, scale)

    def heeded(self, config: Config, scale: float, *, distilled: bool = False) -> tuple[float, str]:
        """Say that ZImagePipeline counts from 0 what is counted from 1 here and in other pipelines."""
        if scale > 1:
            return scale, f"guidance scale {scale:g}: 1 is no guidance, so this is {scale - 1:g} in ZImagePipeline"
        return guided_above_one(scale)

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        """Go from 1 to 1 / steps, as in ZImagePipeline."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, tokens: int, steps: int) -> float | None:
        """Use the scheduler's rule."""
        return None

    # ---------------------------------------------------------------- surgery

    def build(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> nn.Module:
        """Build a stock model of the shorter config and take the removed components out."""
        import torch
        from diffusers import ZImageTransformer2DModel

        shorter = known_fields(ZImageTransformer2DModel, self.shorter_config(config, kept))
        with torch.device("meta"):
            model = ZImageTransformer2DModel(**shorter)
        for new, old in enumerate(kept):
            for component in sorted(c for b, c in removed if b == old):
                for swap in self._swaps(model.layers[new], component):
                    setattr(swap.owner, swap.attribute, swap.replacement)
        return cast("nn.Module", model)

    def table(self, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Z-Image has no fixed tables: never called."""
        raise AssertionError(name)

    def removal(self, model: nn.Module, block: int, component: str | None, mean: torch.Tensor) -> list[Swap]:
        """Return the swaps for a block, or for one component of it."""
        from edgeprune.families.removed import Same

        layers = cast("Any", model).layers
        if component is None:
            return [Swap(layers, attribute=str(block), replacement=Same())]
        return self._swaps(layers[block], component)

    def _swaps(self, block: nn.Module, component: str) -> list[Swap]:
        """Return the swaps that leave zeros of a branch and nothing of its norms."""
        from edgeprune.families.removed import NoBranch, Same

        branch, *norms = _BRANCH[component]
        return [Swap(block, branch, NoBranch(1)), *(Swap(block, norm, Same()) for norm in norms)]

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return `layers`."""
        return list(cast("Any", model).layers)

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return `attention`, which has weights unless it was removed."""
        module: nn.Module | None = getattr(block, "attention", None)
        return module if module is not None and any(True for _ in module.parameters()) else None

    def block_prefix(self, model: nn.Module, index: int) -> str:
        """Return `layers.N.`."""
        return f"layers.{index}."

    # ---------------------------------------------------------------- network

    def axes(self, config: Config) -> tuple[Axes, Axes]:
        """Name the axes; diffusers' own forward takes lists, which no graph has."""
        image = {0: "batch_size", 1: "packed_height_width"}
        inputs: Axes = {
            "hidden_states": image,
            "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
            "timestep": {0: "batch_size"},
            "img_ids": {0: "packed_height_width"},
            "text_lengths": {0: "batch_size"},
        }
        return inputs, {"out_hidden_states": image}

    def inputs(
        self, config: Config, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> dict[str, Array]:
        """Pack the latents, and pad both streams; a text ends where all that follows are rows of zeros.

        A row's text is not cut after its last token: rows of several prompts are joined, in a batch and out of it.

        Raises:
            InputError: a text is longer than the model has positions for.
        """
        tokens, places = text.shape[1], _lengths(config)[0]
        if padding.whole(tokens) + 1 >= places:  # the image stands after the text
            most = (places - 2) // padding.MULTIPLE * padding.MULTIPLE
            raise InputError(f"max_sequence_length: found a text of {tokens} tokens, expected up to {most}")
        ids = padding.ids(latents.shape[2] // PATCH, latents.shape[3] // PATCH)
        return {
            "hidden_states": padding.padded(padding.pack(latents), int(ids[:, 0].sum())),
            "encoder_hidden_states": padding.padded(text, tokens),
            "timestep": 1 - sigma,
            "img_ids": ids,
            "text_lengths": (text != 0).any(-1).sum(-1),
        }

    def call(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Undo packing and padding, which diffusers does itself, row by row; its output has zeros for padding."""
        import torch

        tokens, ids = inputs["hidden_states"], inputs["img_ids"]
        rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
        count, shape = rows * columns, (len(tokens), tokens.shape[-1] // PATCH**2, rows * PATCH, columns * PATCH)
        latents = padding.unpack(tokens[:, :count], shape)
        pairs = zip(inputs["encoder_hidden_states"], inputs["text_lengths"].tolist(), strict=True)
        texts = [text[: int(length)] for text, length in pairs]
        found = model(list(latents.unsqueeze(2)), inputs["timestep"], texts, return_dict=False)[0]
        packed = padding.pack(torch.stack(found).squeeze(2))
        return torch.nn.functional.pad(packed, (0, 0, 0, tokens.shape[1] - count))

    def velocity(self, config: Config, output: Array, shape: Shape) -> Array:
        """Leave padding out, unpack the tokens and negate them."""
        return -padding.unpack(output[:, : shape[2] * shape[3] // PATCH**2], shape)

    def join(
        self, config: Config, outputs: Mapping[str, Mapping[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the hidden state that is read, with zeros for padding; there is no pooled text."""
        (encoder,) = self.encoders
        hidden = outputs[encoder.name][f"hidden_states.{encoder.states[0]}"]
        return hidden, np.zeros((len(hidden), 0), np.float32)

    def encode(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the pipeline's `encode_prompt`, and append zeros; there is no pooled text."""
        # A copy, because the pipeline writes the chat into the list.
        texts, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        hidden = texts[0].new_zeros(len(texts), max_sequence_length, texts[0].shape[-1])
        for row, text in zip(hidden, texts, strict=True):
            row[: len(text)] = text
        return hidden, hidden.new_zeros(len(hidden), 0)

    def modulation_input(
        self, model: nn.Module, timestep: torch.Tensor, pooled: torch.Tensor, guidance: float = 0.0
    ) -> torch.Tensor:
        """Return the timestep's embedding, which has no activation: (B, 256)."""
        loaded = cast("Any", model)
        return cast("torch.Tensor", loaded.t_embedder((1 - timestep / 1000) * loaded.config.t_scale))

    def compact(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Z-Image has no fixed tables."""
        return {}

    def positions(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, exact: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return cosine and sine by place on the first axis, those of rows and columns by token, and 1 at image tokens.

        The first has the shape (places, pairs, 2), the second (N, pairs, 2), the last (N).
        """
        import torch

        from edgeprune.families.real_rotary import angles

        ids, config = inputs["img_ids"], model.config
        theta, dtype = float(config.rope_theta), torch.float64 if exact else torch.float32
        places = torch.arange(config.axes_lens[0], device=ids.device)
        grid = [angles(ids[:, axis], config.axes_dims[axis], theta, dtype) for axis in (1, 2)]
        return angles(places, config.axes_dims[0], theta, dtype), torch.cat(grid, dim=1), ids[:, 0]

    def embed_tokens(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed image and text, put the learned tokens into the padding, and send each through its refiners."""
        return self._refined(model, inputs, self.conditioning(model, inputs))

    def _refined(
        self, model: Any, inputs: Mapping[str, torch.Tensor], modulation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from edgeprune.families.real_rotary import seen, through, turns

        positions, vector, units = self.positions(model, inputs), modulation[:, :-1], modulation[:, -1]
        image = model.all_x_embedder[_PATCHED](inputs["hidden_states"])
        text = model.cap_embedder(inputs["encoder_hidden_states"])
        image = torch.where(positions[-1][None, :, None] > 0, image, model.x_pad_token)
        places = torch.arange(text.shape[1], device=text.device)
        text = torch.where((places < inputs["text_lengths"][:, None])[..., None], text, model.cap_pad_token)
        by_image, by_text = turns(positions, text.shape[1], units)
        for block in model.noise_refiner:
            image = through(block, image, None, by_image, vector)
        for block in model.context_refiner:
            text = through(block, text, seen(0, text.shape[1], units), by_text, None)
        return image, text

    def conditioning(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed the timestep; the last of the columns (B, 257) is the length of the text in multiples of 32."""
        import torch

        vector = model.t_embedder(inputs["timestep"].float() * model.config.t_scale).to(inputs["hidden_states"].dtype)
        # Small, so exact in half precision; the length itself is not.
        units = (inputs["text_lengths"] + padding.MULTIPLE - 1) // padding.MULTIPLE
        return torch.cat([vector, units[:, None].to(vector.dtype)], dim=-1)

    def embed(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams and the conditioning."""
        modulation = self.conditioning(model, inputs)
        return (*self._refined(model, inputs, modulation), modulation)

    def run(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        positions: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a block on both streams as one, the image first."""
        import torch

        from edgeprune.families.real_rotary import seen, through, turns

        tokens, units = image.shape[1], modulation[:, -1]
        pairs = torch.cat(turns(positions, text.shape[1], units), dim=1)
        mask = seen(tokens, text.shape[1], units)
        joined = through(block, torch.cat([image, text], dim=1), mask, pairs, modulation[:, :-1])
        return joined[:, :tokens], joined[:, tokens:]

    def grid(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Return the number of image tokens: tokens stay packed, so `unembed` needs no more."""
        return ((inputs["img_ids"][:, 0] > 0).sum(),)

    def unembed(self, model: Any, image: torch.Tensor, modulation: torch.Tensor, grid: tuple[Any, ...]) -> torch.Tensor:
        """Return the packed output (B, N, 4 C), with zeros for padding."""
        import torch

        out = model.all_final_layer[_PATCHED](image, c=modulation[:, :-1])
        padded = torch.arange(out.shape[1], device=out.device) >= grid[0]
        return cast("torch.Tensor", out.masked_fill(padded[None, :, None], 0.0))


FAMILY = ZImage()
