"""Buffer.get_dispatch_layout, dispatch and combine against the global-view
oracle, bit for bit, edge by edge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

HIDDEN = 32


def distinct(rng: Any, num_ranks: int) -> tuple[int, list[torch.Tensor]]:
    num_experts = 3 * num_ranks
    tokens = rng.integers(1, 9, size=num_ranks)
    return num_experts, [
        torch.from_numpy(rng.permuted(_rows(t, num_experts), axis=1)[:, :3].copy()) for t in tokens
    ]


def _rows(num_tokens: int, num_experts: int) -> Any:
    import numpy as np

    return np.tile(np.arange(num_experts), (num_tokens, 1))


def _random(rng: Any, num_tokens: int, num_topk: int, low: int, high: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(low, high, size=(num_tokens, num_topk)))


# name -> (rng, R) -> E and topk_idx [T, K] by rank. Numbers refer to the interface's list of edge cases.
PATTERNS: dict[str, Callable[[Any, int], tuple[int, list[torch.Tensor]]]] = {
    "plain": distinct,
    "1: no token on one rank": lambda g, r: (
        2 * r,
        [_random(g, 0 if i == r // 2 else 5 + i, 2, 0, 2 * r) for i in range(r)],
    ),
    "1: no token anywhere": lambda g, r: (2 * r, [_random(g, 0, 2, 0, 2 * r) for _ in range(r)]),
    "1: one token each": lambda g, r: (2 * r, [_random(g, 1, 2, 0, 2 * r) for _ in range(r)]),
    "2: many -1": lambda g, r: (2 * r, [_random(g, 6, 4, -1, 2 * r).clamp(max=r - 1) for _ in range(r)]),
    "2: all -1 on one rank": lambda g, r: (
        2 * r,
        [_random(g, 4, 3, -1, 0 if i == 0 else 2 * r) for i in range(r)],
    ),
    "2: all -1 everywhere": lambda g, r: (2 * r, [_random(g, 3, 3, -1, 0) for _ in range(r)]),
    "3: duplicate experts": lambda g, r: (2 * r, [_random(g, 6, 4, 0, 2) for _ in range(r)]),
    "4: one rank gets everything": lambda g, r: (
        2 * r,
        [_random(g, 7, 2, 2 * r - 2, 2 * r) for _ in range(r)],
    ),
    "5: all choices on one rank": lambda g, r: (
        4 * r,
        [(_random(g, 5, 1, 0, r) * 4 + torch.arange(4)).long() for _ in range(r)],
    ),
    "5: each choice on another rank": lambda g, r: (
        2 * r,
        [(torch.arange(r) * 2).repeat(4, 1) for _ in range(r)],
    ),
    "6: K > R": lambda g, r: (3 * r, [_random(g, 5, r + 3, -1, 3 * r) for _ in range(r)]),
    "6: K = 1": lambda g, r: (2 * r, [_random(g, 5, 1, 0, 2 * r) for _ in range(r)]),
    "6: K = 32": lambda g, r: (8 * r, [_random(g, 3, 32, -1, 8 * r) for _ in range(r)]),
    "6: E = R": lambda g, r: (r, [_random(g, 6, 2, -1, r) for _ in range(r)]),
    "nothing leaves its rank": lambda g, r: (2 * r, [_random(g, 4, 2, 2 * i, 2 * i + 2) for i in range(r)]),
}


def everyones_inputs(
    seed: int, topk: list[torch.Tensor], kind: str, index_dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Arguments of all ranks.

    Values identify their rank and token; with some that arithmetic would not keep.
    """
    inputs = []
    for rank, idx in enumerate(topk):
        generator = torch.Generator().manual_seed(seed * 100 + rank)
        num_tokens = idx.shape[0]
        x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
        if num_tokens:
            x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
        scales = None
        if kind != "bf16":
            x = torch.randint(0, 256, (num_tokens, HIDDEN), generator=generator, dtype=torch.uint8)
            x = x.view(torch.float8_e4m3fn)
            width = 3  # 12 bytes: not a multiple of 16
            scales = torch.rand(width, num_tokens, generator=generator).t()  # column-major
            if kind == "fp8+int32":
                scales = torch.randint(-(2**31), 2**31, (num_tokens, 2 * width), generator=generator)[
                    :, ::2
                ].int()
            if kind == "fp8+strided":
                scales = torch.rand(num_tokens, 2 * width + 1, generator=generator)[:, 1::2]
        inputs.append(
            {
                "x": x,
                "scales": scales,
                "topk_idx": idx.to(index_dtype),
                "topk_weights": torch.rand(idx.shape, generator=generator),
            }
        )
    return inputs


