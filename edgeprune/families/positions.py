"""A square position table stored as rows and columns: each of SD3's sines and cosines depends on only one of the two.

SD3.5 Large's table of 192 x 192 x 2432 has 90 M numbers, 2 % of the INT4 model; its rows and columns have 0.5 M.
A table that does not split exactly stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def separate(table: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Return rows (n, D/2) and columns (n, D/2) of a table (1, n * n, D); None unless they reproduce it bit for bit."""
    _, places, width = table.shape
    side = round(places**0.5)
    if side**2 != places or width % 2:
        return None
    grid = table.view(side, side, width)
    columns, rows = grid[0, :, : width // 2], grid[:, 0, width // 2 :]
    if not torch.equal(grid[..., : width // 2], columns[None].expand(side, -1, -1)):
        return None
    if not torch.equal(grid[..., width // 2 :], rows[:, None].expand(-1, side, -1)):
        return None
    return {"rows": rows.contiguous(), "columns": columns.contiguous()}


class SeparatePatchEmbed(nn.Module):
    """diffusers' PatchEmbed with its table in two halves. Like the original, it uses the middle of the table.

    Args:
        embed: a PatchEmbed, whose convolution this module takes over.
        rows, columns: (n, D/2).
    """

    def __init__(self, embed: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.proj, self.patch = embed.proj, int(embed.patch_size)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Map (B, C, h, w) to (B, N, D)."""
        height, width = (size // self.patch for size in latent.shape[-2:])
        rows, columns = self._middle(self.rows, height), self._middle(self.columns, width)
        position = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
        tokens: torch.Tensor = self.proj(latent).flatten(2).transpose(1, 2)
        return tokens + position.flatten(0, 1)[None]

    @staticmethod
    def _middle(table: Any, size: int) -> torch.Tensor:
        first = (len(table) - size) // 2
        out: torch.Tensor = table[first : first + size]
        return out
