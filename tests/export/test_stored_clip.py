"""CLIPs whose weights stay on disk: the networks of transformers, of which one layer is in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from edgeprune.common.errors import EdgepruneError
from edgeprune.export import graph, loaders
from edgeprune.export.stored_clip import StoredClip, StoredPooledClip
from edgeprune.families.encoders import CLIP, CLIP_POOLED
from edgeprune.residency.streaming import held_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


@pytest.mark.parametrize("kind", [CLIP, CLIP_POOLED])
def test_it_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=9, bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    getattr(transformers, kind)(config).half().save_pretrained(tmp_path / "clip")
    stored = (StoredClip if kind == CLIP else StoredPooledClip)(tmp_path / "clip")
    vendors = loaders.clip(tmp_path, "clip", kind, loaders.by_vendor)
    example = vendors.example(batch=2, tokens=7)
    with torch.no_grad():
        expected = vendors(**example)
        for network in (stored.running(), stored.checkpoint()):
            assert network.outputs == vendors.outputs
            torch.testing.assert_close(network(**example), expected, atol=0, rtol=0)
            assert all(parameter.is_meta for parameter in network.parameters())
            assert held_bytes(network) < 0.4 * sum(p.nbytes for p in vendors.parameters())
        half = stored.running(torch.float16)(**example)
        torch.testing.assert_close(half, vendors.half()(**example), atol=0, rtol=0)


def test_a_table_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    transformers.CLIPTextModel(config).half().save_pretrained(tmp_path)
    monkeypatch.setattr(StoredPooledClip, "made", lambda *_: None)
    stored = StoredPooledClip(tmp_path)
    for network in (stored.running, stored.checkpoint):
        with pytest.raises(EdgepruneError, match="position_ids: found no numbers for it; use another version"):
            network()


def test_what_is_traced_has_no_numbers(tmp_path: Path) -> None:
    """They are read when the file is written: of what is larger than shapes and sizes, nothing while it is traced."""
    config = transformers.CLIPTextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    transformers.CLIPTextModel(config).half().save_pretrained(tmp_path)
    stored = StoredPooledClip(tmp_path)
    traced = stored.traceable(torch.float32)
    read: list[str] = []

    def reader(name: str) -> torch.Tensor:
        read.append(name)
        return stored.read(name)

    example = traced.example(batch=2, tokens=7)
    model = graph.to_ir(traced, example, traced.inputs, traced.outputs, read=reader)
    assert not [name for name in read if ".mlp." in name and name.endswith(".weight")]
    (weight,) = [
        value for name, value in model.graph.initializers.items() if name.endswith("layers.1.mlp.fc2.weight.T")
    ]
    assert weight.const_value is not None and weight.const_value.shape.numpy() == (2048, 64)
    assert [name for name in read if name.endswith("token_embedding.weight")]  # stored in half precision, if exact
