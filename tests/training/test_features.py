"""Features by stream: which output of a block or of its attention is the image, and which the context."""

from typing import Any

import pytest
import torch
from distilling import setup
from tiny import tiny_transformer

from edgeprune.families import family_of_model
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.training.features import Catcher
from edgeprune.training.losses import Features, feature_loss

TOKENS = 12
"""Text tokens: another number than that of image tokens."""


def caught(family: Any, model: Any, originals: list[int], features: str) -> Features:
    """Run a model on two samples and return what was collected."""
    g = torch.Generator().manual_seed(0)
    width = 64
    condition = Conditioning(torch.randn(2, TOKENS, width, generator=g), torch.randn(2, width, generator=g))
    catcher = Catcher(family, model, originals, features)
    with torch.no_grad():
        velocity(model, torch.randn(2, 8, 8, 8, generator=g), condition, torch.rand(2, generator=g), 3.5)
    catcher.close()
    return catcher.features


@pytest.mark.parametrize("features", ["blocks", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "qwen-image"])
def test_streams_have_their_tokens(kind: str, features: str) -> None:
    family, teacher, *_ = setup(kind)
    found = caught(family, teacher, list(range(5)), features)
    assert found.keys() == set(range(5))
    tokens = {index: {name: tensor.shape[1] for name, tensor in streams.items()} for index, streams in found.items()}
    image = 64 // family.latents(teacher.config).patch ** 2
    both = {"image": image, "context": TOKENS}
    joint = {"sd3": 4, "qwen-image": 5}.get(kind, 2)  # the joint blocks that output both streams
    assert all(tokens[index] == both for index in range(joint))
    if kind == "sd3":
        assert tokens[4] == {"image": image}  # the last block drops the context
    elif features == "attention":
        assert all(tokens[index] == {"image": image + TOKENS} for index in range(joint, 5))  # one stream for both


def test_the_attention_of_a_new_last_block_is_compared_by_its_image_alone() -> None:
    """SD3 without its last block: the new last one has no context output, though its attention still returns one."""
    teacher = tiny_transformer(num_layers=4)
    family = family_of_model(teacher)
    student = tiny_transformer(num_layers=3)
    assert student.transformer_blocks[2].context_pre_only
    of_student = caught(family, student, [0, 1, 2], "attention")
    of_teacher = caught(family, teacher, [0, 1, 2, 3], "attention")
    assert list(of_student[2]) == ["image"] and list(of_teacher[2]) == ["image", "context"]
    alone = feature_loss({2: of_student[2]}, of_teacher)
    expected = torch.nn.functional.mse_loss(of_student[2]["image"], of_teacher[2]["image"])
    assert torch.equal(alone, expected)
