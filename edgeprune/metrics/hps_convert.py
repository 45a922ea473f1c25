"""Converts the weights of HPS v2.1 to a CLIP folder of transformers, which metrics/hps.py reads.

The weights are published as a pickle with open_clip's names. It is read once, with torch's `weights_only` loader, which
runs no code of the file:

    python -m edgeprune.metrics.hps HPS_v2.1_compressed.pt --clip laion/CLIP-ViT-H-14-laion2B-s32B-b79K -o hpsv2.1
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.extras import needs
from edgeprune.metrics.clip_model import ImageProcessor
from edgeprune.metrics.pretrained import load

with needs("hpsv2"):
    import torch
    from transformers import CLIPModel, CLIPTokenizer

_PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_PREFIXES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # as transformers spells it
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
_INSIDE = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}
_TRANSPOSED = ("visual.proj", "text_projection")


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of an open_clip CLIP as transformers does, and split query, key and value.

    Raises:
        InputError: a name does not belong to such a model.
    """
    out = {}
    for name, tensor in state.items():
        if name in _PLAIN:
            out[_PLAIN[name]] = tensor.T if name in _TRANSPOSED else tensor
            continue
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise InputError(
                f"{name}: found a weight of this name, expected only those of an open_clip CLIP with two ViT towers"
            )
        new_name = _PREFIXES[prefix] + name.removeprefix(prefix)
        for old, new in _INSIDE.items():
            new_name = new_name.replace(old, new)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", new_name):
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{match[1]}.{part}_proj.{match[2]}"] = values
        else:
            out[new_name] = tensor
    return out


def convert(file: Path, clip: str, out: Path) -> None:
    """Write a CLIP folder of transformers with the weights of an open_clip file.

    Args:
        file: a pickle or safetensors file with open_clip's names, possibly under `state_dict`.
        clip: the folder or hub id of a CLIP of the same shape; its config, tokenizer and image processor are used.
        out: the folder to write.

    Raises:
        InputError: the file is not readable, or its weights do not have the shapes of `clip`.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)  # never runs code of the file
    except Exception as error:  # each loader raises errors of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: not readable as a file of weights only ({reason})") from error
    named = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
    config = load(CLIPModel.config_class, clip, "hpsv2")
    with torch.device("meta"):
        model = CLIPModel(config)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    weights = renamed(named)
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name]) if name in expected else "nothing"
        if found != wanted:
            raise InputError(f"{file}: {name}: found {found}, expected {wanted} as {clip} has it")
    out.mkdir(parents=True, exist_ok=True)
    model.load_state_dict({k: v.contiguous() for k, v in weights.items()}, assign=True, strict=False)
    # Buffers that no file stores are still on the meta device; save_pretrained does not write them.
    model.save_pretrained(out)
    load(CLIPTokenizer, clip, "hpsv2").save_pretrained(out)
    load(ImageProcessor, clip, "hpsv2").save_pretrained(out)


def main() -> int:
    """Run the command line and return its exit code; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeprune.metrics.hps",
        description="Convert HPS's open_clip file to a CLIP folder of transformers.",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--clip",
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        help="folder or hub id of the CLIP that HPS was fine-tuned from",
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("hpsv2.1"))
    args = parser.parse_args()
    try:
        convert(args.file, args.clip, args.out)
    except EdgepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"next: edgeprune score MODEL --metric hpsv2 --weights hpsv2={args.out}", file=sys.stderr)
    return 0
