"""One part of a pipeline in memory at a time: each is read when it runs, and frees the one before.

This is what `enable_model_cpu_offload` of diffusers does, with the disk in place of the host's memory. The pipeline's
own call runs unchanged: the parts are its modules, whose weights come and go. Text is remembered from one call to the
next, so that the text encoder is read once for several images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from edgeprune.common import heap
from edgeprune.residency.compute import Compute

META = torch.device("meta")


class Encoded(Exception):
    """The text is encoded: the part that denoises is about to run."""


class Turns:
    """Whose turn it is to be in memory.

    Args:
        compute: where parts run.
        load: loads the part of a name onto that device.
    """

    def __init__(self, compute: Compute, load: Callable[[str], Any]) -> None:
        self.compute, self._load = compute, load
        self._parts: dict[str, Any] = {}
        self._now = ""
        self._denoiser = ""
        self._stops = False

    def first(self, name: str) -> Any:
        """Load a part for the pipeline that is being made; it stays until another is loaded."""
        self._free()
        self._parts[name], self._now = self._load(name), name
        return self._parts[name]

    def begin(self, pipe: Any, denoiser: str) -> None:
        """Let the parts of a pipeline come and go.

        Args:
            pipe: made of all parts that `first` returned.
            denoiser: the name of the one that denoises.
        """
        self._denoiser = denoiser
        for name, part in self._parts.items():
            add_hook_to_module(part, _Turn(self, name))
            if name.startswith("text_encoder"):
                part.forward = _Remembered(part.forward)

    def encode(self, calls: list[Callable[[], Any]]) -> None:
        """Encode the text of calls of the pipeline, and stop each where it would denoise; earlier text is forgotten."""
        for part in self._parts.values():
            if isinstance(part.forward, _Remembered):
                part.forward.known.clear()
        self._stops = True
        try:
            for call in calls:
                with contextlib.suppress(Encoded):
                    call()
        finally:
            self._stops = False

    def enter(self, name: str) -> None:
        """Make a part the one in memory.

        Raises:
            Encoded: it would denoise, and only text was asked for.
        """
        if self._stops and name == self._denoiser:
            raise Encoded
        if name != self._now:
            self._free()
            _fill(self._parts[name], self._load(name))
            self._now = name

    def _free(self) -> None:
        if self._now:
            self._parts[self._now].to(META)
            if self.compute.device.type == "cpu":
                heap.trim()
            else:
                torch.get_device_module(self.compute.device).empty_cache()


class _Turn(ModelHook):  # type: ignore[misc]
    """Calls a part in before it runs; diffusers' VAEs ask it before they decode, too."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.execution_device = turns.compute.device  # where the pipeline makes its tensors
        self._turns, self._name = turns, name

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Call the part in."""
        self._turns.enter(self._name)
        return args, kwargs


class _Remembered:
    """A network's forward pass, whose results are kept by what went in."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.known: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = repr(_plain((args, sorted(kwargs.items()))))
        if key not in self.known:
            self.known[key] = self._forward(*args, **kwargs)
        return self.known[key]


def _plain(value: Any) -> Any:
    """Return a value whose tensors are lists."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _fill(module: nn.Module, loaded: nn.Module) -> None:
    """Give a module the tensors of another one of the same structure."""
    others = dict(loaded.named_modules())
    for name, child in module.named_modules():
        child._parameters, child._buffers = others[name]._parameters, others[name]._buffers
