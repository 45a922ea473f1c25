"""Models of transformers for metrics: from a local folder or the hub, safetensors alone, every weight accounted for.

A pickle is never read, and a layer that the file lacks is an error instead of random weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from edgeprune.common.errors import InputError


def device() -> torch.device:
    """Where metrics compute: CUDA if torch finds it, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(kind: Any, source: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)`: a model in evaluation mode on `device()`, or a processor or tokenizer.

    Args:
        kind: a class of transformers.
        source: folder or hub id.
        name: of the weights, as --weights has it.
        **options: for `from_pretrained`.

    Raises:
        InputError: no such folder, no safetensors in it, or not a whole model of this kind.
    """
    where = f"--weights {name}={source}"
    if not Path(source).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise InputError(
            f"{where}: no such folder; expected one of transformers (config.json, model.safetensors) or a hub id"
        )
    model = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    extra = {"use_safetensors": True, "output_loading_info": True} if model else {}
    try:
        found = kind.from_pretrained(source, **extra, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: not a usable {kind.__name__} with model.safetensors ({reason})") from error
    if not model:
        return found
    loaded, info = found
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{where}: {len(lacking)} weights of {kind.__name__} are not there, such as {lacking[0]}")
    return loaded.eval().to(device())
