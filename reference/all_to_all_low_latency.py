"""Low-latency dispatch and combine over torch.distributed's all_to_all, each in a send and a receive half.

One rank's side of each operation, on a `Wire`; `start_...` sends, `finish` of what it returns receives.
Routing is worked out here, on purpose, without layout.py and low_latency.py: the two forms judge each other.

- dispatch: a token crosses to a rank once, in a record (x | scales | top-k indices | token), and is spread to
its experts there. Two exchanges: how many, then the records.
- combine, reduce="rank": the owner sends each token's weights to the token's ranks, which return one partial
sum. Two exchanges.
- combine, reduce="token": every (token, expert) row returns. One exchange; both sides know what travels.
- combine, reduce="domain": as "rank"; the owner makes the sums of domains itself.
- LogFMT adds one: the metadata goes first, and says to the receiver what the rest takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Reduce, check_reduce, require
from .formats import GROUP, empty_column_major, fp8_cast, ue8m0_pack
from .logfmt_wire import RowsInLogfmt, send_in_logfmt
from .numerics import round_to_bf16
from .records import pack_records, unpack_records
from .wire import RowsUnderway, Wire


@dataclass(frozen=True)
class LowLatencyTensors:
    """One rank's received rows. Of expert l, the first recv_count[l] rows are written, the others are not."""

    recv_x: Tensor  # [L, R*M, H] float8_e4m3fn, or bfloat16
    recv_scales: Tensor | None  # [L, R*M, H/128] float32 or [L, R*M, H/512] int32, column-major
    recv_count: Tensor  # [L] int32
    recv_src_info: Tensor  # [L, R*M] int32: source token; -1 past the count
    layout_range: Tensor  # [L, R] int64: (first row << 32) | rows, by source rank


def allocate(
    num_ranks: int,
    num_max_tokens: int,
    num_experts: int,
    hidden: int,
    *,
    fp8: bool = True,
    ue8m0: bool = False,
    device: torch.device | str = "cpu",
) -> LowLatencyTensors:
    """Uninitialised outputs of a dispatch. All sizes are known beforehand: none depends on the routing."""
    device = torch.device(device)
    num_local, room = num_experts // num_ranks, num_ranks * num_max_tokens
    scales = None
    if fp8:
        shape = [num_local, room, hidden // GROUP // (4 if ue8m0 else 1)]
        scales = empty_column_major(shape, torch.int32 if ue8m0 else torch.float32, device)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    return LowLatencyTensors(
        torch.empty(num_local, room, hidden, dtype=dtype, device=device),
        scales,
        torch.empty(num_local, dtype=torch.int32, device=device),
        torch.empty(num_local, room, dtype=torch.int32, device=device),
        torch.empty(num_local, num_ranks, dtype=torch.int64, device=device),
    )


def start_dispatch(
    wire: Wire,
    x: Tensor,
    topk_idx: Tensor,
    num_max_tokens: int,
    num_experts: int,
    *,
    fp8: bool = True,
    round_scale: bool = False,
    ue8m0: bool = False,
) -> DispatchUnderway:
    """Send each token of `x` [T, H] bfloat16 to the ranks of the experts in `topk_idx` [T, K] int32 or int64.

    T <= num_max_tokens = M, the same M on all ranks. With `fp8` rows are cast before they are sent
    (formats.fp8_cast); `ue8m0` packs their scales and needs `round_scale`. Raises ValueError for malformed
    arguments, before anything is sent.
    """
    require(
        x.dtype == torch.bfloat16 and x.dim() == 2,
        f"x: got {x.dtype} {list(x.shape)}; allowed: bfloat16 [T, H]",
    )
    require(x.shape[0] <= num_max_tokens, f"x: got {x.shape[0]} tokens; allowed: at most {num_max_tokens}")
    require(not ue8m0 or round_scale, "ue8m0: got True; allowed: only with round_scale")
    wants = _wants(wire, topk_idx, num_experts)  # [T, E]
    require(wants.shape[0] == x.shape[0], f"topk_idx: got {wants.shape[0]} tokens; allowed: {x.shape[0]}")

    fields = {"x": x}
    if fp8:
        values, scale_inv = fp8_cast(x, round_scale)
        fields = {"x": values, "scales": ue8m0_pack(scale_inv) if ue8m0 else scale_inv}
    fields["topk_idx"] = topk_idx
    fields["token"] = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).unsqueeze(1)

    destination, token = _ranks_of(wants, wire.num_ranks).t().nonzero(as_tuple=True)
    send_counts = torch.bincount(destination, minlength=wire.num_ranks)
    one_each = [int(rank in wire.members) for rank in range(wire.num_ranks)]
    recv_counts = [0] * wire.num_ranks
    incoming = wire.all_to_all_rows(send_counts[list(wire.members)], one_each, one_each)
    for member, count in zip(wire.members, incoming.tolist(), strict=True):
        recv_counts[member] = count
    rows = wire.start_all_to_all_rows(pack_records(fields)[token], send_counts.tolist(), recv_counts)
    return DispatchUnderway(wire, rows, fields, recv_counts, num_max_tokens, num_experts)


