"""Where checks run: a device, a folder, and models to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from edgeprune.stages.workspace import Workspace

SMALL: dict[str, dict[str, Any]] = {
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 8, "out_channels": 8,
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
        "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 32, "qk_norm": "rms_norm",
        "dual_attention_layers": [],
    },
    "flux": {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 16, "num_layers": 2,
        "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
        "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": [4, 14, 14],
    },
}  # fmt: skip
"""Configs of small transformers."""
FEW_BLOCKS: dict[str, dict[str, int]] = {
    "sd3.5-large": {"num_layers": 4},
    "flux.1-dev": {"num_layers": 2, "num_single_layers": 2},
}
"""How many blocks of their real size a shortened published transformer has: 2 GB."""
_READ_BYTES = 10**9
"""The memory that is given for a model whose blocks are to be read when they run: none are kept in so little."""


@dataclass
class Place:
    """Where checks run.

    Args:
        device: to compute on.
        scratch: an empty folder, for models and results.
        pixels: sides of the images of the large models.
        shorten: returns the config of the large model of a name; those of `FEW_BLOCKS` without one.
        within: the most relative difference from the processor, where that is less than what a check accepts.
    """

    device: torch.device
    scratch: Path
    pixels: int = 1024
    shorten: Callable[[str], dict[str, Any]] | None = None
    within: float = math.inf
    _made: dict[str, Path] = field(default_factory=dict)

    def small(self, kind: str) -> Path:
        """Return the folder of a small pipeline with random weights, 64x64 pixels in 3 steps."""
        return self._pipeline(kind, SMALL[kind], pixels=64, steps=3, guidance=2.0)

    def large(self, name: str) -> Path:
        """Return the folder of a published pipeline with a few blocks of the real size, and with tiny encoders."""
        from edgeprune.families import published

        config = self.shorten(name) if self.shorten else published.transformers()[name] | FEW_BLOCKS[name]
        return self._pipeline(name, config, pixels=self.pixels, steps=2, guidance=3.5)

    def _pipeline(self, name: str, config: dict[str, Any], *, pixels: int, steps: int, guidance: float) -> Path:
        if name not in self._made:
            from edgeprune.artefact.synth import write_pipeline
            from edgeprune.sampling.generation import Generation

            folder = self.scratch / "models" / name
            write_pipeline(config, folder, label=name)
            tokens = Generation.load(folder).max_sequence_length
            Generation(steps, guidance, pixels, pixels, tokens).save(folder)
            self._made[name] = folder
        return self._made[name]

    def workspace(self, source: Path, name: str, *, device: str | None = None, memory: int | None = None) -> Workspace:
        """Open a new artefact folder of a model.

        Args:
            source: the model's folder.
            name: of the folder in `scratch`.
            device: to compute on; None for the place's.
            memory: the most bytes of the device that may be taken, beside those that are taken already.
        """
        from edgeprune.common.memory import ComputeOptions
        from edgeprune.stages.workspace import Workspace

        taken = self.taken() if memory is not None else 0
        options = ComputeOptions(device or str(self.device), None if memory is None else memory + taken)
        return Workspace(self.scratch / name, str(source), compute=options)

    def worst(self, kind: str, name: str, run: Callable[[Workspace], dict[str, Any]]) -> float:
        """Run on the processor, and on the device with blocks that are read; return the largest relative difference.

        Args:
            kind: of the small model.
            name: of the folders in `scratch`.
            run: returns arrays or tensors by name.
        """
        expected = run(self.workspace(self.small(kind), f"{name}-cpu", device="cpu"))
        found = run(self.workspace(self.small(kind), f"{name}-device", memory=_READ_BYTES))
        return max(difference(found[key], value) for key, value in expected.items())

    def taken(self) -> int:
        """Return the bytes of the device that torch holds, after giving back what it does not use."""
        from edgeprune.residency.compute import Compute, _device_memory

        Compute(self.device).collect()
        return _device_memory(self.device)[0]

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        import torch

        torch.get_device_module(self.device).synchronize()

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the most bytes that torch held on the device since; on mps those held now."""
        import torch

        self.taken()
        module: Any = torch.get_device_module(self.device)
        if hasattr(module, "reset_peak_memory_stats"):
            module.reset_peak_memory_stats()
            yield lambda: int(module.max_memory_reserved())
        else:
            yield lambda: int(module.driver_allocated_memory())


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference of two arrays or tensors, as a share of the largest number expected."""
    import torch

    one, two = (torch.as_tensor(value).detach().cpu().double() for value in (found, expected))
    if one.shape != two.shape or not one.isfinite().all():
        return math.inf
    return float((one - two).abs().max() / two.abs().max().clamp_min(1e-12))


def best_seconds(work: Callable[[], object], wait: Callable[[], None], repeats: int = 5) -> float:
    """Return the least time of some runs after a first one, in seconds."""
    import time

    work()
    wait()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)
