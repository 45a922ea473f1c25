"""A LoRA on the pruned model draws what the original with that LoRA draws when it is pruned in the same way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import ALPHA, applied, everything, merged, names_of, pair, read_tensors
from tiny import KINDS, config_of, tiny_velocity

from edgeprune.artefact.lora.merging import Differences
from edgeprune.artefact.lora.names import TRANSFORMER
from edgeprune.artefact.lora.remap import Places, remap
from edgeprune.artefact.surgery import build, prune_state
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width

Tensors = dict[str, torch.Tensor]
WHOLE = {"sd3": "3", "sd3-dual": "1", "flux": "1", "flux2": "2"}
"""Of SD3 the last block, so that another becomes the last and loses its context output."""
PARTS = {
    "sd3": "0:mlp,2:attn",
    "sd3-dual": "0:attn2,2:context_mlp",
    "flux": "2:mlp,3:attn,0:context_mlp",
    "flux2": "3:attn,0:mlp",
}
NORMS = {"sd3": "1:norm", "sd3-dual": "0:context_norm", "flux": "0:norm,2:norm"}


class Case:
    """A tiny model, a plan, and mean and basis of its modulation input."""

    def __init__(self, kind: str, blocks: str = "", components: str = "", rank: int | None = None) -> None:
        self.model = KINDS[kind]()
        self.config = config_of(self.model)
        self.family = family_of(self.config)
        self.names = names_of(self.model)
        self.state: Tensors = dict(self.model.state_dict())
        self.plan: PrunePlan = make_plan(
            self.family, self.config, None, method="manual", blocks=blocks, components=components, modulation_rank=rank
        )
        g = torch.Generator().manual_seed(9)
        self.mean = self.basis = None
        if rank is not None or "norm" in components:
            width = modulation_width(self.family, self.config)
            self.mean = torch.randn(width, generator=g)
            if rank is not None:
                self.basis = torch.linalg.qr(torch.randn(width, max(rank, 1), generator=g))[0].T[:rank].contiguous()

    def pruned(self, state: Tensors) -> Tensors:
        return prune_state(self.family, self.config, self.plan, state.__getitem__, self.mean, self.basis)

    def drawn(self, state: Tensors) -> torch.Tensor:
        return tiny_velocity(build(self.family, self.config, self.plan, state))

    def same(self, found: Tensors, expected: Tensors, plain: Tensors) -> None:
        """Check weights and outputs, and that the LoRA made a difference."""
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        image = self.drawn(expected)
        torch.testing.assert_close(self.drawn(found), image, rtol=1e-4, atol=1e-5)
        assert (self.drawn(plain) - image).abs().max() > 1e-2


def cases() -> list[Any]:
    made = [pytest.param(kind, WHOLE[kind], PARTS[kind], None, id=kind) for kind in PARTS]
    made += [pytest.param(kind, WHOLE[kind], "", 8, id=f"{kind}-projected") for kind in ("sd3", "flux")]
    return made


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("kind", "blocks", "components", "rank"), cases())
def test_a_file_for_the_pruned_model(
    tmp_path: Path, kind: str, blocks: str, components: str, rank: int | None, bias: bool
) -> None:
    case = Case(kind, blocks, components, rank)
    tensors = everything(case.model, bias=bias and "flux2" not in kind)
    lora = read_tensors(tmp_path, tensors, case.names)
    found, fate = remap(lora, case.family, case.config, case.plan, case.mean, case.basis)
    plain = case.pruned(case.state)
    case.same(applied(plain, found), case.pruned(merged(case.state, tensors)), plain)
    assert sum(fate.counts.values()) == fate.tensors == len(tensors) and fate.counts["gone"] > 0
    assert len(fate.kept) + len(fate.changed) + len(fate.gone) == len(lora.changes)
    assert any("is removed" in why for why in fate.gone.values())
    if rank:
        assert set(fate.changed.values()) >= {"modulation projected"}
        assert any(name.endswith("lora_B.bias") for name in found)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize(
    ("kind", "components", "rank"),
    [(kind, parts, None) for kind, parts in PARTS.items()]
    + [(kind, parts, None) for kind, parts in NORMS.items()]
    + [("sd3", "", 8), ("flux", "", 8), ("sd3", "", 0), ("flux", "2:mlp", 8)],
)
def test_merged_weights(tmp_path: Path, kind: str, components: str, rank: int | None, dora: bool) -> None:
    """Also what no LoRA file can hold: norms, removed or projected modulation, DoRA of layers that lost columns."""
    case = Case(kind, WHOLE[kind], components, rank)
    tensors = everything(case.model, bias=kind != "flux2", norms=True, dora=dora)
    lora = read_tensors(tmp_path, tensors, case.names)
    differences = Differences(lora, TRANSFORMER, case.names.shapes[TRANSFORMER], case.state.__getitem__)
    places, plain = Places(case.family, case.config, case.plan), case.pruned(case.state)
    found = dict(plain)
    for name, source in places.sources.items():
        if (difference := differences.pruned(source, case.mean, case.basis)) is not None:
            found[name] = plain[name] + difference
    case.same(found, case.pruned(merged(case.state, tensors)), plain)
    fate = places.fates(lora)
    assert sum(fate.counts.values()) == fate.tensors == len(tensors)


def test_scale_multiplies_what_a_merge_changes(tmp_path: Path) -> None:
    case = Case("flux")
    tensors = everything(case.model, bias=True, dora=True)
    lora = read_tensors(tmp_path, tensors, case.names)
    whole, part = (
        Differences(lora, TRANSFORMER, case.names.shapes[TRANSFORMER], case.state.__getitem__, scale)
        for scale in (1, -0.3)
    )
    for name in ("x_embedder.weight", "x_embedder.bias", "single_transformer_blocks.1.attn.to_q.weight"):
        torch.testing.assert_close(part[name], whole[name] * -0.3)


def test_a_fused_layer_whose_parts_part(tmp_path: Path) -> None:
    """kohya's linear1 is four layers of diffusers': of three that stay and one that goes, the tensors are changed."""
    case = Case("flux", components="2:mlp")
    tensors = pair("lora_unet_single_blocks_0_linear1", 7 * 64, 64)
    lora = read_tensors(tmp_path, tensors, case.names)
    found, fate = remap(lora, case.family, case.config, case.plan)
    assert fate.counts == {"kept": 0, "changed": 3, "gone": 0, "unused": 0}
    assert fate.gone == {"single_transformer_blocks.0.proj_mlp": "2:mlp is removed"} and len(fate.kept) == 3
    up, down = (tensors[f"lora_unet_single_blocks_0_linear1.lora_{n}.weight"] for n in ("up", "down"))
    name = "transformer.single_transformer_blocks.0.attn.to_v"
    torch.testing.assert_close(
        found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"], (up @ down)[128:192] * ALPHA / 4
    )


def test_split_layers_lose_the_ranks_of_other_parts(tmp_path: Path) -> None:
    """kohya stores three LoRAs as one of three times the rank, whose B is block-diagonal."""
    case = Case("flux")
    parts = [pair("x", 64, 64, rank=2, seed=seed) for seed in range(3)]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {
        f"{name}.lora_down.weight": torch.cat([p["x.lora_down.weight"] for p in parts]),
        f"{name}.lora_up.weight": torch.block_diag(*(p["x.lora_up.weight"] for p in parts)),
        f"{name}.alpha": torch.tensor(6.0),
    }
    found, _ = remap(read_tensors(tmp_path, fused, case.names), case.family, case.config, case.plan)
    for part, layer in zip(parts, ("to_q", "to_k", "to_v"), strict=True):
        key = f"transformer.transformer_blocks.0.attn.{layer}"
        assert torch.equal(found[f"{key}.lora_A.weight"], part["x.lora_down.weight"])
        assert torch.equal(found[f"{key}.lora_B.weight"], part["x.lora_up.weight"])


def test_dora_stays_dora_where_rows_are_whole(tmp_path: Path) -> None:
    case = Case("sd3", blocks="1")
    tensors = everything(case.model, dora=True)
    found, _ = remap(read_tensors(tmp_path, tensors, case.names), case.family, case.config, case.plan)
    plain = case.pruned(case.state)
    case.same(applied(plain, found), case.pruned(merged(case.state, tensors)), plain)
    assert not any(name.endswith("alpha") for name in found)


def test_dora_by_columns_is_merged(tmp_path: Path) -> None:
    """LyCORIS' older files hold the length of each column (1, I), which a square layer must not take for rows."""
    case = Case("flux")
    layer = "transformer_blocks.0.attn.to_out.0"
    tensors = pair(f"transformer.{layer}", 64, 64)
    magnitude = torch.rand(1, 64) + 1
    lora = read_tensors(tmp_path, tensors | {f"transformer.{layer}.dora_scale": magnitude}, case.names)
    changed = merged(case.state, tensors)[f"{layer}.weight"]
    expected = changed / changed.norm(dim=0, keepdim=True) * magnitude - case.state[f"{layer}.weight"]
    differences = Differences(lora, TRANSFORMER, case.names.shapes[TRANSFORMER], case.state.__getitem__)
    torch.testing.assert_close(differences[f"{layer}.weight"], expected)
    with pytest.raises(InputError, match=r"cannot hold DoRA of columns.*add --merge"):
        remap(lora, case.family, case.config, case.plan)


