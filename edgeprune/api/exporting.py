"""`export`: the files that a device runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.api.folders import AnyPath, check_out
from edgeprune.common import heap
from edgeprune.common.progress import Progress, silent


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    out: Path
    target: str
    """The format."""
    device: str
    """The device that the files are for."""
    quantized: bool
    """Whether the transformer's weights are the checkpoint's INT4."""
    record: dict[str, Any]
    """The content of edgeprune_export.json: the comparison with the checkpoint, and the SHA-256 of every file."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune export --json` prints."""
        return self.record


def export(
    model: AnyPath,
    out: AnyPath,
    target: str = "onnx",
    *,
    device: str | None = None,
    modulation: str | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write the files that a device runs, from the checkpoint's own integers. An interrupted call resumes.

    Args:
        model: an artefact folder, or a diffusers folder.
        out: the folder to write.
        target: the format: onnx, openvino, trt or coreml.
        device: the device that sets precision, sizes and limits, see `edgeprune targets`; None for the usual one of
            the format.
        modulation: `apart`, in a network of its own that runs before the first step, or `inside` the transformer, as
            optimum and OpenVINO GenAI need it; None for apart where the format has it.
        progress: called after each part.

    Raises:
        InputError: `model` or `out` is not usable, there is no such format, device or modulation, or the device cannot
            run the model.
        MissingExtraError: a package that the format needs is not installed.
        ParityError: a network does not compute what its checkpoint computes.
        LockedError: another process writes this export.
        DiskError: the disk is full; the next call resumes.
    """
    from edgeprune.targets import for_format

    chosen = for_format(target, device)
    check_out(out)
    heap.large_pages()
    from edgeprune.artefact.checks import say_unfinished
    from edgeprune.export import export as write

    say_unfinished(Path(model))
    record = write(Path(model), Path(out), target, chosen, modulation=modulation, progress=progress)
    return Exported(
        out=Path(out), target=target, device=chosen.name, quantized=bool(record["quantized"]), record=record
    )
