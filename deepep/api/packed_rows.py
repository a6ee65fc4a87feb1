"""PackedRows: rows of bytes that a list of tensors was made into, on their way through a dispatch."""

from __future__ import annotations

import torch


class PackedRows(tuple[torch.Tensor, torch.Tensor | None]):
    """(rows, scales or None), as a dispatch takes them, and a number for what they are made of."""

    payload: int

    @classmethod
    def of(cls, rows: torch.Tensor, scales: torch.Tensor | None, payload: int) -> PackedRows:
        """The pair with its number."""
        made = cls((rows, scales))
        made.payload = payload
        return made
