"""The reference: a pipeline of diffusers in float32 whose weights are read from the files by name, layer by layer.

It must not share the way in which edgeprune loads. diffusers' and transformers' own classes make the structures from
the configs, safetensors reads the tensors by name, and accelerate's hooks give each layer its weights while it runs, so
a model of any size runs in little memory. The pipeline's `encode_prompt` encodes the prompts, and a step is one of the
pipeline's own call, with its packing, timesteps, position ids and scheduler. INT4 is unpacked here as well.

Three things are shared with edgeprune: which files are a part's weights (residency/model_files.py), other names under
which files store a tensor (`tensor_of` in families/parts.py), and the modules that replace removed parts of blocks
(families/removed.py), for which diffusers has no class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import accelerate
import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import nn

from edgeprune.artefact.loading import quiet, readable
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.surgery import structure
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.families import CHANGED
from edgeprune.families.encoders import QWEN2_5_VL, text_encoders, tokenizer_of
from edgeprune.families.parts import tensor_of
from edgeprune.residency.model_files import weights_of
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.sampling.scheduler_classes import EULER_CLASS


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a network by the names of its state dict, each read from its file on request.

    Args:
        network: its structure, on the meta device.
        folder: of the files.
        kind: the network's class.
        variant: of the weights, see residency/model_files.py.

    Raises:
        InputError: a tensor is missing, or one too many.
    """

    def __init__(self, network: nn.Module, folder: Path, kind: str, variant: str | None) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = weights_of(folder, variant)
        self.places: dict[str, tuple[Path, str]] = {}
        for path in [folder / name for name in found.files] if found else []:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118
                    if (name := tensor_of(kind, stored)) is not None:
                        self.places[name] = (path, stored)
        self.names = {name: tensor_of(kind, name) or name for name in self.shapes}
        packed = {name: name.removesuffix("_packed") for name in self.places if name.endswith(".weight_packed")}
        there = {packed.get(name, name) for name in self.places if not name.endswith(".weight_scale")}
        if wrong := sorted(there ^ {*self.names.values()}):
            found_it = "found a tensor, expected none" if wrong[0] in there else "found no such tensor, expected one"
            raise InputError(f"{folder}: {wrong[0]}: {found_it} by config.json")

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.names[name]
        if stored in self.places:
            return self._read(stored)
        return unpacked(self._read(f"{stored}_packed"), self._read(f"{stored}_scale"), self.shapes[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _read(self, name: str) -> torch.Tensor:
        path, stored = self.places[name]
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor


def unpacked(packed: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the float32 weight (O, I) of packed integers.

    Args:
        packed: uint8 (O, I / 2) of two 4-bit numbers each, the lower nibble first, or (O, I); two's complement.
        scale: (O, groups).
        columns: I.
    """
    bits = 8 * packed.shape[1] // columns
    values = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1) if bits == 4 else packed
    least = 2 ** (bits - 1)
    signed = (values.to(torch.int16) ^ least) - least
    groups: torch.Tensor = signed.float().unflatten(1, (scale.shape[1], -1))
    return groups.mul_(scale.float()[..., None]).flatten(1)


def text_pipeline(folder: Path, device: torch.device, variant: str | None) -> Any:
    """Return the pipeline with its text encoders, and with a transformer that has no weights."""
    chats = {encoder.name: encoder.chat for encoder in read_config(folder)[1].encoders}
    with readable(folder), quiet():
        parts: dict[str, Any] = {"transformer": _structure(folder, "transformer")}
        for name, kind in text_encoders(folder).items():
            network = getattr(transformers, kind)
            with accelerate.init_empty_weights():  # buffers, which no file stores, are computed
                encoder = network(network.config_class.from_dict(read_json(folder / name / "config.json")))
            tokenizer = folder / tokenizer_of(name)
            words = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            if kind == QWEN2_5_VL:
                encoder.model.visual = nn.Identity()  # prompts have no images
            if chat := chats[name]:
                encoder.lm_head = nn.Identity()  # its file lacks a head that is tied, and no pipeline reads the words
                words.chat_template = chat.template  # the folder's own is a program
            parts[name] = _streamed(encoder, folder / name, kind, device, variant)
            parts[tokenizer_of(name)] = words
        return _pipeline(folder, parts)


def image_pipeline(folder: Path, subfolder: str, device: torch.device, variant: str | None) -> Any:
    """Return the pipeline with the transformer of a subfolder, and without text encoders."""
    with readable(folder / subfolder), quiet():
        model = _structure(folder, subfolder)
        kind = type(model).__name__
        return _pipeline(folder, {"transformer": _streamed(model, folder / subfolder, kind, device, variant)})


def step(
    pipe: Any, latents: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor, *, factor: int, **settings: Any
) -> torch.Tensor:
    """Take the first step of sampling by the pipeline's own call; return the latents (1, C, h, w) after it.

    Args:
        pipe: of `image_pipeline`.
        latents: noise (1, C, h, w).
        hidden: text (1, M, K).
        pooled: text (1, P); 0 wide if there is none.
        factor: pixels per side of a latent pixel.
        settings: further arguments of the pipeline: steps, guidance scale, height and width.
    """
    after: list[torch.Tensor] = []

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after.append(values["latents"])
        raise _TakenError  # what FLUX.2's pipeline does after its last step needs a VAE

    pipe.vae_scale_factor = factor  # of a pipeline without VAE it would be a guess
    text: dict[str, Any] = {"prompt_embeds": hidden}
    text |= {"pooled_prompt_embeds": pooled} if pooled.shape[-1] else {}
    if isinstance(pipe, diffusers.ZImagePipeline):  # it takes text without padding, and counts guidance from 0
        text = {"prompt_embeds": [row[(row != 0).any(-1)] for row in hidden]}
        settings |= {"guidance_scale": max(0.0, settings["guidance_scale"] - 1)}
    if isinstance(pipe, diffusers.QwenImagePipeline):  # its `guidance_scale` is an input of a transformer
        read = (hidden != 0).any(-1)
        most = int(read.sum(1).max())
        text = {"prompt_embeds": hidden[:, :most], "prompt_embeds_mask": read[:, :most].long()}
        settings["true_cfg_scale"] = settings.pop("guidance_scale")
    with torch.no_grad(), contextlib.suppress(_TakenError):
        pipe(latents=_packed(pipe, latents), output_type="latent", callback_on_step_end=stop, **text, **settings)
    return _unpacked(pipe, after[0], latents)


class _TakenError(Exception):
    """Ends a pipeline's call after the first step."""


def _packed(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents (1, C, h, w) as the pipeline's call takes them."""
    if hasattr(pipe, "_patchify_latents"):  # FLUX.2's call packs the pixels that it gets two by two
        return cast("torch.Tensor", pipe._patchify_latents(latents))
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def _unpacked(pipe: Any, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return latents of a pipeline's call in the shape of others, (1, C, h, w)."""
    if hasattr(pipe, "_patchify_latents"):
        ids = pipe._prepare_latent_ids(pipe._patchify_latents(like)).to(latents.device)
        return cast("torch.Tensor", pipe._unpatchify_latents(pipe._unpack_latents_with_ids(latents, ids)))
    if not hasattr(pipe, "_pack_latents"):
        return latents
    height, width = (side * pipe.vae_scale_factor for side in like.shape[2:])
    unpacked = cast("torch.Tensor", pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor))
    return unpacked.view_as(like)  # of one frame


def _structure(folder: Path, subfolder: str) -> Any:
    """Return a transformer on the meta device."""
    config = read_json(folder / subfolder / "config.json")
    if not str(config["_class_name"]).startswith(CHANGED):
        kind = getattr(diffusers, config["_class_name"])
        # The angles of Qwen-Image's positions are neither parameters nor buffers, and no file has them.
        computed = kind is diffusers.QwenImageTransformer2DModel
        with accelerate.init_empty_weights() if computed else torch.device("meta"):
            return kind.from_config(config)
    manifest = Manifest.load(folder)
    plan = manifest.prune_plan(folder)
    assert plan is not None  # `open_transformer` has read it
    return structure(read_config(folder)[1], manifest.config, plan)


def _streamed(network: Any, folder: Path, kind: str, device: torch.device, variant: str | None) -> Any:
    """Give a network on the meta device its weights, each while its layer computes, in float32."""
    tensors = StoredTensors(network, folder, kind, variant)
    buffers = {name: tensors[name].float().to(device) for name, _ in network.named_buffers() if name in tensors}
    network.load_state_dict(buffers, strict=False, assign=True)
    network.float()  # transformers makes it in the dtype of the config; accelerate widens tensors to the structure's
    accelerate.cpu_offload(network, device, state_dict=tensors)
    return network.eval()


def scheduler_of(folder: Path) -> Any:
    """Return the folder's scheduler or, where that is not Euler's, a plain one: the network's step is what is compared.

    The others show the network whole timesteps.
    """
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    if FlowMatch.load(folder).kind != EULER_CLASS:
        return kind()
    return kind.from_pretrained(folder / "scheduler")


def _pipeline(folder: Path, parts: Mapping[str, Any]) -> Any:
    _, family = read_config(folder)
    names = [name for encoder in family.encoders for name in (encoder.name, tokenizer_of(encoder.name))]
    make: Callable[..., Any] = getattr(diffusers, family.pipeline)
    pipe = make(scheduler=scheduler_of(folder), vae=None, **{**dict.fromkeys(names), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe
