"""Chooses ONNX Runtime's execution provider: the first of PROVIDERS that the installed package has.

This file has only names and their order; it imports no vendor. A provider in the package may still fail to start (a GPU
or its libraries are missing). ONNX Runtime then falls back to the next one; `started` reports that, or raises an error
if the user requested that provider. Only the first device is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.common.errors import InputError

PROVIDERS: dict[str, tuple[str, ...]] = {
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "coreml": ("CoreMLExecutionProvider",),
    "openvino": ("OpenVINOExecutionProvider",),
    "cpu": ("CPUExecutionProvider",),
}
"""By option value, the preferred one first: ONNX Runtime's name of the provider, then those for operators it lacks.

CUDA comes before TensorRT, whose provider builds engines at every start and for every new shape, which takes minutes.
`edgeprune export --target trt` writes engines that are kept."""


@dataclass(frozen=True)
class Choice:
    """A chosen provider and the reason."""

    name: str
    """A key of PROVIDERS."""
    providers: tuple[str, ...]
    """The list for an InferenceSession; the CPU is last."""
    why: str
    asked: bool
    """Whether the user requested it."""

    def started(self, found: str) -> str:
        """Return why a session uses `found`, the first provider that started.

        Raises:
            InputError: the user requested another one.
        """
        if found == self.providers[0]:
            return self.why
        if self.asked:
            raise InputError(
                f"provider: {self.providers[0]} does not start here; check its device and libraries, or omit provider= "
                "to use one that works"
            )
        return f"{self.providers[0]} is installed but does not start here"


def choose(available: Sequence[str], wanted: str | None = None) -> Choice:
    """Choose the provider.

    Args:
        available: the providers of the installed package, `onnxruntime.get_available_providers()`.
        wanted: a key of PROVIDERS, or None for the first available one.

    Raises:
        InputError: `wanted` is not a provider, or the package does not have it.
    """
    here = [name for name, providers in PROVIDERS.items() if providers[0] in available]
    if wanted is not None and wanted not in here:
        raise InputError(f"provider: found {wanted!r}, expected one that this onnxruntime has: {', '.join(here)}")
    name = here[0] if wanted is None else wanted
    chain = [p for p in (*PROVIDERS[name], *PROVIDERS["cpu"]) if p in available]
    if wanted is not None:
        why = f"provider={wanted}"
    else:
        why = "the only one here" if len(here) == 1 else f"the first of {', '.join(here)}, which are here"
    return Choice(name=name, providers=tuple(dict.fromkeys(chain)), why=why, asked=wanted is not None)
