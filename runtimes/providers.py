"""Which of ONNX Runtime's execution providers computes: the first of PROVIDERS that the installed package has.

Names and an order only, no vendor is imported. A provider that the package has may still not start (a GPU or its
libraries are missing): ONNX Runtime then goes on with the next one, and `started` says so or, where the user asked for
that provider, refuses. What it leaves out: providers' own options, and devices beyond the first.
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
"""By the name of the option, the preferred one first: ONNX Runtime's name, and those that take what it does not.

TensorRT's builds its engines anew at every start and for every new shape, which takes minutes, so CUDA goes before it:
for engines that are kept there is `edgeprune export --target trt`."""


@dataclass(frozen=True)
class Choice:
    """A provider and the reason for it."""

    name: str
    """A key of PROVIDERS."""
    providers: tuple[str, ...]
    """For an InferenceSession, the CPU last."""
    why: str
    asked: bool
    """Whether the user named it."""

    def started(self, found: str) -> str:
        """Why the session computes with `found`, its first provider.

        Raises:
            InputError: the user asked for another one.
        """
        if found == self.providers[0]:
            return self.why
        if self.asked:
            raise InputError(
                f"provider: found that {self.providers[0]} does not start here, expected its device and libraries; "
                "leave provider= out to take what works"
            )
        return f"{self.providers[0]} is installed but does not start here"


def choose(available: Sequence[str], wanted: str | None = None) -> Choice:
    """The provider to use.

    Args:
        available: ONNX Runtime's names of what the package has, `onnxruntime.get_available_providers()`.
        wanted: a key of PROVIDERS, or None for the first one there.

    Raises:
        InputError: `wanted` is no provider, or not there.
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
    return Choice(name, tuple(dict.fromkeys(chain)), why, wanted is not None)
