"""Load the transformer or the pipeline of an artefact or an original folder: strictly, hashed, safetensors only.

Stock diffusers loads `transformer/` of a plan that removes only whole blocks; everything else loads here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.artefact.checks import check_pipeline, part_weights
from edgeprune.artefact.manifest import HALF, INT4, MANIFEST, Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.surgery import load_strictly, structure
from edgeprune.artefact.text import packed_text
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import is_out_of_memory, read_json
from edgeprune.families import CHANGED, family_of, family_of_model
from edgeprune.families.encoders import (
    LANGUAGE,
    LONG,
    QWEN2_5_VL,
    QWEN3_HEADLESS,
    T5,
    read_index,
    text_encoders,
    tokenizer_of,
)
from edgeprune.families.parts import VAE_FLUX2, VAES, tensor_of
from edgeprune.quantization.quantize import prepare
from edgeprune.quantization.text import prepare_text_encoder
from edgeprune.residency.compute import is_small
from edgeprune.residency.model_files import parts_of, weights_of
from edgeprune.residency.stored import CPU, StoredTransformer
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.sampling.latents import check_variance


@contextlib.contextmanager
def readable(path: Path, doing: str = "be loaded") -> Iterator[None]:
    """Turn the many errors of loading libraries over a damaged or missing file into one.

    Args:
        path: what is loaded.
        doing: what it cannot, for the message.

    Raises:
        InputError: `path` cannot be loaded. Out-of-memory errors pass unchanged.
    """
    try:
        yield
    except EdgepruneError:
        raise
    except Exception as error:  # vendors raise whatever a strange config leads them to
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{path}: cannot {doing} ({type(error).__name__}: {text[:300]})") from error


def load_transformer(
    folder: Path, *, quantized: bool, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """Return the transformer of an artefact or an original folder, in memory.

    Args:
        quantized: load `transformer_int4/`; packed integers stay integers, everything else becomes `dtype`.
        variant: of an original's weights, see residency/model_files.py.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    return open_transformer(folder, quantized=quantized, variant=variant).load(dtype)


def open_transformer(folder: Path, *, quantized: bool, variant: str | None = None) -> StoredTransformer:
    """Return the transformer of an artefact or an original folder, with its weights left on disk.

    Args:
        quantized: open `transformer_int4/`.
        variant: of an original's weights, see residency/model_files.py.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    config, family = read_config(folder)
    subfolder, plan, manifest = INT4 if quantized else HALF, None, None
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        if not (folder / subfolder).is_dir():
            stage = "quantize" if quantized else "prune"
            raise InputError(f"{folder / subfolder}: no such folder; run `edgeprune {stage} -o {folder}`")
        if not quantized:
            manifest.need_half(folder)
        manifest.verify(folder, subfolder)
        config, plan = manifest.config, manifest.prune_plan(folder)
        family = family_of(config, f"{folder / MANIFEST}: config")
        family.tensor_shapes(config)  # raises if a field is missing or out of range
        if plan:
            plan.check(config, folder / MANIFEST)
    elif quantized:
        raise InputError(f"{folder}: not quantised (no {MANIFEST}); run `edgeprune quantize {folder}`")
    elif str(config["_class_name"]).startswith(CHANGED):
        raise InputError(f"{folder}: no {MANIFEST}, and without it {HALF}/ cannot be loaded; make the artefact again")
    with readable(folder / subfolder):
        every = list(range(family.block_count(config)))
        model = structure(family, config, plan) if plan else family.build(config, every, frozenset())
    if quantized and manifest:
        prepare(family, model, group_size=manifest.group_size or 64)
    return StoredTransformer(family, model, Weights(folder / subfolder, variant))


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    quantized: bool | None = None,
    variant: str | None = None,
) -> Any:
    """Return a diffusers pipeline of an artefact or an original folder.

    Args:
        folder: the artefact's or the original's.
        dtype: of what is not packed, and to compute in; None for bfloat16 of a large model, float32 of a small one.
        quantized: use the INT4 transformer; by default if there is one.
        variant: of an original's weights, such as fp16; None for the full ones, or the only ones that there are.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    root = Path(folder)
    check_pipeline(root, variant)
    use_int4 = (root / INT4).is_dir() if quantized is None else quantized
    stored = open_transformer(root, quantized=use_int4, variant=variant)
    dtype = dtype or (torch.float32 if is_small(stored.numbers) else torch.bfloat16)
    return load_pipeline(root, stored.load(dtype), dtype, variant=variant, quantized=use_int4)