def test_a_convolution(tmp_path: Path) -> None:
    """SD3 embeds patches by a convolution, whose LoRA has four axes."""
    case = Case("sd3")
    name = "lora_unet_x_embedder_proj"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8, 1, 1),
        f"{name}.lora_up.weight": torch.randn(64, 4, 1, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    found, fate = remap(read_tensors(tmp_path, tensors, case.names), case.family, case.config, case.plan)
    assert fate.kept == {"pos_embed.proj": "pos_embed.proj"}
    assert {tuple(tensor.shape) for tensor in found.values()} == {(4, 8, 1, 1), (64, 4, 1, 1)}
    up, down = tensors[f"{name}.lora_up.weight"].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
    weight = applied(case.state, found)["pos_embed.proj.weight"] - case.state["pos_embed.proj.weight"]
    torch.testing.assert_close(weight.flatten(1), up @ down / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norms": True},
            r"cannot hold differences of norms \('transformer.transformer_blocks.0.attn.norm_added_k.diff'",
        ),
        ({"bias": True, "dora": True}, r"cannot hold biases beside DoRA"),
    ],
)
def test_what_a_file_cannot_hold_is_named(tmp_path: Path, change: dict[str, bool], message: str) -> None:
    case = Case("sd3", blocks="1")
    lora = read_tensors(tmp_path, everything(case.model, **change), case.names)
    with pytest.raises(InputError, match=message):
        remap(lora, case.family, case.config, case.plan)


def test_the_dtype_of_the_file_stays(tmp_path: Path) -> None:
    case = Case("flux")
    tensors = {name: tensor.bfloat16() for name, tensor in pair("lora_unet_img_in", 64, 32).items()}
    found, _ = remap(read_tensors(tmp_path, tensors, case.names), case.family, case.config, case.plan)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