@dataclass(frozen=True)
class DispatchUnderway:
    """A dispatch whose send half has run."""

    wire: Wire
    rows: RowsUnderway
    fields: dict[str, Tensor]
    recv_counts: list[int]
    num_max_tokens: int
    num_experts: int

    def wait(self) -> Tensor:
        """The records that have come; blocks until they have."""
        return self.rows.wait()

    def finish(self, out: LowLatencyTensors | None = None) -> LowLatencyTensors:
        """Receive, and spread each row to the experts that it is for. `out` comes from `allocate`."""
        num_ranks = self.wire.num_ranks
        num_local = self.num_experts // num_ranks
        got = unpack_records(self.rows.wait(), self.fields)
        if out is None:
            x, scales = self.fields["x"], self.fields.get("scales")
            out = allocate(
                num_ranks,
                self.num_max_tokens,
                self.num_experts,
                x.shape[1],
                fp8=scales is not None,
                ue8m0=scales is not None and scales.dtype == torch.int32,
                device=x.device,
            )
        experts = torch.arange(num_local, device=got["topk_idx"].device) + self.wire.rank * num_local
        chosen = (got["topk_idx"] == experts[:, None, None]).any(-1)  # [L, N]
        expert, source_row = chosen.nonzero(as_tuple=True)
        row = (chosen.cumsum(1) - 1)[expert, source_row]
        # As bytes: not every torch can index float8 on every device.
        out.recv_x.view(torch.uint8)[expert, row] = got["x"].view(torch.uint8)[source_row]
        if out.recv_scales is not None:
            out.recv_scales[expert, row] = got["scales"][source_row]
        out.recv_src_info.fill_(-1)
        out.recv_src_info[expert, row] = got["token"][source_row, 0]
        out.recv_count.copy_(chosen.sum(1))
        count = torch.stack([part.sum(1) for part in chosen.split(self.recv_counts, dim=1)], dim=1)  # [L, R]
        out.layout_range.copy_(((count.cumsum(1) - count) << 32) | count)
        return out