def load_pipeline(
    folder: Path,
    transformer: nn.Module,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    quantized: bool = False,
) -> Any:
    """Return the folder's pipeline around a loaded transformer. Never runs code or pickles of the folder.

    Text encoders have the layers that the pipeline reads; the folder keeps the others.

    Args:
        variant: of the other parts' weights, see residency/model_files.py.
        quantized: use a text encoder's INT4, if the folder has it.

    Raises:
        InputError: files are missing, damaged or do not fit the transformer.
    """
    index, family = read_index(folder), family_of_model(transformer)
    if (name := index.get("_class_name")) != family.pipeline:
        where = folder / "model_index.json"
        raise InputError(f"{where}: _class_name: found {shown(name)}, expected {family.pipeline!r}")
    # diffusers needs an explicit None for an absent encoder, whether the index lists it as absent or not at all.
    optional = [encoder.name for encoder in family.encoders if encoder.optional and encoder.name not in index]
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    absent |= {name: None for encoder in optional for name in (encoder, tokenizer_of(encoder))}
    kinds = text_encoders(folder) | {"vae": family.vae}
    states = {encoder.name: encoder.states for encoder in family.encoders}
    parts = {
        name: (load_packed(folder / name, kind, dtype, states.get(name, ())) if quantized and kind in LONG else None)
        or load_part(folder / name, kind, dtype, variant=variant, states=states.get(name, ()))
        for name, kind in kinds.items()
    }
    for encoder in (each for each in family.encoders if each.chat and each.name in kinds):
        pad_counted(parts[encoder.name], encoder.after)
        if index[encoder.name][-1] == QWEN3_HEADLESS:
            parts[encoder.name] = parts[encoder.name].model
    parts = {"transformer": transformer} | {name: part for name, part in parts.items() if part is not None}
    with readable(folder), quiet():
        import diffusers  # here, because transformers logs advice when its pipelines are imported

        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **parts, **dtype_option(dtype), **absent,
            **_variants(folder, [name for name in parts_of(index) if name not in parts], index, dtype, variant),
        )  # fmt: skip
    for name in kinds.keys() - parts.keys():
        check_loaded(folder / name, getattr(pipe, name), variant)
    for encoder in family.encoders:
        if encoder.chat and encoder.chat.thinking is not None:  # the folder's own is a program
            getattr(pipe, tokenizer_of(encoder.name)).chat_template = encoder.chat.template
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _variants(
    folder: Path, names: Iterable[str], index: dict[str, Any], dtype: torch.dtype, wish: str | None
) -> dict[str, Any]:
    """Load those of these parts whose weights are a variant. diffusers would need one variant that all parts have."""
    import diffusers
    import transformers

    out = {}
    for name in names:
        found = weights_of(folder / name, wish)
        if found and found.variant:
            library, kind = index[name]
            load = getattr(diffusers if library == "diffusers" else transformers, kind).from_pretrained
            part = load(folder / name, variant=found.variant, use_safetensors=True, local_files_only=True)
            out[name] = part.to(dtype)
    return out


def load_part(
    folder: Path,
    kind: str,
    dtype: torch.dtype | None = torch.float32,
    *,
    variant: str | None = None,
    states: Sequence[int] = (),
) -> Any:
    """Return a text encoder or a VAE whose tensors were read by name from its files.

    Vendors' loaders are not used: they fill what they do not find with random numbers.

    Args:
        folder: the part's folder, such as `vae`.
        kind: its class; None is returned for one that has no table in families/parts.py.
        dtype: of all tensors; None keeps their own.
        variant: of the weights, see residency/model_files.py.
        states: of a language model, the hidden states that are read, see `cut_unread`.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, a VAE's variance is below 0, or a file cannot be
            read.
    """
    weights = part_weights(folder, kind, variant)
    if weights is None:
        return None
    with readable(folder), quiet():
        model = empty_part(folder, kind, states)
        names = {name: tensor_of(kind, name) or name for name in model.state_dict() if _is_weight(name)}
        tensors = {name: weights[stored] for name, stored in names.items()}
        if kind == VAE_FLUX2:
            check_variance(tensors["bn.running_var"], folder)
        state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
        load_strictly(model, state | {n: torch.tensor(0) for n in model.state_dict() if not _is_weight(n)})
        complete(folder, kind, model)
    return model.eval()


def load_packed(folder: Path, kind: str, dtype: torch.dtype = torch.float32, states: Sequence[int] = ()) -> Any:
    """Return a T5 or a Qwen with the artefact's INT4 in memory, all else in `dtype`; None if the folder has none.

    Args:
        folder: the encoder's.
        kind: its class.
        dtype: of all other tensors.
        states: of a language model, the hidden states that are read, see `cut_unread`.

    Raises:
        InputError: a tensor is missing, unknown, damaged or of another shape.
    """
    tensors = packed_text(folder)
    if tensors is None:
        return None
    with readable(folder), quiet():
        model = prepare_text_encoder(empty_part(folder, kind, states), tensors.precision)
        tensors.check(model)
        state = {name: tensors(name) for name in model.state_dict()}
        load_strictly(model, {n: t if n.endswith(PACKED) else t.to(dtype) for n, t in state.items()})
        complete(folder, kind, model)
    return model.eval()