def run(
    ctx: Any,
    buffer_of: Any,
    same_bits: Any,
    num_experts: int,
    topk: list[torch.Tensor],
    kind: str,
    index_dtype: torch.dtype,
    alignment: int,
    worst: str,
) -> None:
    from deepep.reference import high_throughput as oracle
    from deepep.reference.layout import dispatch_layout

    buffer, rank, num_ranks = buffer_of(ctx), ctx.rank, ctx.num_ranks
    inputs = everyones_inputs(7, topk, kind, index_dtype)
    layouts = [dispatch_layout(given["topk_idx"], num_experts, num_ranks) for given in inputs]

    # layout
    mine = inputs[rank]
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(mine["topk_idx"], num_experts)
    assert event.event is None
    assert per_node is None
    assert same_bits(per_rank, layouts[rank].num_tokens_per_rank)
    assert same_bits(per_expert, layouts[rank].num_tokens_per_expert)
    assert same_bits(in_rank, layouts[rank].is_token_in_rank)

    # dispatch
    tables = [layout.is_token_in_rank for layout in layouts]
    real = [int(sum(table[:, r].sum() for table in tables)) for r in range(num_ranks)]
    num_worst = {"off": 0, "exact": max(real[rank], 1), "larger": real[rank] + 3}[worst]
    expected = oracle.dispatch(
        [
            oracle.DispatchInput(
                given["x"],
                table,
                given["scales"],
                given["topk_idx"],
                given["topk_weights"],
                layout.num_tokens_per_expert,
            )
            for given, table, layout in zip(inputs, tables, layouts, strict=True)
        ],
        num_experts,
        expert_alignment=alignment,
    )[rank]
    received, indices, weights, counts, handle, _ = buffer.dispatch(
        mine["x"] if mine["scales"] is None else (mine["x"], mine["scales"]),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=mine["topk_idx"],
        topk_weights=mine["topk_weights"],
        expert_alignment=alignment,
        num_worst_tokens=num_worst,
    )
    x, scales = received if isinstance(received, tuple) else (received, None)
    n = real[rank]
    rows = num_worst or n
    assert x.shape == (rows, HIDDEN)
    assert same_bits(x[:n], expected.recv_x)
    assert same_bits(None if scales is None else scales[:n], expected.recv_scales)
    assert scales is None or scales.is_contiguous()
    assert same_bits(indices[:n], expected.recv_topk_idx)
    assert same_bits(weights[:n], expected.recv_topk_weights)
    assert bool((indices[n:] == -1).all())
    assert counts == ([] if num_worst else expected.num_recv_tokens_per_expert)
    assert same_bits(handle[3], expected.src_token)
    assert handle[4] is in_rank
    assert handle[0][:, rank].tolist() == [
        sum(int(t[:, rank].sum()) for t in tables[: s + 1]) for s in range(num_ranks)
    ]

    # cached dispatch: same routes, other rows; twice, and after another dispatch
    for _ in range(2):
        again, *nothing, _ = buffer.dispatch(
            mine["x"] if mine["scales"] is None else (mine["x"], mine["scales"]), handle=handle
        )
        assert nothing == [None] * 4
        again_x, again_scales = again if isinstance(again, tuple) else (again, None)
        assert again_x.shape[0] == rows
        assert same_bits(again_x[:n], expected.recv_x)
        assert same_bits(None if again_scales is None else again_scales[:n], expected.recv_scales)

    # combine: every rank returns rows of its own, so that a row from the wrong rank shows
    def returned(r: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(50 + r)
        return torch.randn(real[r], HIDDEN, generator=generator).bfloat16()

    def weights_of(r: int) -> torch.Tensor:
        return torch.rand(real[r], topk[0].shape[1], generator=torch.Generator().manual_seed(60 + r))

    def bias_of(r: int, count: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(70 + r)
        return tuple(torch.randn(len(topk[r]), HIDDEN, generator=generator).bfloat16() for _ in range(count))

    everyone = range(num_ranks)
    padding = rows - n
    for num_biases in (0, 1, 2):
        wanted = oracle.combine(
            [returned(r) for r in everyone],
            tables,
            topk_weights=[weights_of(r) for r in everyone],
            biases=[bias_of(r, num_biases) for r in everyone],
        )[rank]
        biases = bias_of(rank, num_biases)
        summed, summed_weights, _ = buffer.combine(
            torch.cat([returned(rank), torch.full((padding, HIDDEN), float("nan")).bfloat16()]),
            handle,
            topk_weights=torch.cat([weights_of(rank), torch.full((padding, topk[0].shape[1]), float("nan"))]),
            bias=None if not biases else biases[0] if len(biases) == 1 else biases,
        )
        assert same_bits(summed, wanted.x), (summed, wanted.x)
        assert same_bits(summed_weights, wanted.topk_weights)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_edges_match_the_oracle(
    world_of: Any, buffer_of: Any, same_bits: Any, pattern: str, num_ranks: int
) -> None:
    import numpy as np

    which = list(PATTERNS).index(pattern)
    num_experts, topk = PATTERNS[pattern](np.random.default_rng([which, num_ranks]), num_ranks)
    # Options go round with the patterns, so that every pair of neighbours is seen at some number of ranks.
    turn = which + num_ranks
    kind = ("bf16", "fp8", "fp8+int32", "fp8+strided")[turn % 4]
    index_dtype = (torch.int64, torch.int32)[turn % 2]
    worst = ("off", "exact", "larger")[turn % 3]
    alignment = (1, 8, 128)[(turn + which // 3) % 3]
    world_of(num_ranks).run(run, buffer_of, same_bits, num_experts, topk, kind, index_dtype, alignment, worst)


def without_topk(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer = buffer_of(ctx)
    num_experts = 2 * ctx.num_ranks
    idx = routing(ctx.rank, ctx.num_ranks, num_experts, 2, 5)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(ctx.rank)).to(dtype)
        received, indices, weights, counts, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
        )
        assert indices is None
        assert weights is None
        assert len(counts) == 2
        assert received.dtype == dtype
        if dtype != torch.bfloat16 and buffer.info.backend != "reference":
            continue  # kernels sum bf16 alone
        summed, summed_weights, _ = buffer.combine(received, handle)
        assert summed_weights is None
        # The same row comes back from each of n ranks: x + x + ... n times, exact sums of equal terms for n
        # <= 2,
        # one rounding each for n = 3 in the accumulator's precision; the oracle rounds alike.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros(5, HIDDEN, dtype=wide)
        for r in range(ctx.num_ranks):
            total = total + x.to(wide) * in_rank[:, r : r + 1].to(wide)
        assert same_bits(summed, total.to(dtype))


def test_rows_without_topk_of_any_float_dtype(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(3).run(without_topk, buffer_of, same_bits, routing)


def internode(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer = buffer_of(ctx)
    idx = routing(ctx.rank, ctx.num_ranks, 4, 2, 3)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
    x = torch.full((3, 8), float(ctx.rank + 1)).bfloat16()
    plain = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert)
    named = buffer.internode_dispatch(x, None, per_rank, per_node, in_rank, per_expert)
    assert same_bits(plain[0], named[0])
    summed = buffer.internode_combine(named[0], named[4])[0]
    assert same_bits(summed, x * in_rank.sum(1, keepdim=True))


def test_internode_names_are_the_same_operations(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(2).run(internode, buffer_of, same_bits, routing)
