"""The finished pipeline's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from edgeprune.sampling.generation import Generation
from edgeprune.shapes import World, save_world


def save_pipeline(pipeline: DiffusionPipeline, out: Path, generation: Generation, world: World) -> None:
    """Write the pipeline, transformer and VAE in half precision; replace `out`.

    Args:
        pipeline: what was trained.
        out: the folder.
        generation: its sampling settings.
        world: what it draws, so that everything that compresses it uses this world's captions and scenes.
    """
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # transformers loads in the precision of the file, diffusers in float32: after a plain `from_pretrained`, text
    # encoders in half precision would not match a float32 transformer. They are small, so they stay in float32.
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(temporary)
    path = temporary / "vae" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    generation.save(temporary)
    save_world(world, temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    print(f"wrote {out}")
