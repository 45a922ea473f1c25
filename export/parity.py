"""Does an exported network compute what the checkpoint computes? Without a yes there is no export.

Both sides have the same integers, so what is left is the order of float additions: 1e-6 on a tiny model. `check` takes
whatever runs the file. `session` is ONNX Runtime at `session.qdq_matmulnbits_accuracy_level=1` (float activations); its
default of 4 rounds activations to int8, which is a runtime's choice and no fault of the file. Neither side holds all
of a large transformer: the file runs in slices (pieces.py), torch reads block by block (stored.py).
What it leaves out: image quality, and the error that quantisation itself makes (that is `bench`'s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.common.errors import EdgepruneError, ParityError
from edgeprune.common.extras import needs
from edgeprune.export import graph
from edgeprune.export.pieces import Pieces, Session
from edgeprune.export.progress import Progress, Steps, silent

BOUND = 1e-3
"""Largest relative error (maximum) that passes in float32."""
HALF_BOUND = 1e-2
"""Largest relative error (rms) that passes in float16. Rounding to 11 bits after every operation makes 2e-4 to 7e-4 on
the built-in model's networks and up to 3e-3 on random ones; a wrong integer, axis or size makes 0.1 and more."""


class Runner(Protocol):
    """What runs a file, in one or several steps."""

    @property
    def steps(self) -> int:
        """How many there are."""

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = ...
    ) -> Sequence[Any]:
        """Outputs of these names, or all in the model's order; `step` is called after each step."""


def session(path: Path) -> Runner:
    """The file in ONNX Runtime on the CPU, exact arithmetic, as many threads as torch has, not all of it in memory.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ParityError: ONNX Runtime refuses the file.
    """
    return Pieces(path, _session)


def _session(path: Path) -> Session:
    with needs("onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # an error is raised, and need not be printed too
    try:
        runner: Session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind's exceptions have no common base below this
        raise ParityError(f"{path.name}: ONNX Runtime cannot load it ({error})") from error
    return runner


def torch_steps(module: torch.nn.Module) -> int:
    """How many steps `stepping` counts when a network runs once: a transformer's blocks, else one."""
    return len(module.family.blocks(module.model)) if isinstance(module, graph.Transformer) else 1


@contextmanager
def stepping(module: torch.nn.Module, step: Callable[[], None]) -> Iterator[None]:
    """Call `step` after each block of a transformer that runs inside, else once."""
    if not isinstance(module, graph.Transformer):
        yield
        step()
        return
    hooks = [block.register_forward_hook(lambda *_: step()) for block in module.family.blocks(module.model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """(max|a-b| / max|b|, rms(a-b) / rms(b)); infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf"), float("inf")
    difference, expected = found.astype(np.float64) - expected, expected.astype(np.float64)
    pairs = [(np.abs(x).max(initial=0.0), np.sqrt(np.mean(x**2))) for x in (difference, expected)]
    worst, rms = (float(a / b) if b > 0 else float("inf") if a > 0 else 0.0 for a, b in zip(*pairs, strict=True))
    return worst, rms


def reference(
    module: torch.nn.Module, example: Mapping[str, torch.Tensor], step: Callable[[], None]
) -> list[torch.Tensor]:
    """What the checkpoint computes in float32, a transformer by diffusers' own forward pass; `step` as of stepping."""
    forward = module.reference if isinstance(module, graph.Transformer) else module
    with torch.no_grad(), stepping(module, step):
        return list(forward(**{k: v.float() if v.is_floating_point() else v for k, v in example.items()}))


def check(
    name: str,
    runner: Runner,
    module: torch.nn.Module,
    examples: Sequence[Mapping[str, torch.Tensor]],
    outputs: Sequence[str],
    *,
    bound: float = BOUND,
    half: bool = False,
    known: Sequence[Sequence[torch.Tensor]] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare every output at every example; the worst errors and the shapes tried, for edgeprune_export.json.

    A transformer is compared with diffusers' own forward pass. With `half` the model takes and computes float16, the
    bound is HALF_BOUND on the rms error, and the float32 module is given the same rounded inputs. `known` is what
    `reference` gave for the first examples, rounded so with `half`; these are not computed again. `progress` is told of
    torch's blocks and the file's steps.

    Raises:
        ParityError: a relative error above the bound, or the model does not run at one of the shapes.
    """
    worst, worst_rms, shapes = 0.0, 0.0, []
    bound = HALF_BOUND if half else bound
    steps = len(examples) * runner.steps + (len(examples) - len(known)) * torch_steps(module)
    step = Steps(f"{name}: compared", steps, progress)
    for i, example in enumerate(examples):
        sizes = {key: list(value.shape) for key, value in example.items()}
        shapes.append(sizes)
        given = graph.half(example) if half else example
        expected = known[i] if i < len(known) else reference(module, given, step)
        try:
            found = runner.run(list(outputs), {key: value.numpy() for key, value in given.items()}, step=step)
        except (EdgepruneError, OSError):
            raise
        except Exception as failure:  # vendors raise what they like
            raise ParityError(f"{name}: the exported file does not run at {sizes} ({failure})") from failure
        for output, a, b in zip(outputs, found, expected, strict=True):
            error_max, error_rms = relative_error(np.asarray(a), b.numpy())
            error = error_rms if half else error_max
            if not error <= bound:
                raise ParityError(
                    f"{name}: {output}: found a relative error of {error:.2e} against the checkpoint at {sizes}, "
                    f"expected at most {bound:.0e}"
                )
            worst, worst_rms = max(worst, error_max), max(worst_rms, error_rms)
    return {"max_relative": worst, "rms_relative": worst_rms, "bound": bound, "shapes": shapes}