def cut_unread(encoder: Any, states: Sequence[int]) -> None:
    """Remove the layers of a causal language model that only unread states need, in place.

    transformers norms the last state that it returns, and the model's own last state is read no more, so the norm and
    the head go as well: the states that are read stay what they are.

    Args:
        encoder: the model.
        states: the hidden states that are read; 0 is the embedding.
    """
    encoder.model.layers = encoder.model.layers[: max(states)]
    encoder.model.norm, encoder.lm_head = nn.Identity(), nn.Identity()


def pad_counted(encoder: Any, count: int) -> None:
    """Append layers that do nothing to a language model, in place: its pipeline counts states from the end.

    Args:
        encoder: the model, see `cut_unread`.
        count: layers to append.
    """
    kind = type(encoder.model.layers[0])  # transformers collects the states of layers of this class
    does_nothing = {
        "__init__": nn.Module.__init__, "forward": lambda _, hidden_states, *__, **___: hidden_states,
        "attention_type": "full_attention",
    }  # fmt: skip
    for _ in range(count):
        encoder.model.layers.append(type("UnreadLayer", (kind,), does_nothing)())


def complete(folder: Path, kind: str, model: Any, device: torch.device = CPU) -> None:
    """Give a network that has its weights what files do not store.

    Args:
        folder: the part's folder.
        kind: its class.
        model: the network.
        device: where its weights are.

    Raises:
        EdgepruneError: this version of transformers has a table that is not known here.
    """
    if kind == T5:
        model.set_input_embeddings(model.get_input_embeddings())  # one tensor under two names
    if kind in LANGUAGE:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
        return
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and not name.endswith(PACKED):  # those of layers that are read when they run
            owner, _, attribute = name.rpartition(".")
            if attribute != "position_ids":
                raise EdgepruneError(f"{folder}: {name}: found no numbers for it; use another version of transformers")
            ids = torch.arange(buffer.shape[-1], device=device)[None]
            model.get_submodule(owner).register_buffer(attribute, ids, persistent=False)


def empty_part(folder: Path, kind: str, states: Sequence[int] = ()) -> Any:
    """Return the network of a part's folder on the meta device.

    Args:
        folder: the part's folder, such as `vae`.
        kind: its class.
        states: of a language model, the hidden states that are read, see `cut_unread`.
    """
    import diffusers
    import transformers

    config = read_json(folder / "config.json")
    with torch.device("meta"):
        if kind in VAES:
            model: Any = getattr(diffusers, kind).from_config(config)
        else:
            network: Any = getattr(transformers, kind)
            config_class = network.config_class
            if kind == QWEN2_5_VL:
                from edgeprune.artefact.qwen_text import TextOfQwen as network
            model = network(config_class.from_dict(config))
    if states:
        cut_unread(model, states)
    return model


def check_loaded(folder: Path, model: nn.Module, variant: str | None = None) -> None:
    """Check that a vendor's loader found every tensor of a network in its files, and no other.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    weights = Weights(folder, variant, needed=_is_weight)
    state = {name: tensor for name, tensor in model.state_dict().items() if _is_weight(name)}
    stored = {tensor.data_ptr() for name, tensor in state.items() if name in weights.shapes and not tensor.is_meta}
    # A tensor that is tied to a stored one has the same memory.
    weights.check({n: tuple(t.shape) for n, t in state.items() if n in weights.shapes or t.data_ptr() not in stored})
    if empty := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise InputError(f"{folder}: {empty[0]}: its library loaded no numbers for it; use another version of it")


def _is_weight(name: str) -> bool:
    """Return False for the counter of a batch norm, which is an integer and changes nothing."""
    return not name.endswith("num_batches_tracked")


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype under the argument's name: diffusers 0.42 renamed it, and warns about the old name."""
    version = tuple(int(v) for v in metadata.version("diffusers").split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars of diffusers and transformers, which garble ours, and their advice to developers."""
    import diffusers.utils.logging
    import transformers.utils.logging

    vendors = (diffusers.utils.logging, transformers.utils.logging)
    levels = [vendor.get_verbosity() for vendor in vendors]
    for vendor in vendors:
        vendor.disable_progress_bar()
        vendor.set_verbosity_error()
    try:
        yield
    finally:
        for vendor, level in zip(vendors, levels, strict=True):
            vendor.enable_progress_bar()
            vendor.set_verbosity(level)
