"""The oracle of expanded layouts against plain Python: rows looked up one by one, sums of single terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference.elastic import ElasticInput, combine, dispatch
from deepep.reference.numerics import round_to_bf16

Draw = Callable[[int, int, str], tuple[int, list[Tensor]]]
SameBits = Callable[[Tensor, Tensor], bool]
MOST = 64


def make_inputs(topk: list[Tensor], seed: int, hidden: int = 4) -> list[ElasticInput]:
    """Rows of any bits, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ElasticInput(
            torch.randint(
                -(1 << 15), 1 << 15, (len(idx), hidden), generator=generator, dtype=torch.int16
            ).view(torch.bfloat16),
            idx,
            torch.rand(idx.shape, generator=generator),
            torch.rand(3, len(idx), generator=generator).t(),
        )
        for idx in topk
    ]


def lanes(inputs: list[ElasticInput], num_local: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(source, token, lane, rank, local expert) of every entry that names an expert."""
    for source, given_ in enumerate(inputs):
        for token, row in enumerate(given_.topk_idx.tolist()):
            for lane, expert in enumerate(row):
                if expert >= 0:
                    yield source, token, lane, expert // num_local, expert % num_local


def places(inputs: list[ElasticInput], num_local: int, alignment: int) -> dict[tuple[int, int, int], int]:
    """The expanded row of each (source, token, lane), at the rank that it goes to."""
    found = {}
    for rank in range(len(inputs)):
        row = 0
        for expert in range(num_local):
            row += -row % alignment
            for source, token, lane, to, local in lanes(inputs, num_local):  # in the order that is wanted
                if (to, local) == (rank, expert):
                    found[source, token, lane] = row
                    row += 1
    return found


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_row_for_every_lane(
    num_ranks: int, alignment: int, draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits
) -> None:
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, num_ranks, pattern)
        num_local, inputs = num_experts // num_ranks, make_inputs(topk, seed)
        outputs = dispatch(inputs, num_experts, num_max_tokens=MOST, alignment=alignment, expand=True)
        at, seen = places(inputs, num_local, alignment), [set() for _ in outputs]
        counts = [[0] * num_local for _ in outputs]
        for source, token, lane, rank, local in lanes(inputs, num_local):
            out, row = outputs[rank], at[source, token, lane]
            assert same_bits(out.recv_x[row], inputs[source].x[token])
            assert same_bits(out.recv_scales[row], inputs[source].scales[token])
            assert out.recv_topk_weights[row] == inputs[source].topk_weights[token, lane]
            seen[rank].add(row)
            counts[rank][local] += 1
        for rank, out in enumerate(outputs):
            assert out.is_real.nonzero().flatten().tolist() == sorted(seen[rank])
            assert not out.recv_x[~out.is_real].view(torch.int16).any()
            assert out.expert_counts == counts[rank]
            assert out.recv_topk_idx is None
            start = 0
            for count, end in zip(counts[rank], out.expert_ends, strict=True):
                assert end == start + count
                start = end + -end % alignment
            assert out.num_rows == start == len(out.recv_x)


@pytest.mark.parametrize("expand", [False, True])
def test_metadata_says_where_rows_are_from(
    expand: bool, draw_routing: Draw, patterns: tuple[str, ...]
) -> None:
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, 3, pattern)
        num_local, inputs = num_experts // 3, make_inputs(topk, seed)
        at, num_topk = places(inputs, num_local, 2), topk[0].shape[1]
        outputs = dispatch(inputs, num_experts, num_max_tokens=MOST, alignment=2, expand=expand)
        for rank, out in enumerate(outputs):
            row = 0
            for source, given_ in enumerate(inputs):
                for token, experts in enumerate(given_.topk_idx.tolist()):
                    mine = [k for k, e in enumerate(experts) if e >= 0 and e // num_local == rank]
                    if not mine:
                        continue
                    rows = [at[source, token, k] if k in mine and expand else -1 for k in range(num_topk)]
                    wanted = [source * MOST + token, source * num_topk + mine[-1], *rows]
                    assert out.metadata[row].tolist() == wanted
                    row += 1
                assert out.rank_ends[source] == row
            assert row == len(out.metadata)


def test_not_expanded_it_is_the_plain_dispatch(draw_routing: Draw) -> None:
    num_experts, topk = draw_routing(1, 2, "some -1")
    inputs = make_inputs(topk, 1)
    (first, _) = dispatch(inputs, num_experts, num_max_tokens=MOST, alignment=8)
    assert first.recv_topk_idx is not None
    assert first.recv_topk_weights is not None
    assert not first.recv_topk_weights[first.recv_topk_idx < 0].any()
    aligned = [-(-n // 8) * 8 for n in first.expert_counts]
    assert first.expert_ends == [sum(aligned[: i + 1]) for i in range(len(aligned))]
    assert first.num_rows == sum(aligned)


def finite(inputs: list[ElasticInput], outputs: list, seed: int, hidden: int) -> list[Tensor]:
    """Rows to return, one a lane; poison in the gaps."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for out in outputs:
        rows = torch.randn(out.num_rows, hidden, generator=generator).bfloat16()
        rows[~out.is_real] = torch.nan
        made.append(rows)
    return made


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_sums_term_by_term(
    single: bool, num_biases: int, draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits
) -> None:
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, 3, pattern)
        num_local, inputs = num_experts // 3, make_inputs(topk, seed)
        outputs = dispatch(inputs, num_experts, num_max_tokens=MOST, alignment=4, expand=True)
        xs = finite(inputs, outputs, seed, 4)
        biases = [[torch.randn(len(idx), 4).bfloat16() for _ in range(num_biases)] for idx in topk]
        weights = [out.recv_topk_weights for out in outputs]
        done = combine(
            xs,
            inputs,
            num_experts,
            alignment=4,
            expanded=True,
            single_reduction=single,
            topk_weights=weights,
            biases=biases,
        )
        at = places(inputs, num_local, 4)
        for owner, given_ in enumerate(inputs):
            for token, experts in enumerate(given_.topk_idx.tolist()):
                terms = [bias[token].float() for bias in biases[owner]]
                by_rank: dict[int, Tensor] = {}
                for lane, expert in enumerate(experts):
                    wanted = 0.0
                    if expert >= 0:
                        row = xs[expert // num_local][at[owner, token, lane]].float()
                        wanted = float(given_.topk_weights[token, lane])
                        if single:
                            terms.append(row)
                        else:
                            before = by_rank.get(expert // num_local, torch.zeros(4))
                            by_rank[expert // num_local] = before + row
                    assert done[owner].topk_weights[token, lane] == wanted
                terms += [round_to_bf16(by_rank[rank]).float() for rank in sorted(by_rank)]
                total = torch.zeros(4)
                for term in terms:
                    total = total + term
                assert same_bits(done[owner].x[token], round_to_bf16(total))


@settings(max_examples=60, deadline=None)
@given(
    num_ranks=st.integers(1, 3),
    num_local=st.integers(1, 3),
    num_topk=st.integers(1, 4),
    alignment=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_rows_come_back(
    num_ranks: int, num_local: int, num_topk: int, alignment: int, seed: int, data: st.DataObject
) -> None:
    """Rows of small whole numbers, returned as they are: each token's, times its lanes; in either reduction,
    whatever experts it names, also twice, and whichever it names none of.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(num_ranks):
        tokens = data.draw(st.integers(0, 5))
        idx = torch.randint(-1, num_ranks * num_local, (tokens, num_topk), generator=generator)
        inputs.append(ElasticInput(torch.randint(-8, 9, (tokens, 2), generator=generator).bfloat16(), idx))
    experts = num_ranks * num_local
    outputs = dispatch(inputs, experts, num_max_tokens=5, alignment=alignment, expand=True)
    assert sum(int(out.is_real.sum()) for out in outputs) == sum(int((i.topk_idx >= 0).sum()) for i in inputs)
    for single in (False, True):
        done = combine(
            [out.recv_x for out in outputs],
            inputs,
            experts,
            alignment=alignment,
            expanded=True,
            single_reduction=single,
        )
        for given_, back in zip(inputs, done, strict=True):
            assert back.topk_weights is None
            wanted = given_.x.float() * (given_.topk_idx >= 0).sum(1, keepdim=True)
            assert torch.equal(back.x.float(), wanted)


def test_other_lanes_weights_are_ignored() -> None:
    """Weights at lanes of other ranks' experts are not summed: DeepEP's rows bring those of all."""
    idx = torch.tensor([[0, 1], [1, -1]])
    inputs = [
        ElasticInput(torch.ones(2, 2).bfloat16(), idx),
        ElasticInput(torch.ones(0, 2).bfloat16(), idx[:0]),
    ]
    outputs = dispatch(inputs, 2, num_max_tokens=2)
    given_ = [torch.full(out.recv_topk_idx.shape, 3.0) for out in outputs]
    done = combine([out.recv_x for out in outputs], inputs, 2, topk_weights=given_)
    assert done[0].topk_weights.tolist() == [[3.0, 3.0], [3.0, 0.0]]


def test_more_tokens_than_the_most_are_refused() -> None:
    given_ = ElasticInput(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rank 0: x: got 3 tokens; allowed: at most 2"):
        dispatch([given_], 1, num_max_tokens=2)
