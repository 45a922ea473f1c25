"""Saving memory in training: weights that stay in 16 bits, a teacher in lower precision, checkpointed activations.

`int8` stores the linear layers of blocks with one symmetric scale per output, in the checkpoint's own packed layer.
`bf16` stores all weights. parallel.py offloads or shards the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgeprune.families import Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.residency.compute import is_small
from edgeprune.residency.stored import StoredTransformer
from edgeprune.training import lora
from edgeprune.training.recipe import DistillOptions, Recipe, in_prefix
from edgeprune.training.trained import rank_of


def narrowed(options: DistillOptions, plan: PrunePlan, *, sharded: bool) -> bool:
    """Return whether weights of blocks that are not trained stay in the dtype of their file, see `block_weights`.

    They do of a large model that computes in bf16: autocast narrows them to it before it multiplies, so the results are
    the same.

    Args:
        options: of the training.
        plan: what was pruned.
        sharded: FSDP or DeepSpeed shards the models; they take tensors of one dtype.
    """
    return options.mixed_precision == "bf16" and not is_small(plan.before.parameters) and not sharded


def frozen_weights(family: Family, student: Any, plan: PrunePlan, options: DistillOptions, recipe: Recipe) -> set[str]:
    """Return the names of those `block_weights` of a student that are not trained."""

    def frozen(name: str) -> bool:
        if rank_of(options.train) is not None:
            return not lora.is_trained(name)
        return recipe.freeze_prefix and in_prefix(family, student.config, plan, name)

    return {name for name in block_weights(family, student) if frozen(name)}


def load_teacher(stored: StoredTransformer, precision: str, *, narrow: bool) -> Any:
    """Return a teacher whose weights are read as they are held, without a copy in float32 of all of them.

    Args:
        stored: what is read: all of its structure.
        precision: of the weights, see `lower`.
        narrow: those of blocks stay in the dtype of their file, see `narrowed`.

    Raises:
        InputError: a tensor cannot be read.
    """
    model = stored.model
    own = set(block_weights(stored.family, model)) if narrow or precision == "int8" else set()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    state = {name: stored.read(name, None if name in own else dtype) for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    state.clear()  # `lower` frees a layer at a time
    lower(stored.family, model, precision)
    return model.eval().requires_grad_(False)


def block_weights(family: Family, model: nn.Module) -> list[str]:
    """Return the names of the weights of linear layers in blocks, which are nearly all of a large model."""
    names = (f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return [name for name in names if family.in_block(name)]


@torch.no_grad()
def lower(family: Family, teacher: Any, precision: str) -> None:
    """Convert a teacher's weights to `bf16` or `int8` in place; `float32` changes nothing."""
    if precision == "bf16":
        nn.Module.to(teacher, torch.bfloat16)  # diffusers' own `to` warns of float32 modules even if there are none
    elif precision == "int8":
        for weight in block_weights(family, teacher):
            owner, _, attribute = weight.removesuffix(".weight").rpartition(".")
            parent = teacher.get_submodule(owner)
            setattr(parent, attribute, _int8(getattr(parent, attribute)))


def _int8(layer: nn.Linear) -> PackedLinear:
    size, weight = layer.in_features, layer.weight.float()  # 16 bits would round the quotient
    out = PackedLinear(size, layer.out_features, bits=8, group_size=size, bias=layer.bias is not None)
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
    out.weight_scale = scale
    out.weight_packed = pack((weight / scale.float()).round().clamp(-127, 127), 8)
    if layer.bias is not None:
        out.bias = layer.bias.detach().half()
    return out.to(weight.device)


def checkpoint_activations(student: Any) -> None:
    """Recompute the activations of blocks that gradients pass through; frozen blocks before them store none anyway."""
    student.enable_gradient_checkpointing(_checkpointed)


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    reached = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    if reached or any(p.requires_grad for p in block.parameters()):
        return checkpoint(block.__call__, *args, use_reentrant=False)
    return block(*args)
