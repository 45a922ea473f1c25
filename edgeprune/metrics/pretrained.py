"""Loads models of transformers for metrics, from a local folder or the hub.

Only safetensors are read, never pickles. A weight missing from the file is an error; transformers would use random
values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.residency.compute import Compute


def placed(device: str) -> torch.device:
    """Return the device that `--device` means: auto, cpu, cuda, cuda:1, mps or xpu.

    Raises:
        InputError: torch does not find it.
    """
    return Compute.of(ComputeOptions(device)).device


def load(kind: Any, source: str, name: str, device: str = "auto", **options: Any) -> Any:
    """Load with `kind.from_pretrained`: a model in evaluation mode on a device, or a processor or tokenizer.

    Args:
        kind: a class of transformers.
        source: a folder or hub id.
        name: the name of the weights in --weights.
        device: of a model, see `placed`.
        **options: passed to `from_pretrained`.

    Raises:
        InputError: the folder does not exist, has no safetensors, or is not a complete model of this class.
    """
    where = f"--weights {name}={source}"
    if not Path(source).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise InputError(
            f"{where}: no such folder; expected one of transformers (config.json, model.safetensors) or a hub id"
        )
    model = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    extra = {"use_safetensors": True, "output_loading_info": True} if model else {}
    try:
        loaded = kind.from_pretrained(source, **extra, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: not a usable {kind.__name__} with model.safetensors ({reason})") from error
    if not model:
        return loaded
    network, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{where}: {len(lacking)} weights of {kind.__name__} are not there, such as {lacking[0]}")
    return network.eval().to(placed(device))
