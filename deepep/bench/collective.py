"""The same exchange by torch.distributed's all_to_all_single: alone, and with what has to be done around it.

It is spared all that a library has to do besides: how many rows go where is known beforehand, and neither
indices nor weights travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.bench.operations import COMBINE, DISPATCH, Inputs, TimedOperation
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in
from deepep.reference.records import dense

ALONE, PERMUTED, REDUCED = "alone", "with permute", "with reduce"


class CollectiveExchange:
    """Rows to the ranks that want them, and back.

    order [S] int64: this rank's tokens by destination rank, then token. sent, received [R]: rows to and from
    each rank.
    """

    def __init__(self, group: Any, inputs: Inputs) -> None:
        self._group = group
        rank = inputs.rank
        wanted = inputs.workload.layouts[rank].is_token_in_rank  # [T, R]
        self.order = wanted.t().nonzero()[:, 1].to(inputs.device)
        self.sent: list[int] = inputs.workload.rows[rank].tolist()
        self.received: list[int] = inputs.workload.rows[:, rank].tolist()
        self.num_tokens = len(wanted)

    def there(self, rows: Tensor) -> Tensor:
        """[S, ...] by destination -> [N, ...] by source rank, then source token."""
        return self._swap(rows, self.sent, self.received)

    def back(self, rows: Tensor) -> Tensor:
        """[N, ...] as received -> [S, ...] by the rank they come back from, then token."""
        return self._swap(rows, self.received, self.sent)

    def dispatch(self, x: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [T, H], scales [T, P] -> the rows received and theirs. A permutation and an exchange of each."""
        # Gathered in words: some of torch's kernels go element by element, and an element may be a byte.
        recv_x = self.there(x.view(torch.int64)[self.order]).view(x.dtype)
        # Not by indexing: that may keep the strides of scales that lie column by column.
        return recv_x, None if scales is None else self.there(scales.index_select(0, self.order))

    def combine(self, y: Tensor) -> Tensor:
        """y [N, H] bf16 -> [T, H] bf16: summed in fp32, ranks ascending, rounded once."""
        rows = self.back(y)
        total = torch.zeros(self.num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
        # Rank by rank: a rank returns a token once, so that no two additions meet in whatever order.
        for part, tokens in zip(rows.split(self.sent), self.order.split(self.sent), strict=True):
            total.index_add_(0, tokens, part.float())
        return total.bfloat16()

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows, received, sent, group=self._group)
        return out


def collective_operations(group: Any, inputs: Inputs, dtypes: Sequence[Dtype]) -> Iterator[TimedOperation]:
    """Dispatch in each dtype and combine, alone and complete. Alone, a row's scales lie beside its values."""
    exchange = CollectiveExchange(group, inputs)
    load = inputs.workload
    for dtype in dtypes:
        x, scales = inputs.rows(dtype)
        parts = [x.view(torch.uint8)] + ([] if scales is None else [dense(scales).view(torch.uint8)])
        records = torch.cat(parts, dim=1)[exchange.order]  # [S, bytes]
        traffic = load.dispatched(dtype)
        yield TimedOperation(
            DISPATCH, partial(exchange.there, records), _split(x, scales), dtype, traffic, ALONE
        )
        yield TimedOperation(
            DISPATCH,
            partial(exchange.dispatch, x, scales),
            lambda made: {"recv_x": made[0], "recv_scales": made[1]},
            dtype,
            traffic,
            PERMUTED,
        )
        del records
    y = expert_stand_in(exchange.dispatch(inputs.x, None)[0], inputs.rank)
    traffic = load.combined()
    yield TimedOperation(
        COMBINE, lambda: exchange.back(y), lambda made: {"returned_rows": made}, "bf16", traffic, ALONE
    )
    yield TimedOperation(
        COMBINE, lambda: exchange.combine(y), lambda made: {"combined_x": made}, "bf16", traffic, REDUCED
    )


def _split(x: Tensor, scales: Tensor | None) -> Callable[[Tensor], dict[str, Any]]:
    """Received records as rows and scales."""
    width = x.shape[1] * x.element_size()

    def split(records: Tensor) -> dict[str, Any]:
        return {
            "recv_x": dense(records[:, :width]).view(x.dtype),
            "recv_scales": None if scales is None else dense(records[:, width:]).view(scales.dtype),
        }

    return split
