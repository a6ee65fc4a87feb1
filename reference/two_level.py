"""Dispatch and combine in two hops over all_to_all: a token crosses to a domain once, and so does its sum.

A domain is `ranks_per_domain` consecutive ranks; the last one may be smaller. What rank s sends to a domain
goes through that domain's *gateway* of s: the rank with the local index of s (modulo the domain's size), or,
if that is masked, the next one, cyclically, that is not. The functions are those of all_to_all.py, and so are
dispatched rows, bit for bit; a combine sums as gateways do (`combine` below).

Nothing is remembered between calls: each begins by telling every gateway which of its domain's ranks the
tokens go to that come through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import all_to_all
from .all_to_all import CombineTensors, DispatchPlan, DispatchTensors
from .checks import require
from .numerics import accumulator_dtype, round_to, settle_nans
from .records import pack_records, unpack_records
from .wire import Wire


@dataclass(frozen=True)
class TwoLevelExchange:
    """The functions of all_to_all.py between domains of `ranks_per_domain` ranks."""

    ranks_per_domain: int

    def exchange_counts(
        self, wire: Wire, is_token_in_rank: Tensor, num_tokens_per_expert: Tensor | None = None
    ) -> DispatchPlan:
        """The plan is that of one level: gateways learn what they need in each call."""
        return all_to_all.exchange_counts(wire, is_token_in_rank, num_tokens_per_expert)

    def dispatch(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        scales: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int = 0,
        out: DispatchTensors | None = None,
    ) -> DispatchTensors:
        """`all_to_all.dispatch`, whose records cross to a domain once a token and are spread there."""
        return all_to_all.dispatch(
            wire,
            plan,
            x,
            scales=scales,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=num_experts,
            out=out,
            deliver=self._deliver,
        )

    def _deliver(self, wire: Wire, plan: DispatchPlan, records: Tensor) -> Tensor:
        """From records [T, bytes] of own tokens to those received, [N, bytes] by source rank, then token."""
        relay = Relay.open(wire, plan, self.ranks_per_domain)
        held = wire.all_to_all_rows(records[relay.crossing_token], relay.crossing, relay.arriving)
        of_neighbours = relay.wanted.t().nonzero()[:, 1]  # by neighbour, then source, then token
        rows = wire.all_to_all_rows(held[of_neighbours], relay.spread, relay.from_gateways)
        received = torch.empty_like(rows)
        received[relay.row] = rows
        return received

    def combine(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        topk_weights: Tensor | None = None,
        biases: Sequence[Tensor] = (),
    ) -> CombineTensors:
        """Sum each token's rows by domain at its gateways, and the domains' sums at its owner.

        A domain's sum is of its ranks ascending, in float32 (float64 for float64), from its first term on,
        rounded to the dtype of `x`; the owner adds those, domains ascending, after the biases, and rounds
        again. Arguments, results and errors are those of `all_to_all.combine`.
        """
        fields = all_to_all.fields_to_return(plan, x, topk_weights, biases)
        relay = Relay.open(wire, plan, self.ranks_per_domain)
        rows = pack_records(fields)[relay.row]
        returned = wire.all_to_all_rows(rows, relay.from_gateways, relay.spread)
        domain = _Sum(len(relay.wanted), fields)
        by_neighbour = returned.split([relay.spread[rank] for rank in relay.neighbours])
        for wanted, rows in zip(relay.wanted.unbind(1), by_neighbour, strict=True):
            domain.add(wanted.nonzero().flatten(), unpack_records(rows, fields))
        sums = wire.all_to_all_rows(pack_records(domain.rounded()), relay.arriving, relay.crossing)

        total = _Sum(plan.num_tokens, fields)
        for bias in biases:
            total.add(torch.arange(plan.num_tokens, device=x.device), {"x": bias})
        by_gateway = zip(relay.crossing_token.split(relay.crossing), sums.split(relay.crossing), strict=True)
        for tokens, rows in by_gateway:  # gateways ascending: domains ascending
            total.add(tokens, unpack_records(rows, fields))
        done = total.rounded()
        return CombineTensors(done["x"], done.get("topk_weights"))


class _Sum:
    """Running sums of `num_tokens` records of rows and, maybe, weights."""

    def __init__(self, num_tokens: int, like: dict[str, Tensor]) -> None:
        rows, weights = like["x"], like.get("topk_weights")
        self._dtype = rows.dtype
        self._x = rows.new_zeros(num_tokens, rows.shape[1], dtype=accumulator_dtype(rows.dtype))
        self._started = torch.zeros(num_tokens, 1, dtype=torch.bool, device=rows.device)
        self._weights = None if weights is None else weights.new_zeros(num_tokens, weights.shape[1])

    def add(self, tokens: Tensor, fields: dict[str, Tensor]) -> None:
        """Add a row, and weights if there are any, to the sums of each of `tokens`, all different."""
        term = fields["x"].to(self._x.dtype)
        # The first term is taken, not added to zero: 0.0 + -0.0 would lose the sign of a lone -0.0.
        self._x[tokens] = torch.where(self._started[tokens], self._x[tokens] + term, term)
        self._started[tokens] = True
        if self._weights is not None and "topk_weights" in fields:
            self._weights[tokens] += fields["topk_weights"]

    def rounded(self) -> dict[str, Tensor]:
        """The sums, in the dtypes of the records."""
        fields = {"x": round_to(self._x, self._dtype)}
        if self._weights is not None:
            fields["topk_weights"] = settle_nans(self._weights)
        return fields


@dataclass(frozen=True)
class Relay:
    """One rank's part in the two hops of a call: as the owner of tokens, as a gateway and as a receiver.

    Lists indexed by rank hold zero for masked ranks. P is the number of living ranks of this domain.
    """

    crossing_token: Tensor  # [C] int64: own tokens, by the gateway they go to, then token
    crossing: list[int]  # [R] own tokens to each gateway; sum C
    arriving: list[int]  # [R] tokens of each source that this rank is the gateway of; sum G
    wanted: Tensor  # [G, P] bool: which of the neighbours each of those tokens goes to, by source, then token
    neighbours: list[int]  # [P] this domain's living ranks, ascending
    spread: list[int]  # [R] rows to each of them
    from_gateways: list[int]  # [R] rows from each of them; sum N
    row: Tensor  # [N] int64: received rows (by source, then token) in the order by gateway, source, token

    @classmethod
    def open(cls, wire: Wire, plan: DispatchPlan, ranks_per_domain: int) -> Relay:
        """The routes of a plan among the wire's members. Collective: gateways learn what comes to them."""
        require(ranks_per_domain >= 1, f"ranks_per_domain: got {ranks_per_domain}; allowed: at least 1")
        device, ranks = plan.send_token.device, range(wire.num_ranks)
        domains = [
            [r for r in ranks[first : first + ranks_per_domain] if r in wire.members]
            for first in ranks[::ranks_per_domain]
        ]
        own = wire.rank // ranks_per_domain

        def gateway(domain: int, source: int) -> int:
            first = domain * ranks_per_domain
            size = min(ranks_per_domain, wire.num_ranks - first)
            start = first + source % ranks_per_domain % size
            return min(domains[domain], key=lambda rank: (rank - start) % size)

        table = torch.zeros(plan.num_tokens, wire.num_ranks, dtype=torch.bool, device=device)
        for rank, tokens in enumerate(plan.send_token.split(plan.send_counts)):
            table[tokens, rank] = True
        crossing, crossing_token, masks = [0 for _ in ranks], [], []
        for domain, members in enumerate(domains):
            if not members:
                continue  # it is masked as a whole, and gets nothing
            in_domain = table[:, members]
            tokens = in_domain.any(1).nonzero().flatten()
            crossing[gateway(domain, wire.rank)] = tokens.numel()
            crossing_token.append(tokens)
            unused = ranks_per_domain - len(members)
            masks.append(torch.nn.functional.pad(in_domain[tokens], (0, unused)))
        posted = wire.all_gather(torch.tensor(crossing, dtype=torch.int64, device=device))
        arriving = [int(posted[source][wire.rank]) if source in posted else 0 for source in ranks]
        wanted = wire.all_to_all_rows(torch.cat(masks), crossing, arriving)[:, : len(domains[own])]

        row: list[int] = []
        spread, from_gateways = [0 for _ in ranks], [0 for _ in ranks]
        starts = [sum(plan.recv_counts[:source]) for source in ranks]
        for place, rank in enumerate(domains[own]):
            spread[rank] = int(wanted[:, place].sum())
            for source in (source for source in wire.members if gateway(own, source) == rank):
                from_gateways[rank] += plan.recv_counts[source]
                row += range(starts[source], starts[source] + plan.recv_counts[source])
        return cls(
            crossing_token=torch.cat(crossing_token),
            crossing=crossing,
            arriving=arriving,
            wanted=wanted,
            neighbours=domains[own],
            spread=spread,
            from_gateways=from_gateways,
            row=torch.tensor(row, dtype=torch.int64, device=device),
        )
