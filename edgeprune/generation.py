"""How a model is sampled by default, and where that is written. Torch-free.

`generation.json` lies beside `model_index.json`; stock diffusers ignores it. A folder without one gets the defaults of
`StableDiffusion3Pipeline`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
            return cls()
        data = read_json(path)
        names = {f.name for f in fields(cls)}
        for name, value in data.items():
            if name not in names:
                raise InputError(f"{path}: {name}: unknown field, expected {', '.join(sorted(names))}")
            low = 0 if name in ("max_sequence_length", "guidance_scale") else 1
            kinds = (int, float) if name == "guidance_scale" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= 65536:
                raise InputError(f"{path}: {name}: found {value!r}, expected a number from {low} to 65536")
        return cls(**data)

    def save(self, folder: Path) -> None:
        """Write beside the model index."""
        write_json(folder / FILE, asdict(self))
