"""LoRAs of the original on a compressed model: a LoRA file for it, or a new artefact with the LoRA in its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath, check_out, is_begun, open_folder
from edgeprune.common import heap
from edgeprune.common.errors import InputError
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:  # the functions import these after their checks: torch takes seconds
    from edgeprune.artefact.lora.reading import Lora
    from edgeprune.artefact.lora.remap import Fate
    from edgeprune.artefact.manifest import Manifest
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.families import Family
    from edgeprune.planning.plan import PrunePlan


@dataclass(frozen=True)
class AppliedLora:
    """The result of `remap_lora` and `merge_lora`."""

    out: Path
    """The file, or the artefact folder."""
    ran: bool
    """False if the folder was merged already."""
    fate: Fate
    """What became of each layer, and of each tensor of the file."""
    assumed_scales: int
    """Layers whose scale is taken to be 1, because neither the file nor an adapter_config.json holds an alpha."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune lora --json` prints."""
        fate = self.fate
        return {
            "out": str(self.out), "ran": self.ran, "tensors": fate.tensors, "counts": fate.counts, "kept": fate.kept,
            "changed": fate.changed, "gone": fate.gone, "unused": fate.unused, "assumed_scales": self.assumed_scales,
        }  # fmt: skip


def remap_lora(file: AnyPath, model: AnyPath, out: AnyPath) -> AppliedLora:
    """Write a LoRA file for a pruned model, which diffusers loads next to its half-precision weights.

    Args:
        file: a LoRA of the original, as safetensors, with the names of any trainer.
        model: a pruned artefact folder.
        out: the file to write, ending in .safetensors.

    Raises:
        InputError: the file is not a LoRA of the model, a LoRA file cannot hold what is left of it, or nothing is left.
        DiskError: the disk is full.
    """
    if Path(out).suffix != ".safetensors" or Path(out).is_dir():
        raise InputError(f"-o {out}: expected a file whose name ends in .safetensors; with --merge, a folder")
    check_out(Path(out).parent)
    if Path(out).resolve() == Path(file).resolve():
        raise InputError(f"-o {out}: is the LoRA itself, which would be lost; use another name")
    folder = Path(model)
    manifest, family, plan, lora = _opened(file, folder)
    from edgeprune.artefact.lora.remap import remap
    from edgeprune.common.tensors import save_tensors

    mean, basis = _modulation(folder, manifest) if plan.modulation_rank is not None else (None, None)
    tensors, fate = remap(lora, family, manifest.config, plan, mean, basis)
    save_tensors(Path(out), tensors, {"format": "pt"})
    return AppliedLora(Path(out), ran=True, fate=fate, assumed_scales=lora.assumed)


def merge_lora(
    file: AnyPath,
    model: AnyPath,
    out: AnyPath,
    *,
    scale: float = 1.0,
    compute: ComputeOptions | None = None,
    progress: Progress = silent,
) -> AppliedLora:
    """Write a new artefact whose weights have a LoRA added, quantized as `model` is. An interrupted call resumes.

    Args:
        file: a LoRA of the original, as safetensors, with the names of any trainer.
        model: a pruned artefact folder, distilled or not.
        out: the artefact folder to create.
        scale: multiplies what the LoRA changes.
        compute: where INT4 is calibrated, in how much memory, and the longest time; None takes what this machine has,
            and any time.
        progress: called after each file and block.

    Raises:
        InputError: the file is not a LoRA of the model, the scale is not a finite number, files are missing, or a stage
            takes too much memory or time, which is refused before weights are written.
        StaleStageError: `out` is another artefact.
        LockedError: another process uses `out`.
        DiskError: the disk is full; the next call resumes.
    """
    import math

    if not math.isfinite(scale):
        raise InputError(f"--scale: found {scale}, expected a finite number")
    if Path(out).suffix == ".safetensors":
        raise InputError(f"-o {out}: expected a folder, which --merge creates")
    check_out(out)
    heap.large_pages()
    base = Path(model)
    manifest, family, plan, lora = _opened(file, base)
    from edgeprune.artefact.lora.remap import Places
    from edgeprune.stages import merge

    fate = Places(family, manifest.config, plan).fates(lora)
    if not fate.kept and not fate.changed:
        raise InputError(f"{file}: nothing of it applies: all of its {len(fate.gone)} layers are gone")
    merge.begin(base, Path(out), lora, scale)
    ws = open_folder(out, compute=compute)
    merge.copy_records(base, Path(out))
    ran = merge.run(ws, base, lora, scale, progress)
    return AppliedLora(Path(out), ran=ran, fate=fate, assumed_scales=lora.assumed)


def _opened(file: AnyPath, folder: Path) -> tuple[Manifest, Family, PrunePlan, Lora]:
    """Read an artefact's records and a LoRA file."""
    if not is_begun(folder):
        raise InputError(f"--model {folder}: not an artefact folder; run `edgeprune compress` first")
    from edgeprune.artefact.lora import encoders
    from edgeprune.artefact.lora.names import Names
    from edgeprune.artefact.lora.reading import read
    from edgeprune.artefact.manifest import Manifest
    from edgeprune.families import family_of

    manifest = Manifest.load(folder)
    family, plan = family_of(manifest.config), manifest.prune_plan(folder)
    if plan is None:
        raise InputError(f"{folder}: is not pruned yet; run `edgeprune prune -o {folder}` first")
    return manifest, family, plan, read(Path(file), Names(family, manifest.config, encoders.shapes(folder)))


def _modulation(folder: Path, manifest: Manifest) -> tuple[Any, Any]:
    """Return mean (D) and basis (R, D) of the modulation input that an artefact was projected with."""
    from safetensors.torch import load_file

    from edgeprune.artefact.loading import readable
    from edgeprune.stages.modulation import MODULATION

    manifest.verify(folder, MODULATION)
    with readable(folder / MODULATION):
        tensors = load_file(folder / MODULATION)
        return tensors["mean"], tensors["basis"]
