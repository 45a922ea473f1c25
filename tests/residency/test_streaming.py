"""What a layer that is read when it runs has in memory meanwhile."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from edgeprune.residency.streaming import stream


def test_a_tensor_is_freed_before_the_next_is_read() -> None:
    """So a layer never is in memory as it is stored and, widened, as it computes."""
    layer: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")
    read: list[weakref.ref[torch.Tensor]] = []

    def one(name: str) -> torch.Tensor:
        assert not [past for past in read if past() is not None]
        made = torch.ones(layer.state_dict()[name].shape, dtype=torch.bfloat16)
        read.append(weakref.ref(made))
        return made

    names = {name: name for name in layer.state_dict()}
    stream([(layer, names)], one, device=torch.device("cpu"), dtype=torch.float32)
    assert layer(torch.ones(1, 4)).tolist() == [[21.0] * 4] and len(read) == len(names) == 4
