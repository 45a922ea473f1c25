"""An artefact, or any SD3 diffusers folder, becomes an optimum-style folder of ONNX models.

    export(Path("compressed"), Path("onnx"))

Each network is traced, written, checked by onnx.checker and compared with torch (parity.py) before the next is loaded.
What it leaves out: T5, FLUX, the VAE's encoder, transformers larger than memory, and the files around the networks
(folder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection

from edgeprune.checkpoint import load_transformer
from edgeprune.errors import ParityError
from edgeprune.export import graph, parity
from edgeprune.export.folder import Progress, from_pretrained, is_quantized, silent, write
from edgeprune.files import read_json
from edgeprune.targets import Target


def export(artefact: Path, out: Path, *, device: Target | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out`, the same for every device.

    With `artefact/transformer_int4` its integers are kept, else weights are float32.

    Returns the content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not an SD3 folder or is damaged, or `out` holds something that is not an export.
        ParityError: a model does not compute what its checkpoint computes.
        EdgepruneError: the disk is full, or `out` cannot be written.
    """
    return write(artefact, out, "onnx", lambda partial: networks(artefact, partial, progress))


# ------------------------------------------------------------------------------------- the networks

Opened = Callable[[Path], parity.Runner]
"""From a written ONNX file to something that runs it."""


def networks(artefact: Path, partial: Path, progress: Progress, *, opened: Opened = parity.session) -> dict[str, Any]:
    """Write and compare one model after the other; what else edgeprune_export.json shall say.

    `opened` gets each `partial/<network>/model.onnx` and says what is compared; it may leave another format there.
    """
    errors = {}
    quantized = is_quantized(artefact)
    transformer = graph.Transformer(load_transformer(artefact, quantized=quantized, dtype=torch.float32))
    limit = int(transformer.model.config.pos_embed_max_size)
    tokens = read_json(artefact / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    tokens = tokens if isinstance(tokens, int) and 2 < tokens < 100_000 else 77
    # Sizes are patches. An odd number of them takes another path through the crop of the position table.
    sizes = [(1, 8, 8, tokens), (3, 5, 7, 3), (2, 12, 9, 2 * tokens)]
    examples = [
        transformer.example(batch=b, height=min(h, limit), width=min(w, limit), tokens=m, seed=i)
        for i, (b, h, w, m) in enumerate(sizes)
    ]
    traced = transformer.example(batch=2, height=min(4, limit), width=min(6, limit), tokens=5)
    progress("transformer")
    errors["transformer"] = _network("transformer", transformer, traced, examples, partial, opened)
    del transformer

    for name in ("text_encoder", "text_encoder_2"):
        encoder = graph.TextEncoder(from_pretrained(CLIPTextModelWithProjection.from_pretrained, artefact / name))
        longest = encoder.config.max_position_embeddings
        examples = [encoder.example(batch=b, tokens=m) for b, m in ((1, longest), (3, max(2, longest // 2 - 1)))]
        progress(name)
        traced = encoder.example(batch=2, tokens=min(7, longest))
        errors[name] = _network(name, encoder, traced, examples, partial, opened)
        del encoder

    vae = graph.VaeDecoder(from_pretrained(AutoencoderKL.from_pretrained, artefact / "vae"))
    examples = [vae.example(batch=b, height=h, width=w) for b, h, w in ((1, 8, 8), (3, 5, 7))]
    progress("vae_decoder")
    traced = vae.example(batch=2, height=4, width=6)
    errors["vae_decoder"] = _network("vae_decoder", vae, traced, examples, partial, opened)
    return {"opset": graph.OPSET, "parity": errors}


def _network(
    name: str,
    module: graph.Transformer | graph.TextEncoder | graph.VaeDecoder,
    traced: Mapping[str, torch.Tensor],
    examples: Sequence[Mapping[str, torch.Tensor]],
    partial: Path,
    opened: Opened,
) -> dict[str, Any]:
    """Trace, write, check and compare one network."""
    module.eval().to(torch.float32)
    path = partial / name / "model.onnx"
    path.parent.mkdir()
    graph.save(graph.to_ir(module, traced, module.inputs, module.outputs), path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{name}: not valid ONNX: {error}") from error
    return parity.check(name, opened(path), module, examples, list(module.outputs))
