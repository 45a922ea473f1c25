"""`edgeprune synth`: a published pipeline at its real size with random weights, to try every stage before you have it.

Every network has its real architecture, and scheduler, tokenizers, steps and guidance are those of the model. The
images are noise, but memory, time and bytes, which depend only on shapes, are the real ones. Weights are drawn tensor
by tensor and written shard by shard, so no network is in memory. With tiny encoders, only the transformer is real.

drawing.py draws weights, networks.py lists the networks and writes them, surroundings.py and tokenizers.py write the
small files, tiny.py makes tiny encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.artefact.synth.networks import others, transformer, write_all
from edgeprune.artefact.synth.surroundings import write_index, write_surroundings
from edgeprune.artefact.synth.tiny import write_companions
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, read_json, write_json
from edgeprune.common.lock import LOCK, hold, is_free
from edgeprune.common.progress import Progress, silent
from edgeprune.families import Config, family_of, published

MARK = "synth.json"
"""File that says what a folder was made of."""


def synth(name: str, out: Path, *, tiny_encoders: bool = False, progress: Progress = silent) -> int:
    """Write the pipeline folder `out` and return the bytes of its weights. An interrupted run resumes.

    Args:
        name: of the published pipeline.
        out: the folder.
        tiny_encoders: make text encoders, VAE and tokenizers tiny; see tiny.py.
        progress: called with shards done, shards in total, and bytes and speed.

    Raises:
        InputError: there is no such pipeline, `out` holds something else, or another process writes there.
        DiskError: the disk is too full; says how much is needed.
    """
    known = published.pipelines()
    if name not in known:
        raise InputError(f"synth: found {name!r}, expected one of {', '.join(known)}")
    pipeline = known[name]
    config = published.transformers()[pipeline.transformer]
    if tiny_encoders:
        return write_pipeline(config, out, label=name, index=pipeline.index, progress=progress)
    return write_pipeline(config, out, label=name, pipeline=pipeline, progress=progress)


def write_pipeline(
    config: Config,
    out: Path,
    *,
    label: str,
    pipeline: published.PublishedPipeline | None = None,
    index: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> int:
    """Write the pipeline folder `out` for any transformer; like `synth`, with `label` as the name.

    Args:
        config: the transformer's.
        pipeline: what else to write; None for tiny encoders, VAE and tokenizers.
        index: without a pipeline, its settings in model_index.json; None for none.
    """
    family = family_of(config, label)
    parts = [transformer(family, config)]
    key = digest({**config, **(index or {})})
    if pipeline is not None:
        parts = [*others(family, pipeline), *parts]
        key = digest([asdict(pipeline), *(part.config for part in parts)])
    _check(out, label, key, "" if pipeline else " with --tiny-encoders")
    with hold(out / LOCK, out):
        write_json(out / MARK, {"architecture": label, "config": key})
        if pipeline is None:
            write_companions(family, config, out, index or {})
        else:
            write_surroundings(family, pipeline, out)
        size = write_all(out, parts, key, label=label, progress=progress)
        if pipeline is not None:  # last: a folder without it is no pipeline yet
            write_index(family, pipeline, config, out)
    return size


def _check(out: Path, label: str, key: str, how: str) -> None:
    """Refuse a folder that holds something else.

    Raises:
        InputError: it does.
    """
    mark = out / MARK
    if mark.is_file():
        if read_json(mark).get("config") != key:
            raise InputError(f"{mark}: found another architecture, expected {label}{how}; use another -o")
    elif not is_free(out, MARK):
        raise InputError(f"{out}: exists and was not made by synth; use another -o")