def start_combine(
    wire: Wire,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_info: Tensor,
    layout_range: Tensor,
    *,
    num_max_tokens: int,
    num_experts: int,
    logfmt: bool = False,
    reduce: Reduce = "rank",
    ranks_per_domain: int = 0,
) -> CombineUnderway:
    """Send what becomes of the rows `x` [L, R*M, H] bfloat16 back to their tokens, to be summed there.

    `recv_src_info` [L, R*M] and `layout_range` [L, R] are the dispatch's; `topk_idx` [T, K] and
    `topk_weights` [T, K] float32 those of this rank's own tokens. What the sum is stands at
    low_latency.combine. Rows from and to ranks that were masked since the dispatch are left out. Raises
    ValueError for malformed arguments, before anything is sent.
    """
    num_ranks = wire.num_ranks
    num_local, room = num_experts // num_ranks, num_ranks * num_max_tokens
    require(
        x.dtype == torch.bfloat16 and x.dim() == 3 and list(x.shape[:2]) == [num_local, room],
        f"x: got {x.dtype} {list(x.shape)}; allowed: bfloat16 [{num_local}, {room}, H]",
    )
    require(
        topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape,
        f"topk_weights: got {topk_weights.dtype} {list(topk_weights.shape)}; allowed: float32 [T, K]",
    )
    check_reduce(reduce, ranks_per_domain, logfmt)
    require(
        list(recv_src_info.shape) == [num_local, room] and list(layout_range.shape) == [num_local, num_ranks],
        "recv_src_info, layout_range: not of a dispatch with these sizes",
    )
    wants = _wants(wire, topk_idx, num_experts)
    held = _held_rows(wire, recv_src_info, layout_range, num_max_tokens)  # [R, M, L]
    if reduce == "token":
        source, expert, token = held.permute(0, 2, 1).ge(0).nonzero(as_tuple=True)
        rows = x[expert, held[source, token, expert]]
        send_counts = torch.bincount(source, minlength=num_ranks).tolist()
        recv_counts = wants.sum(0).view(num_ranks, num_local).sum(1).tolist()
    else:
        rows, send_counts = _partial_sums(wire, x, topk_idx, topk_weights, held, wants, num_local)
        recv_counts = _ranks_of(wants, num_ranks).sum(0).tolist()
    underway: RowsUnderway | RowsInLogfmt
    if logfmt:
        underway = send_in_logfmt(wire, rows, send_counts, recv_counts)
    else:
        underway = wire.start_all_to_all_rows(rows, send_counts, recv_counts)
    size = ranks_per_domain if reduce == "domain" else 0
    return CombineUnderway(wire, underway, wants, topk_idx, topk_weights, reduce, size)


