"""What torch says of the device, of its memory and of its speed."""

from __future__ import annotations

from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import Failed, check


@check("`--device auto` takes this device; products of float32, float16 and bfloat16", seconds=60)
def device(place: Place) -> str:
    """Measure matrix products."""
    import torch

    from edgeprune.common.memory import ComputeOptions
    from edgeprune.residency.compute import Compute
    from edgeprune.stages.costs import matmul_flops_per_s

    chosen = Compute.of(ComputeOptions()).device
    if chosen.type != place.device.type:
        raise Failed(f"auto: found {chosen}, expected {place.device}")
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    speeds = {n: matmul_flops_per_s(dtype=dtype, device=place.device) / 1e12 for n, dtype in dtypes.items()}
    return ", ".join(f"{name} {speed:.3g} TFLOP/s" for name, speed in speeds.items())


@check("the device's figures of memory: a tensor of 0.5 GB counts, and is given back", seconds=20)
def memory_figures(place: Place) -> str:
    """Allocate, and see it in what is taken and left."""
    import torch

    from edgeprune.residency.compute import Compute

    compute, size = Compute(place.device), 5 * 10**8
    before, left = place.taken(), compute.left()
    block = torch.zeros(size, dtype=torch.uint8, device=place.device)
    place.wait()
    rise, fall = place.taken() - before, left - compute.left()
    del block
    after = place.taken() - before
    if not (size <= rise < 1.2 * size and 0.5 * size < fall and after < 0.1 * size):
        raise Failed(
            f"taken rose by {rise / 1e9:.2f} GB, left fell by {fall / 1e9:.2f} GB, {after / 1e9:.2f} GB stayed"
        )
    return f"taken rises by {rise / 1e9:.2f} GB, left falls by {fall / 1e9:.2f} GB, {left / 1e9:.1f} GB are left"
