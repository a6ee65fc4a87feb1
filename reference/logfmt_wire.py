"""Rows that travel in LogFMT: metadata first, then groups of 128 channels, encoded or as they are.

Both sides work out from the metadata which groups are encoded, hence how many bytes follow; nothing else has
to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .logfmt import GROUP, logfmt_decode, logfmt_encode, logfmt_pack, logfmt_qualifies, logfmt_unpack
from .records import dense
from .wire import RowsUnderway, Wire

# Bytes of a group of 128: 10 bits a value when encoded, 16 else. The payload is counted in units of 32 bytes.
UNIT = 32
ENCODED_UNITS, RAW_UNITS = GROUP * 10 // 8 // UNIT, GROUP * 16 // 8 // UNIT


def send_in_logfmt(
    wire: Wire, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
) -> RowsInLogfmt:
    """Send `rows` [S, H] bfloat16 as Wire.start_all_to_all_rows would, in LogFMT where they qualify."""
    codes, meta, qualifies = logfmt_encode(rows)
    recv_meta = wire.all_to_all_rows(meta, send_counts, recv_counts)
    recv_qualifies = logfmt_qualifies(recv_meta)

    encoded = logfmt_pack(codes).view(torch.uint8).unflatten(1, (qualifies.shape[1], -1))  # [S, G, 160]
    raw = rows.view(torch.uint8).unflatten(1, (qualifies.shape[1], -1))  # [S, G, 256]
    payload = []
    for part, e, r in zip(
        qualifies.split(list(send_counts)),
        encoded.split(list(send_counts)),
        raw.split(list(send_counts)),
        strict=True,
    ):
        payload += [e[part].view(-1, UNIT), r[~part].view(-1, UNIT)]
    underway = wire.start_all_to_all_rows(
        torch.cat(payload), _units(qualifies, send_counts), _units(recv_qualifies, recv_counts)
    )
    return RowsInLogfmt(underway, recv_meta, recv_qualifies, list(recv_counts))


@dataclass(frozen=True)
class RowsInLogfmt:
    """Rows underway in LogFMT."""

    payload: RowsUnderway
    meta: Tensor  # [N, G, 2] bfloat16
    qualifies: Tensor  # [N, G] bool
    recv_counts: list[int]

    def wait(self) -> Tensor:
        """The received rows, [N, H] float32."""
        payload = self.payload.wait()
        num_rows, num_groups = self.qualifies.shape
        codes = torch.zeros(num_rows, num_groups, GROUP, dtype=torch.int16, device=payload.device)
        rows = torch.zeros(num_rows, num_groups, GROUP, dtype=torch.float32, device=payload.device)
        units = payload.split(_units(self.qualifies, self.recv_counts))
        for part, part_codes, part_rows, data in zip(
            self.qualifies.split(self.recv_counts),
            codes.split(self.recv_counts),
            rows.split(self.recv_counts),
            units,
            strict=True,
        ):
            num_encoded = int(part.sum()) * ENCODED_UNITS
            words = dense(data[:num_encoded]).view(-1, ENCODED_UNITS * UNIT).view(torch.int32)
            part_codes[part] = logfmt_unpack(words)
            raw = dense(data[num_encoded:]).view(-1, RAW_UNITS * UNIT).view(torch.bfloat16)
            part_rows[~part] = raw.float()
        decoded = logfmt_decode(codes.flatten(1), self.meta).unflatten(1, (num_groups, GROUP))
        return torch.where(self.qualifies.unsqueeze(-1), decoded, rows).flatten(1)


def _units(qualifies: Tensor, counts: Sequence[int]) -> list[int]:
    """Units of payload from or to each rank."""
    per_row = torch.where(qualifies, ENCODED_UNITS, RAW_UNITS).sum(1)
    return [int(part.sum()) for part in per_row.split(list(counts))]
