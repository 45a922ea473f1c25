"""The supported families, found by the `_class_name` of a config. To add a family, add its file to `_MODULES`.

Importing this module does not load torch; a family's module loads at the first request for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.families.architecture import WHERE, Architecture, Config
from edgeprune.families.network import Network
from edgeprune.families.surgery import Surgery

if TYPE_CHECKING:
    from torch import nn

_MODULES = {
    "SD3Transformer2DModel": "edgeprune.families.sd3",
    "FluxTransformer2DModel": "edgeprune.families.flux",
    "Flux2Transformer2DModel": "edgeprune.families.flux2",
    "ZImageTransformer2DModel": "edgeprune.families.z_image",
    "QwenImageTransformer2DModel": "edgeprune.families.qwen_image",
}

SUPPORTED = tuple(_MODULES)
"""The classes of transformers that are families, in diffusers' words."""

CHANGED = "Edgeprune"
"""Prefix of diffusers' class name for a model with parts of blocks removed, which diffusers cannot load."""


class Family(Architecture, Surgery, Network, Protocol):
    """All three roles: one MMDiT architecture that edgeprune can prune, run and export."""


def family_of(config: Config, where: str = WHERE) -> Family:
    """Return the family of a config; `where` names the config's file in messages.

    Raises:
        InputError: the class is not a supported MMDiT.
    """
    name = config.get("_class_name")
    stock = name.removeprefix(CHANGED) if isinstance(name, str) else ""
    if stock not in _MODULES:
        raise InputError(
            f"{where}: _class_name: found {shown(name)}, expected an MMDiT: {', '.join(SUPPORTED)}; to add a family, "
            "see CONTRIBUTING.md"
        )
    family: Family = importlib.import_module(_MODULES[stock]).FAMILY
    return family


def has_family(index: Mapping[str, Any]) -> bool:
    """Return whether the transformer that a pipeline's model_index.json names is of a supported class."""
    entry = index.get("transformer")
    kind = entry[-1] if isinstance(entry, list) and entry else None
    return isinstance(kind, str) and kind.removeprefix(CHANGED) in SUPPORTED


def family_of_model(model: nn.Module) -> Family:
    """Return the family of a loaded transformer, also of one that FSDP wraps in a subclass.

    Raises:
        InputError: its class is not a supported MMDiT.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    supported = next((name for name in names if name.removeprefix(CHANGED) in _MODULES), names[0])
    return family_of({"_class_name": supported}, names[0])
