"""How a model is sampled by default, and where that is written. Torch-free.

`generation.json` lies beside `model_index.json`; stock diffusers ignores it. A folder without one gets the defaults of
`StableDiffusion3Pipeline`, at the size that its transformer was trained for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import read_json, write_json

FILE = "generation.json"


@dataclass(frozen=True)
class Generation:
    """Sampling defaults."""

    num_inference_steps: int = 28
    guidance_scale: float = 7.0
    height: int = 1024
    """Pixels."""
    width: int = 1024
    max_sequence_length: int = 256
    """T5 tokens; where T5 is absent, as many zero tokens are appended."""

    @classmethod
    def load(cls, folder: Path) -> Generation:
        """Read a folder's defaults.

        Raises:
            InputError: an unknown field, or a value of a wrong kind or range.
        """
        path = folder / FILE
        if not path.exists():
            side = _trained_side(folder)
            return cls(height=side, width=side) if side else cls()
        return cls.checked(read_json(path), str(path))

    @classmethod
    def checked(cls, data: dict[str, Any], where: str) -> Generation:
        """From values by field name; fields that are not given keep their defaults.

        Raises:
            InputError: an unknown field, or a value of a wrong kind or range.
        """
        names = {f.name for f in fields(cls)}
        for name, value in data.items():
            if name not in names:
                raise InputError(f"{where}: {name}: unknown field, expected {', '.join(sorted(names))}")
            low = 0 if name in ("max_sequence_length", "guidance_scale") else 1
            kinds = (int, float) if name == "guidance_scale" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= 65536:
                raise InputError(f"{where}: {name}: found {value!r}, expected a number from {low} to 65536")
        return cls(**data)

    def check_size(self, folder: Path) -> None:
        """Hold height and width against a pipeline's folder.

        Raises:
            InputError: one is not a whole number of tokens.
        """
        unit = _pixels(folder, "patch_size") or 1
        for name in ("height", "width"):
            if (value := getattr(self, name)) % unit:
                raise InputError(f"{name}: found {value}, expected a multiple of {unit}")

    def save(self, folder: Path) -> None:
        """Write beside the model index."""
        write_json(folder / FILE, asdict(self))


def _trained_side(folder: Path) -> int | None:
    """Height and width in pixels that a pipeline's transformer was trained for, if its configs say so."""
    return _pixels(folder, "sample_size")


def _pixels(folder: Path, field: str) -> int | None:
    """A field of the transformer's config that counts latent pixels, in image pixels; None where configs do not say."""
    vaes = [path for name in ("vae_decoder", "vae") if (path := folder / name / "config.json").exists()]
    transformer = folder / "transformer" / "config.json"
    if not vaes or not transformer.exists():
        return None
    count, widths = read_json(transformer).get(field), read_json(vaes[0]).get("block_out_channels")
    return count * 2 ** (len(widths) - 1) if isinstance(count, int) and isinstance(widths, list) else None
