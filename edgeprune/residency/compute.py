"""Where and in which dtype networks compute, and how much memory that may take.

Stored and computed dtype are two things: weights stay in the dtype of their file, and a layer is widened when it runs.
"""

from __future__ import annotations

import functools
import gc
import time
from dataclasses import dataclass

import torch

from edgeprune.common import heap, processes
from edgeprune.common.errors import InputError
from edgeprune.common.memory import SHARE, SMALL_BYTES, ComputeOptions, allowed, resident
from edgeprune.common.processor import MULTIPLY_BF16, instructions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What networks compute in, by the names that users read."""
_MUCH_FASTER = 1.25
"""How many times faster a product in bf16 has to be: chance must not change the dtype from one run to the next."""


@dataclass(frozen=True)
class Compute:
    """Where networks compute, and the most memory of the process; on a GPU, of the device."""

    device: torch.device = torch.device("cpu")
    memory: int | None = None
    """Bytes; None takes what is free."""
    wish: torch.dtype | None = None
    """The dtype to compute every network in; None chooses it by network and device."""

    @classmethod
    def of(cls, options: ComputeOptions, wish: torch.dtype | None = None) -> Compute:
        """Choose a device of this machine; `auto` takes the first of cuda, xpu and mps, else the processor.

        Of several GPUs, each process that was launched takes its own; a launcher's config may say the processor.

        Args:
            options: the user's.
            wish: the dtype to compute every network in; None chooses it.

        Raises:
            InputError: torch does not find the device.
        """
        device, here = options.device, _here()
        if device == "auto" and processes.on_cpu():
            return cls(torch.device("cpu"), options.memory, wish)
        if device == "auto":
            kind, many = next(iter(here.items()))
            own = torch.device(kind, processes.local_index() % many) if many > 1 else torch.device(kind)
            return cls(own, options.memory, wish)
        kind, _, index = device.partition(":")
        if kind not in here or (index and not (index.isdecimal() and int(index) < here[kind])):
            names = [n if count == 1 else f"{n}:0 to {n}:{count - 1}" for n, count in here.items()]
            found = ", ".join(("auto", *names))
            raise InputError(f"--device: found {device!r}, expected one of {found}, which torch finds here")
        return cls(torch.device(device), options.memory, wish)

    def dtype(self, stored: torch.dtype, numbers: int, *, fits_half: bool = True) -> torch.dtype:
        """Return the dtype to compute a network in.

        Without a wish, that is the dtype of its file, or float32 if the processor cannot multiply that, or if the
        network is small. On a GPU without bf16, bf16 is replaced by float16, or by float32 unless `fits_half`.

        Args:
            stored: the dtype of its weights in the file.
            numbers: how many weights it has.
            fits_half: whether float16 may stand in for bf16: its values are not known to exceed that.
        """
        if self.wish is not None:
            return self.wish
        if stored == torch.float32 or is_small(numbers):
            return torch.float32
        if self.device.type != "cpu":
            stands_in = torch.float16 if fits_half else torch.float32
            return stored if stored != torch.bfloat16 or has_bf16(self.device) else stands_in
        return torch.bfloat16 if multiplies_bf16() else torch.float32

    def collect(self) -> None:
        """Release freed memory to the system, or on the device, so that `left` counts it."""
        gc.collect()
        if self.device.type == "cpu":
            heap.trim()
        else:
            torch.get_device_module(self.device).empty_cache()

    def taken(self) -> int:
        """Return the bytes that this process has now; on a GPU those that torch has of it."""
        return resident() if self.device.type == "cpu" else _device_memory(self.device)[0]

    def left(self) -> int:
        """Return the bytes that may still be taken now."""
        if self.device.type == "cpu":
            return max(0, (allowed() if self.memory is None else self.memory) - resident())
        taken, free = _device_memory(self.device)
        return max(0, int(SHARE * free) if self.memory is None else self.memory - taken)


def name_of(dtype: torch.dtype) -> str:
    """Return the name in DTYPES."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def is_small(numbers: int) -> bool:
    """Return whether a network with so many weights is held in memory as a whole, in float32."""
    return 4 * numbers <= SMALL_BYTES


def _here() -> dict[str, int]:
    """Return the kinds of devices that torch finds, the best one first, with how many there are."""
    found = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    found["xpu"] = torch.xpu.device_count() if torch.xpu.is_available() else 0
    found["mps"] = int(torch.backends.mps.is_available())
    return {name: count for name, count in found.items() if count} | {"cpu": 1}


def _device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that torch has taken, and those that are free."""
    if device.type == "mps":  # shares the machine's memory
        taken = torch.mps.driver_allocated_memory()
        return taken, max(0, torch.mps.recommended_max_memory() - taken)
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    taken = module.memory_reserved(device)
    return taken, free + taken - module.memory_allocated(device)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16 at all; torch would emulate it on a GPU that does not."""
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "mps" or not torch.backends.mps.is_available() or torch.backends.mps.is_macos_or_newer(14, 0)


def multiplies_bf16() -> bool:
    """Return whether the processor multiplies bf16 faster than float32; without instructions for it, it is slower.

    Where the system does not say which instructions there are, as macOS and Windows, a product is timed in both.
    """
    known = instructions()
    return bool(known & MULTIPLY_BF16) if known else _is_faster_in_bf16()


@functools.cache
def _is_faster_in_bf16() -> bool:
    return _MUCH_FASTER * _product_s(torch.bfloat16) < _product_s(torch.float32)


def _product_s(dtype: torch.dtype) -> float:
    """Return the time of a matrix product, the best of three, in seconds."""
    factor, times = torch.ones(512, 512, dtype=dtype), []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(factor, factor)
        times.append(time.perf_counter() - began)
    return min(times)
