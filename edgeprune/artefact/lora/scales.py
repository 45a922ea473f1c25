"""The scale of each layer of a LoRA: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.

Alpha is a tensor of the file (kohya, ComfyUI), or stands in its metadata (diffusers' `lora_adapter_metadata`), or in
PEFT's `adapter_config.json` next to the file. Without any, it is the rank, as in diffusers: the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json
from edgeprune.common.tensors import Tensors

CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Scales:
    """PEFT's settings of a file, by part of the pipeline; those under '' hold for every part."""

    where: str
    """The file that errors name."""
    settings: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Scales:
        """Read the settings of a LoRA file.

        Raises:
            InputError: they are damaged, or of an adapter that is no LoRA.
        """
        config = path.with_name(CONFIG)
        if path.name == "adapter_model.safetensors" and config.is_file():
            settings = read_json(config)
            if settings.get("peft_type", "LORA") != "LORA":
                raise InputError(f"{config}: peft_type: found {shown(settings['peft_type'])}, expected 'LORA'")
            return cls(str(config), {"": settings})
        where = f"{path}: {_METADATA}"
        try:
            with safe_open(path, framework="pt") as file:
                data = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{where}: not readable as JSON ({error})") from error
        if not isinstance(data, dict):
            raise InputError(f"{where}: found {type(data).__name__}, expected an object")
        settings = {}
        for name, value in data.items():
            part, _, key = name.partition(".")
            settings.setdefault(part, {})[key] = value
        return cls(where, settings)

    def known(self, part: str) -> bool:
        """Return whether the settings hold the alphas of a part's layers."""
        return "lora_alpha" in self._of(part)

    def of_layer(self, part: str, layer: str, held: Tensors) -> float:
        """Return the scale of a layer's LoRA.

        Args:
            part: see `Target.part`.
            layer: as the file names it.
            held: the layer's tensors by role.

        Raises:
            InputError: an alpha is not a finite number, or a setting asks for more than a scale.
        """
        if "down" not in held:
            return 1.0
        rank, settings = held["down"].shape[0], self._of(part)
        if settings.get("use_dora") and "magnitude" not in held:
            raise InputError(
                f"{self.where}: use_dora: found true, but {layer} has no magnitude; the file lacks tensors"
            )
        if "alpha" in held:
            alpha: Any = float(held["alpha"])
        else:
            alpha = settings.get("lora_alpha", rank)
            patterns = settings.get("alpha_pattern") or {}
            if not isinstance(patterns, dict):
                raise InputError(f"{self.where}: alpha_pattern: found {shown(patterns)}, expected alphas by layer")
            alpha = next((a for key, a in patterns.items() if _names(self.where, key, layer)), alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise InputError(f"{self.where}: alpha of {layer}: found {shown(alpha)}, expected a number")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _of(self, part: str) -> dict[str, Any]:
        return self.settings.get("", {}) | self.settings.get(part, {})


def _names(where: str, key: str, layer: str) -> bool:
    """Return whether a key of `alpha_pattern`, the end of a layer's name, means this layer."""
    if not re.fullmatch(r"[\w.]+", key):
        raise InputError(f"{where}: alpha_pattern: found {shown(key)}, expected the name of a layer, no pattern")
    return f".{layer}".endswith(f".{key}")
