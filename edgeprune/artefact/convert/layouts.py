"""Where each tensor of diffusers lies in a file of another layout.

Transformers: the names of the original code, which fuses layers that diffusers keeps apart, are those that LoRAs use
(artefact/lora/names.py). VAEs: the names of latent diffusion, whose decoder counts its levels from the end. Text
encoders have the names of transformers. diffusers converts whole state dicts in memory, knows one width of FLUX.1 and
drops what it does not know; here every tensor is accounted for before one is read. Tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.artefact.convert.stored import Rows, Stored
from edgeprune.artefact.lora.names import Names
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.families import Config, Family, Shape
from edgeprune.families.parts import VAE, tensor_of

if TYPE_CHECKING:
    import torch

Targets = list[tuple[str, Rows | None]]
"""The tensors of diffusers that a stored tensor holds, and their rows in it; None for all rows."""
NEVER = re.compile(r"(model_ema|loss|model_sampling)\.|(model_)?ema_|denoiser\.sigmas|__\w+__$|v_pred$|ztsnr$")
"""What trainers leave in a file besides the model."""
_UNREAD = {"z-image": ("norm_final.weight",)}
"""What files of a family have besides, and neither their authors' code nor diffusers' reads."""
_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.+)")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Piece:
    """Where one tensor of diffusers lies."""

    stored: Stored
    names: tuple[str, ...]
    """In the file. A tensor that is there under several names must be the same under all of them."""
    rows: Rows | None
    shape: Shape

    @property
    def kind(self) -> str:
        """The dtype that it is stored in."""
        return self.stored.kinds[self.names[0]]

    def read(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            InputError: it cannot be read, or differs from itself under another name.
        """
        import torch

        first, *others = self.names
        if self.rows is not None:
            return torch.cat([self.stored.read(first, rows) for rows in self.rows]).reshape(self.shape)
        tensor = self.stored.read(first)
        for other in others:
            if not torch.equal(tensor, self.stored.read(other)):
                raise InputError(f"{other}: found other numbers than in {first}, expected the same tensor")
        return tensor.reshape(self.shape)


def pieces(
    stored: Stored,
    names: Mapping[str, str],
    expected: Mapping[str, Shape],
    targets: Callable[[str], Targets | None],
    where: object,
) -> dict[str, Piece]:
    """Return where each tensor lies, having accounted for all of them.

    Axes of length one do not count: GGUF drops them, and VAEs of latent diffusion have 1x1 convolutions where diffusers
    has linear layers.

    Args:
        stored: the file.
        names: those of its tensors that belong to this network: the name after the prefix by the name in the file.
        expected: the network's tensors.
        targets: returns what a tensor holds; nothing if the network has no such tensor, None if it is not needed.
        where: the file, for errors.

    Raises:
        InputError: a tensor is missing, unknown, there twice, or of another shape.
    """
    found: dict[str, Piece] = {}
    for name, short in names.items():
        held = targets(short)
        if held is None:
            continue
        if not held or any(target not in expected for target, _ in held):
            raise InputError(f"{where}: {shown(name)}: found {stored.shapes[name]}, expected no such tensor")
        for target, rows in held:
            if (before := found.get(target)) and (rows or before.rows):
                raise InputError(
                    f"{where}: {shown(name)}: found {target} in it and in {before.names[0]}, expected it once"
                )
            others = before.names if before else ()
            found[target] = Piece(stored, (*others, name), rows, expected[target])
        _check_shape(stored.shapes[name], {target: expected[target] for target, _ in held}, f"{where}: {shown(name)}")
    if missing := sorted(expected.keys() - found.keys()):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{where}: {missing[0]}: found no such tensor{more}; the file is not whole, download it again")
    return found


def _check_shape(found: Shape, held: Mapping[str, Shape], where: str) -> None:
    """Check that a stored tensor has the rows of all that it holds, and their other axes."""
    first = next(iter(held.values()))
    expected = (sum(shape[0] for shape in held.values()), *first[1:])
    if [side for side in found if side != 1] != [side for side in expected if side != 1]:
        raise InputError(f"{where}: found {found}, expected {expected} for {', '.join(held)}")


def transformer_targets(family: Family, config: Config) -> Callable[[str], Targets | None]:
    """Return what a tensor of a transformer's file holds, by its name without the prefix."""
    names, shapes = Names(family, config, {}), family.tensor_shapes(config)

    def targets(name: str) -> Targets | None:
        if NEVER.match(name) or name in _UNREAD.get(family.name, ()):
            return None
        if name in shapes:
            return [(name, None)]
        if name == "pos_embed":
            return [("pos_embed.pos_embed", None)]
        layer, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias", "scale"):
            return []
        kind = "weight" if kind == "scale" else kind  # as FLUX's authors call the weight of a norm
        return [(f"{target.layer}.{kind}", target.rows) for target in names.find(layer)[1]]

    return targets


def encoder_targets(kind: str) -> Callable[[str], Targets | None]:
    """Return what a tensor of a text encoder of this class holds."""

    def targets(name: str) -> Targets | None:
        short = name.removeprefix("transformer.")
        needed = None if short == "logit_scale" else tensor_of(kind, short)
        return None if needed is None else [(needed, None)]

    return targets


def vae_targets(levels: int) -> Callable[[str], Targets | None]:
    """Return what a tensor of a VAE of so many resolutions holds, in the layout of latent diffusion or diffusers."""

    def targets(name: str) -> Targets | None:
        return None if NEVER.match(name) else [(tensor_of(VAE, ldm_name(name, levels)) or name, None)]

    return targets


def ldm_name(name: str, levels: int) -> str:
    """Return diffusers' name for a tensor of a VAE from that of latent diffusion; other names stay."""
    if match := _LEVEL.fullmatch(name):
        half, way, number, rest = match.groups()
        index = int(number) if way == "down" else levels - 1 - int(number)
        rest = re.sub(r"^block\.", "resnets.", rest).replace("nin_shortcut", "conv_shortcut")
        rest = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", rest)
        return f"{half}.{way}_blocks.{index}.{rest}"
    if match := _MIDDLE.fullmatch(name):
        half, block, number, rest = match.groups()
        if block == "block":
            return f"{half}.mid_block.resnets.{int(number) - 1}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
        layer, _, kind = rest.rpartition(".")
        return f"{half}.mid_block.attentions.{int(number) - 1}.{_ATTENTION.get(layer, layer)}.{kind}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
