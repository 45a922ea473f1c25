"""A table of words that stays in its file: only the rows that are looked up are read.

Qwen3's has 151,936 rows; of the 4 B model it takes 0.8 GB in half precision, and a prompt has 512 tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class StoredTable(nn.Module):
    """An embedding whose rows are read when they are looked up.

    Args:
        read: returns rows (R, D) of these indices, in their order.
        dtype: to compute in.
    """

    def __init__(self, read: Callable[[Sequence[int]], torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._read, self._dtype = read, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids (B, M) to rows (B, M, D), where the ids are."""
        words, places = ids.unique(return_inverse=True)
        rows = self._read(words.tolist()).to(ids.device, self._dtype)
        return rows[places]