@dataclass(frozen=True)
class CombineUnderway:
    """A combine whose send half has run."""

    wire: Wire
    rows: RowsUnderway | RowsInLogfmt
    wants: Tensor  # [T, E] bool
    topk_idx: Tensor
    topk_weights: Tensor
    reduce: Reduce
    ranks_per_domain: int = 0

    def wait(self) -> Tensor:
        """The rows that have come, of those in LogFMT their payload; blocks until they have."""
        return self.rows.payload.wait() if isinstance(self.rows, RowsInLogfmt) else self.rows.wait()

    def finish(self, out: Tensor | None = None) -> Tensor:
        """Receive and sum: [T, H] bfloat16, written to `out` if given."""
        rows = self.rows.wait().float()  # [n, H], by rank, then (expert, token) or token
        if self.reduce == "token":
            row = _numbered(self.wants.t()).t()  # [T, E]
            total = _weighted_sum(rows, row, self.topk_idx, self.topk_weights)
        else:
            row = _numbered(_ranks_of(self.wants, self.wire.num_ranks).t()).t()  # [T, R]
            ranks = torch.arange(self.wire.num_ranks, device=row.device).expand(row.shape)
            if self.reduce == "domain":
                rows, row, ranks = self._sum_domains(rows, row, ranks)
            total = _weighted_sum(rows, row, ranks, None)
        combined = round_to_bf16(total)
        return combined if out is None else out.copy_(combined)

    def _sum_domains(self, rows: Tensor, row: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of domains in place of ranks': [n, H] float32, then a token's row and column [T, D]."""
        sums, numbers = [], []
        for columns, of_domain in zip(
            row.split(self.ranks_per_domain, dim=1), ranks.split(self.ranks_per_domain, dim=1), strict=True
        ):
            first = int(of_domain[0, 0]) if of_domain.numel() else 0
            total = _weighted_sum(rows, columns, of_domain - first, None)
            sums.append(round_to_bf16(total).float())
            numbers.append((columns >= 0).any(1))
        tokens, has_row = len(row), torch.stack(numbers, dim=1)
        number = torch.arange(has_row.shape[1], device=row.device) * tokens
        by_domain = torch.arange(tokens, device=row.device).unsqueeze(1) + number
        domains = torch.arange(has_row.shape[1], device=row.device).expand(has_row.shape)
        return torch.cat(sums), by_domain.masked_fill(~has_row, -1), domains


def _wants(wire: Wire, topk_idx: Tensor, num_experts: int) -> Tensor:
    """[T, E] bool: which experts a token goes to; none on masked ranks."""
    require(
        topk_idx.dim() == 2 and topk_idx.dtype in (torch.int32, torch.int64),
        f"topk_idx: got {topk_idx.dtype} {list(topk_idx.shape)}; allowed: int32 or int64 [T, K]",
    )
    require(
        num_experts > 0 and num_experts % wire.num_ranks == 0,
        f"num_experts: got {num_experts}; allowed: a positive multiple of {wire.num_ranks}",
    )
    experts = torch.arange(num_experts, device=topk_idx.device)
    wants = (topk_idx.unsqueeze(-1) == experts).any(1)
    for rank, columns in enumerate(wants.chunk(wire.num_ranks, dim=1)):
        if rank not in wire.members:
            columns.fill_(False)
    return wants


def _ranks_of(wants: Tensor, num_ranks: int) -> Tensor:
    """[T, E] -> [T, R] bool."""
    return wants.unflatten(1, (num_ranks, wants.shape[1] // num_ranks)).any(2)


def _numbered(selected: Tensor) -> Tensor:
    """The number of each True in reading order, -1 elsewhere."""
    numbers = selected.flatten().cumsum(0).view(selected.shape) - 1
    return numbers.masked_fill(~selected, -1)


def _held_rows(wire: Wire, recv_src_info: Tensor, layout_range: Tensor, num_max_tokens: int) -> Tensor:
    """[R, M, L] int64: the row of an expert that holds a source's token, or -1. Empty for masked sources."""
    num_local, num_ranks = layout_range.shape
    begin, count = layout_range >> 32, layout_range & 0xFFFFFFFF
    row = torch.arange(recv_src_info.shape[1], device=recv_src_info.device)
    held = torch.full((num_ranks, num_max_tokens, num_local), -1, dtype=torch.int64, device=row.device)
    for source in wire.members:
        first, past = begin[:, source, None], (begin + count)[:, source, None]
        expert, mine = ((row >= first) & (row < past)).nonzero(as_tuple=True)
        held[source, recv_src_info[expert, mine].long(), expert] = mine
    return held


def _partial_sums(
    wire: Wire,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    held: Tensor,
    wants: Tensor,
    num_local: int,
) -> tuple[Tensor, list[int]]:
    """This rank's weighted sums of the tokens it holds rows of, in bfloat16, and their number per owner."""
    num_ranks = wire.num_ranks
    source, token = held.ge(0).any(2).nonzero(as_tuple=True)
    held_counts = torch.bincount(source, minlength=num_ranks).tolist()
    in_rank = _ranks_of(wants, num_ranks)
    fields = {"topk_idx": topk_idx, "topk_weights": topk_weights}
    records = pack_records(fields)[in_rank.t().nonzero(as_tuple=True)[1]]
    got = unpack_records(wire.all_to_all_rows(records, in_rank.sum(0).tolist(), held_counts), fields)

    # Rows of x by (source, token) and local expert, then the same sum as everywhere, over local experts.
    row = held[source, token]  # [n, L]
    flat_row = torch.where(row >= 0, row + torch.arange(num_local, device=row.device) * x.shape[1], -1)
    local = got["topk_idx"] - wire.rank * num_local
    local = torch.where((local >= 0) & (local < num_local), local, -1)
    total = _weighted_sum(x.flatten(0, 1), flat_row, local, got["topk_weights"])
    return round_to_bf16(total), held_counts


def _weighted_sum(rows: Tensor, row_of: Tensor, columns: Tensor, weights: Tensor | None) -> Tensor:
    """sum over k ascending of weights[t, k] * rows[row_of[t, columns[t, k]]], float32 [T, H].

    Entries without a row (-1 in `columns` or in `row_of` [T, C]) are left out. The first term is taken as it
    is; each product is rounded before it is added.
    """
    num_tokens = row_of.shape[0]
    total = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    started = torch.zeros(num_tokens, 1, dtype=torch.bool, device=rows.device)
    for k in range(columns.shape[1]):
        column = columns[:, k].long()
        row = row_of.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1)
        token = ((column >= 0) & (row >= 0)).nonzero().flatten()
        term = rows[row[token]].float()
        if weights is not None:
            term = term * weights[token, k].unsqueeze(1)
        total[token] = torch.where(started[token], total[token] + term, term)
        started[token] = True
    return total
