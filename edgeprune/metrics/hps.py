"""HPS v2.1, human preference (Wu et al., arXiv 2306.09341): 100 times the cosine in a fine-tuned CLIP ViT-H/14.

Its weights come as a pickle with open_clip's names. That is read once, by torch's `weights_only` loader, and written
as a CLIP folder of transformers, which is all that the metric takes:

    python -m edgeprune.metrics.hps HPS_v2.1_compressed.pt --clip laion/CLIP-ViT-H-14-laion2B-s32B-b79K -o hpsv2.1

What it leaves out: HPS v2's prompts (give them by --prompts). Images that are not square are cropped to the middle,
as by CLIP; whether HPS's own code does so was not checked.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.extras import needs
from edgeprune.metrics import Images
from edgeprune.metrics.clip_model import Clip, ImageProcessor
from edgeprune.metrics.pretrained import load

with needs("hpsv2"):
    import torch
    from transformers import CLIPModel, CLIPTokenizer


class Hps:
    """Takes the weights `hpsv2`."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.clip = Clip(weights["hpsv2"], "hpsv2")

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """About 20 to 35 per image."""
        return [100 * v for v in self.clip.similarity(images, prompts)]


METRIC = Hps

# ---------------------------------------------------------------------------------------- converting

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
    """Weights of an open_clip CLIP by the names of transformers; query, key and value apart.

    Raises:
        InputError: a name that is not of such a model.
    """
    out = {}
    for name, tensor in state.items():
        if name in _PLAIN:
            out[_PLAIN[name]] = tensor.T if name in _TRANSPOSED else tensor
            continue
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise InputError(
                f"{name}: found a weight of this name, expected those of an open_clip CLIP with two ViT towers"
            )
        there = _PREFIXES[prefix] + name.removeprefix(prefix)
        for old, new in _INSIDE.items():
            there = there.replace(old, new)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", there):
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{match[1]}.{part}_proj.{match[2]}"] = values
        else:
            out[there] = tensor
    return out


def convert(file: Path, clip: str, out: Path) -> None:
    """Write a CLIP folder of transformers with the weights of an open_clip file.

    Args:
        file: pickle or safetensors with open_clip's names, perhaps under `state_dict`.
        clip: folder or hub id of a CLIP of the same shape, for its config, tokenizer and image processor.
        out: folder to write.

    Raises:
        InputError: a file that is not usable, or not of this shape.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)  # never runs code of the file
    except Exception as error:  # each loader has its own
        raise InputError(f"{file}: not readable as weights alone ({' '.join(str(error).split())[:200]})") from error
    named = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
    config = load(CLIPModel.config_class, clip, "hpsv2")
    with torch.device("meta"):
        model = CLIPModel(config)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    given = renamed(named)
    for name in sorted(expected.keys() | given.keys()):
        found = tuple(given[name].shape) if name in given else "nothing"
        wanted = tuple(expected[name]) if name in expected else "nothing"
        if found != wanted:
            raise InputError(f"{file}: {name}: found {found}, expected {wanted} as {clip} has it")
    out.mkdir(parents=True, exist_ok=True)
    model.load_state_dict({k: v.contiguous() for k, v in given.items()}, assign=True, strict=False)
    # Buffers that no file holds are still on the meta device, and are not written.
    model.save_pretrained(out)
    load(CLIPTokenizer, clip, "hpsv2").save_pretrained(out)
    load(ImageProcessor, clip, "hpsv2").save_pretrained(out)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeprune.metrics.hps", description="HPS's open_clip file to a CLIP folder of transformers."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--clip", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="folder or hub id")
    parser.add_argument("-o", "--out", type=Path, default=Path("hpsv2.1"))
    args = parser.parse_args()
    try:
        convert(args.file, args.clip, args.out)
    except EdgepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"next: edgeprune score MODEL --metric hpsv2 --weights hpsv2={args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
