"""Checks that an exported network computes what its checkpoint computes; an export that does not is refused.

Both sides use the same integers, so only the order of float additions differs: 1e-6 on a tiny model. `check` takes
anything that runs a file. `session` runs ONNX Runtime with `session.qdq_matmulnbits_accuracy_level=1` (float
activations); its default of 4 rounds activations to int8, which is a choice of the runtime, not an error of the file.
Neither side holds all of a large network: the file runs in chunks (chunked_onnx.py), and torch reads a transformer
block by block (residency/stored.py) and T5 or Qwen3 layer by layer (stored_encoder.py). The error of quantisation
itself is not measured here; `bench` does.
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
from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.export import modules
from edgeprune.export.chunked_onnx import ChunkedOnnx, Session
from edgeprune.export.language_model import LanguageModel
from edgeprune.export.modulation import Modulation
from edgeprune.runtimes.modulation import ROWS

BOUND = 1e-3
"""Largest relative error (of the maximum) that passes in float32."""
HALF_BOUND = 1e-2
"""Largest relative error (of the rms) that passes in float16. Rounding to 11 bits after every operation costs 2e-4 to
7e-4 on the built-in model's networks and up to 3e-3 on random ones; a wrong integer, axis or size costs 0.1 or more."""

MEMORY = 4 * 10**9
"""Bytes of the process in which a runtime computes what is compared; more if torch alone has more."""


class Runner(Protocol):
    """Something that runs an exported file, in one or several steps."""

    @property
    def steps(self) -> int:
        """The number of steps of one run."""

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = ...
    ) -> Sequence[Any]:
        """Return the outputs of these names, or all in the model's order; call `step` after each step."""


def session(path: Path) -> Runner:
    """Open a file in ONNX Runtime on the CPU, chunk by chunk: float arithmetic, as many threads as torch uses.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ParityError: ONNX Runtime refuses the file.
    """
    return ChunkedOnnx(path, _session)


def _session(path: Path) -> Session:
    with needs("onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # errors are raised; do not print them too
    try:
        runner: Session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind's exceptions have no other common base
        raise ParityError(f"{path.name}: ONNX Runtime cannot load it ({error})") from error
    return runner


class WithRows:
    """A transformer's file that reads the modulation's rows, run on the inputs of the whole transformer.

    Args:
        file: runs it.
        modulation: makes the rows, in torch.
    """

    def __init__(self, file: Runner, modulation: Modulation) -> None:
        self._file, self._modulation = file, modulation

    @property
    def steps(self) -> int:
        """The steps of the file."""
        return self._file.steps

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = lambda: None
    ) -> Sequence[Any]:
        """Return the outputs of these names, or all; call `step` after each step of the file."""
        read = self._modulation.inputs
        with torch.no_grad():
            (rows,) = self._modulation(*(torch.from_numpy(feeds[name]).float() for name in read))
        others = {name: value for name, value in feeds.items() if name not in read}
        kind = others["hidden_states"].dtype  # half precision where the file computes in it
        return self._file.run(names, {**others, ROWS: rows.numpy().astype(kind)}, step=step)


def torch_steps(module: torch.nn.Module) -> int:
    """Return how many steps `stepping` counts for one run: the blocks of a transformer, T5 or Qwen3, else one."""
    return len(_blocks(module)) or 1


@contextmanager
def stepping(module: torch.nn.Module, step: Callable[[], None]) -> Iterator[None]:
    """Call `step` for each block of a large network that runs in this context; for others once, at the end."""
    blocks = _blocks(module)
    hooks = [block.register_forward_hook(lambda *_: step()) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not blocks:
        step()


def _blocks(module: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Return modules that run once each, one in every block; none for a network that is not large."""
    if isinstance(module, modules.Transformer):
        return list(module.family.blocks(module.model))
    if isinstance(module, LanguageModel):
        return [layer.mlp for layer in module.model.model.layers]  # LanguageModel does not call the layer
    if isinstance(module, modules.T5Encoder):
        return [block.layer[0] for block in module.model.encoder.block]  # modules.T5Encoder does not call the block
    return []


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """Return (max|a-b| / max|b|, rms(a-b) / rms(b)); infinite if shapes differ or a value is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf"), float("inf")
    difference, expected = found.astype(np.float64) - expected, expected.astype(np.float64)
    pairs = [(np.abs(x).max(initial=0.0), np.sqrt(np.mean(x**2))) for x in (difference, expected)]
    worst, rms = (float(a / b) if b > 0 else float("inf") if a > 0 else 0.0 for a, b in zip(*pairs, strict=True))
    return worst, rms


def reference(
    module: torch.nn.Module, example: Mapping[str, torch.Tensor], step: Callable[[], None]
) -> list[torch.Tensor]:
    """Run the checkpoint in float32, by the vendor's forward pass where there is one; `step` as in `stepping`."""
    named = modules.Transformer | modules.T5Encoder | LanguageModel | Modulation
    forward = module.reference if isinstance(module, named) else module
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
    references: Sequence[Sequence[torch.Tensor]] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare every output at every example; return the worst errors and the shapes, for edgeprune_export.json.

    Args:
        name: the network's name, for messages.
        runner: runs the exported file.
        module: the network to compare with; a transformer or T5 runs the vendor's own forward pass.
        examples: inputs to compare at.
        outputs: names of the outputs, in the order in which `module` returns them.
        bound: largest relative error that passes.
        half: the file takes and computes float16. Then the bound is HALF_BOUND on the rms error, and the float32 module
            gets the same rounded inputs.
        references: results of `reference` for the first examples (with rounded inputs if `half`); not computed again.
        progress: called after each block of torch and each step of the file.

    Raises:
        ParityError: a relative error is above the bound, or the file does not run at one of the shapes.
    """
    worst, worst_rms, shapes = 0.0, 0.0, []
    bound = HALF_BOUND if half else bound
    steps = len(examples) * runner.steps + (len(examples) - len(references)) * torch_steps(module)
    step = Steps(f"{name}: compared", steps, progress)
    for i, example in enumerate(examples):
        sizes = {key: list(value.shape) for key, value in example.items()}
        shapes.append(sizes)
        inputs = modules.half_inputs(example) if half else example
        expected = references[i] if i < len(references) else reference(module, inputs, step)
        try:
            results = runner.run(list(outputs), {key: value.numpy() for key, value in inputs.items()}, step=step)
        except (EdgepruneError, OSError):
            raise
        except Exception as failure:  # vendors raise any exception
            raise ParityError(f"{name}: the exported file does not run at {sizes} ({failure})") from failure
        for output, a, b in zip(outputs, results, expected, strict=True):
            error_max, error_rms = relative_error(np.asarray(a), b.numpy())
            error = error_rms if half else error_max
            if not error <= bound:
                raise ParityError(
                    f"{name}: {output}: found a relative error of {error:.2e} against the checkpoint at {sizes}, "
                    f"expected at most {bound:.0e}"
                )
            worst, worst_rms = max(worst, error_max), max(worst_rms, error_rms)
    return {"max_relative": worst, "rms_relative": worst_rms, "bound": bound, "shapes": shapes}
