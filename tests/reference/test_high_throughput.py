"""The high-throughput oracle against plain Python: rows looked up one by one, sums made of single floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from deepep.reference.high_throughput import DispatchInput, combine, dispatch
from deepep.reference.layout import dispatch_layout
from deepep.reference.numerics import round_to_bf16

Draw = Callable[[int, int, str], tuple[int, list[Tensor]]]
SameBits = Callable[[Tensor, Tensor], bool]


def make_inputs(topk: list[Tensor], num_experts: int, hidden: int, seed: int) -> list[DispatchInput]:
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for idx in topk:
        num_tokens = idx.shape[0]
        layout = dispatch_layout(idx, num_experts, len(topk))
        bits = torch.randint(
            -(1 << 15), 1 << 15, (num_tokens, hidden), generator=generator, dtype=torch.int16
        )
        inputs.append(
            DispatchInput(
                x=bits.view(torch.bfloat16),  # any bits: NaNs and infinities are among them
                is_token_in_rank=layout.is_token_in_rank,
                scales=torch.rand(3, num_tokens, generator=generator).t(),
                topk_idx=idx,
                topk_weights=torch.rand(idx.shape, generator=generator),
                num_tokens_per_expert=layout.num_tokens_per_expert,
            )
        )
    return inputs


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_dispatch_row_by_row(
    num_ranks: int, draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits
) -> None:
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, num_ranks, pattern)
        num_local = num_experts // num_ranks
        inputs = make_inputs(topk, num_experts, hidden=6, seed=seed)
        masked = {seed % num_ranks} if seed % 3 == 2 and num_ranks > 1 else set()
        outputs = dispatch(inputs, num_experts, expert_alignment=4, masked=masked)
        for rank, out in enumerate(outputs):
            row = 0
            per_expert = [0] * num_local
            for source, given in enumerate(inputs):
                assert given.topk_idx is not None
                assert given.topk_weights is not None
                assert given.scales is not None
                if source in masked or rank in masked:
                    continue
                for token, chosen in enumerate(given.topk_idx.tolist()):
                    local = [e - rank * num_local if e // num_local == rank else -1 for e in chosen]
                    if all(e == -1 for e in local):
                        continue
                    assert (int(out.src_rank[row]), int(out.src_token[row])) == (source, token)
                    assert same_bits(out.recv_x[row], given.x[token])
                    assert out.recv_scales is not None
                    assert out.recv_topk_idx is not None
                    assert out.recv_topk_weights is not None
                    assert same_bits(out.recv_scales[row], given.scales[token])
                    assert out.recv_topk_idx[row].tolist() == local
                    weights = zip(given.topk_weights[token].tolist(), local, strict=True)
                    assert out.recv_topk_weights[row].tolist() == [w if e >= 0 else 0.0 for w, e in weights]
                    for e in local:
                        if e >= 0:
                            per_expert[e] += 1
                    row += 1
            assert row == out.recv_x.shape[0] == out.src_rank.shape[0]
            assert out.recv_scales is not None
            assert out.recv_scales.is_contiguous()
            assert out.num_recv_tokens_per_expert == [(n + 3) // 4 * 4 for n in per_expert]


def small_inputs() -> list[DispatchInput]:
    """Two ranks of one expert. Token 0 of rank 0 goes to both, all others to rank 1."""
    topk = [torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1, 1]], dtype=torch.int64)]
    return make_inputs(topk, num_experts=2, hidden=4, seed=0)


@pytest.mark.parametrize("worst", [3, 7])
def test_worst_case_rows(worst: int, same_bits: SameBits) -> None:
    exact = dispatch(small_inputs(), 2)
    padded = dispatch(small_inputs(), 2, num_worst_tokens=worst)
    assert [out.recv_x.shape[0] for out in exact] == [1, 3]
    for want, got in zip(exact, padded, strict=True):
        rows = want.recv_x.shape[0]
        assert got.recv_x.shape[0] == worst
        assert same_bits(got.recv_x[:rows], want.recv_x)
        assert got.recv_topk_idx is not None
        assert want.recv_topk_idx is not None
        assert torch.equal(got.recv_topk_idx[:rows], want.recv_topk_idx)
        assert (got.recv_topk_idx[rows:] == -1).all()
        assert got.num_recv_tokens_per_expert == []


def test_duplicates_count_per_expert_and_arrive_once() -> None:
    outputs = dispatch(small_inputs(), 2)
    assert outputs[1].num_recv_tokens_per_expert == [4]  # rank 0: twice; rank 1: the duplicate counts twice
    assert outputs[1].recv_topk_idx is not None
    assert outputs[1].recv_topk_idx.tolist() == [[-1, 0], [0, -1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_keep_their_dtype(dtype: torch.dtype) -> None:
    inputs = [
        DispatchInput(**{**vars(given), "topk_idx": given.topk_idx.to(dtype)})  # type: ignore[union-attr]
        for given in small_inputs()
    ]
    for out in dispatch(inputs, 2, num_worst_tokens=4):
        assert out.recv_topk_idx is not None
        assert out.recv_topk_idx.dtype == dtype


def test_masked_weight_is_plus_zero() -> None:
    inputs = small_inputs()
    assert inputs[0].topk_weights is not None
    inputs[0].topk_weights.fill_(-0.5)
    weights = dispatch(inputs, 2)[0].recv_topk_weights
    assert weights is not None
    assert weights.view(torch.int32).tolist() == [[torch.tensor(-0.5).view(torch.int32).item(), 0]]


def test_cached_dispatch_has_no_topk() -> None:
    inputs = [DispatchInput(given.x, given.is_token_in_rank) for given in small_inputs()]
    out = dispatch(inputs, 2)[1]
    assert out.recv_topk_idx is None
    assert out.recv_topk_weights is None
    assert out.recv_scales is None
    assert out.num_recv_tokens_per_expert == []


def bf16(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)


def round_bits(value: np.float32) -> int:
    """The bfloat16 bits of a float32 that is not a NaN, to nearest even, in integers."""
    bits = int(value.view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_combine_float_by_float(num_ranks: int, draw_routing: Draw, patterns: tuple[str, ...]) -> None:
    rng = np.random.default_rng(num_ranks)
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, num_ranks, pattern)
        tables = [dispatch_layout(idx, num_experts, num_ranks).is_token_in_rank for idx in topk]
        num_biases = seed % 3
        hidden = 3

        def rows(num: int, hidden: int = hidden) -> Tensor:  # magnitudes far apart, so that the order shows
            spread = rng.standard_normal((num, hidden)) * 2.0 ** rng.integers(-12, 12, (num, hidden))
            return torch.from_numpy(spread.astype(np.float32)).to(torch.bfloat16)

        xs = [rows(sum(int(t[:, rank].sum()) for t in tables)) for rank in range(num_ranks)]
        weights = [torch.rand(x.shape[0], 2) for x in xs]
        biases = [tuple(rows(t.shape[0]) for _ in range(num_biases)) for t in tables]
        outputs = combine(xs, tables, biases=biases, topk_weights=weights)
        cursor = [0] * num_ranks
        for owner, table in enumerate(tables):
            for token, goes in enumerate(table.tolist()):
                terms = [b[token].float().numpy() for b in biases[owner]]
                weight = np.zeros(2, dtype=np.float32)
                for rank in range(num_ranks):
                    if goes[rank]:
                        terms.append(xs[rank][cursor[rank]].float().numpy())
                        weight = weight + weights[rank][cursor[rank]].numpy()
                        cursor[rank] += 1
                total = terms[0] if terms else np.zeros(hidden, dtype=np.float32)
                for term in terms[1:]:
                    total = total + term
                want = [round_bits(value) for value in total]
                assert (outputs[owner].x[token].view(torch.int16).int() & 0xFFFF).tolist() == want
                got_weights = outputs[owner].topk_weights
                assert got_weights is not None
                assert got_weights[token].tolist() == weight.tolist()


ALL_TO_TWO = [torch.tensor([[True, True]]), torch.zeros(0, 2, dtype=torch.bool)]


def two_terms(a: float, b: float, biases: tuple[float, ...] = ()) -> Tensor:
    """The bits of a sum of one token with a row from rank 0 and one from rank 1."""
    return combine(
        [bf16([[a]]), bf16([[b]])],
        ALL_TO_TWO,
        biases=[tuple(bf16([[bias]]) for bias in biases), tuple(bf16([[bias]])[:0] for bias in biases)],
    )[0].x


class TestNumbers:
    """Single sums whose rounding can be followed by hand. bfloat16 has 8 significant bits."""

    def test_ties_go_to_even(self) -> None:
        assert two_terms(256.0, 1.0).item() == 256.0  # 257 lies between 256 and 258: the even one
        assert two_terms(258.0, 1.0).item() == 260.0

    def test_one_rounding_at_the_end(self) -> None:
        # Rounding after each addition would stay at 256.
        assert two_terms(256.0, 0.5, (0.5, 1.0)).item() == 258.0

    def test_biases_come_first_then_ranks(self) -> None:
        huge = 2.0**40
        assert two_terms(-huge, 1.0, (huge,)).item() == 1.0
        assert two_terms(1.0, -huge, (huge,)).item() == 0.0  # the 1 is lost in the first sum

    def test_sums_run_in_float32(self) -> None:
        assert two_terms(-(2.0**24), 1.0, (2.0**24, 1.0)).item() == 1.0  # 2**24 + 1 is no float32
        assert two_terms(2.0**-120, 2.0**-127, ()).item() == 2.0**-120 + 2.0**-127  # subnormals are kept

    def test_a_lone_minus_zero_stays(self) -> None:
        one_way = [torch.tensor([[True, False]]), torch.zeros(0, 2, dtype=torch.bool)]
        out = combine([bf16([[-0.0]]), bf16([[]]).reshape(0, 1)], one_way)[0].x
        assert out.view(torch.int16).item() == -(1 << 15)
        assert two_terms(-0.0, -0.0).signbit().item()
        assert not two_terms(-0.0, 0.0).signbit().item()

    def test_a_token_sent_nowhere_gives_plus_zero_or_its_bias(self) -> None:
        nowhere = [torch.zeros(1, 2, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.bool)]
        empty = bf16([[]]).reshape(0, 1)
        assert combine([empty, empty], nowhere)[0].x.view(torch.int16).item() == 0
        for bias in (-0.0, 3.0):
            out = combine([empty, empty], nowhere, biases=[(bf16([[bias]]),), (empty,)])[0].x
            assert out.view(torch.int16).item() == bf16([[bias]]).view(torch.int16).item()

    def test_weights_start_from_plus_zero(self) -> None:
        weights = [torch.tensor([[-0.0]]), torch.tensor([[-0.0]])]
        out = combine([bf16([[1.0]])] * 2, ALL_TO_TWO, topk_weights=weights)[0].topk_weights
        assert out is not None
        assert out.view(torch.int32).item() == 0

    def test_nan_has_one_pattern(self) -> None:
        for a, b in ((float("nan"), 1.0), (float("inf"), float("-inf"))):
            assert two_terms(a, b).view(torch.int16).item() == 0x7FFF
            weights = [torch.tensor([[a]]), torch.tensor([[b]])]
            out = combine([bf16([[1.0]])] * 2, ALL_TO_TWO, topk_weights=weights)[0].topk_weights
            assert out is not None
            assert out.view(torch.int32).item() == 0x7FFFFFFF

    def test_overflow_gives_infinity(self) -> None:
        largest = 3.3895313892515355e38
        assert two_terms(largest, largest).item() == float("inf")
        assert two_terms(largest, 2.0**119).item() == float("inf")  # half a unit in the last place more

    def test_wide_rows_are_summed_in_their_dtype(self) -> None:
        for dtype, small in ((torch.float32, 2.0**-20), (torch.float64, 2.0**-50)):
            xs = [torch.tensor([[1.0]], dtype=dtype), torch.tensor([[small]], dtype=dtype)]
            out = combine(xs, ALL_TO_TWO)[0].x
            assert out.dtype == dtype
            assert out.item() == 1.0 + small


def test_rounding_of_every_upper_half() -> None:
    # All 2**16 upper halves with lower halves around the tie: the whole rounding rule.
    upper = torch.arange(1 << 16, dtype=torch.int64).unsqueeze(1) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten()
    values = torch.from_numpy(bits.numpy().astype(np.uint32).view(np.float32))
    got = round_to_bf16(values).view(torch.int16).int() & 0xFFFF
    want = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    want = torch.where(values.isnan(), 0x7FFF, want)
    assert torch.equal(got, want.int())


def test_masked_after_dispatch() -> None:
    # Rank 1 died after the dispatch: rank 0 still has a row of it among its rows, and loses nothing else.
    tables = [torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])]
    tables.append(torch.tensor([[True, False, False]]))
    xs = [bf16([[1.0], [2.0], [4.0]]), bf16([[8.0]]), bf16([[16.0]])]
    outputs = combine(xs, tables, masked=[1], masked_at_dispatch=[])
    assert [out.x.flatten().tolist() for out in outputs] == [[1.0], [0.0], [4.0]]
    outputs = combine([xs[0][[0, 2]], xs[1], xs[2]], tables, masked=[1])
    assert [out.x.flatten().tolist() for out in outputs] == [[1.0], [0.0], [4.0]]


def replaced(**changes: object) -> list[DispatchInput]:
    first, second = small_inputs()
    return [DispatchInput(**{**vars(first), **changes}), second]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dispatch(small_inputs(), 2, num_worst_tokens=2), "rank 1: num_worst_tokens: got 2.*3"),
        (lambda: dispatch(small_inputs(), 2, expert_alignment=0), "alignment"),
        (lambda: dispatch(small_inputs(), 3), "num_experts: got 3"),
        (lambda: dispatch(replaced(x=torch.zeros(1, 4)), 2), "rank 0: x"),
        (lambda: dispatch(replaced(x=torch.zeros(2, 5)), 2), "x: must be"),
        (lambda: dispatch(replaced(scales=None), 2), "scales: must be"),
        (lambda: dispatch(replaced(scales=torch.zeros(2)), 2), "rank 0: scales"),
        (lambda: dispatch(replaced(topk_idx=None), 2), "rank 0: topk_idx and topk_weights"),
        (lambda: dispatch(replaced(topk_idx=None, topk_weights=None), 2), "topk_idx: must be"),
        (lambda: dispatch(replaced(topk_weights=torch.zeros(2, 3)), 2), "rank 0: topk_weights"),
        (lambda: dispatch(replaced(num_tokens_per_expert=None), 2), "num_tokens_per_expert: must be"),
        (lambda: dispatch(replaced(num_tokens_per_expert=torch.zeros(3)), 2), "num_tokens_per_expert"),
        (lambda: dispatch(replaced(is_token_in_rank=torch.zeros(2, 3).bool()), 2), "is_token_in_rank"),
        (lambda: combine([bf16([[1.0]])], ALL_TO_TWO), "is_token_in_rank"),
        (lambda: combine([bf16([[1.0]]), bf16([[1.0]])[:0]], ALL_TO_TWO), "rank 1: x"),
        (lambda: combine([bf16([[1.0]]), torch.ones(1, 1)], ALL_TO_TWO), "rank 1: x.*float32"),
        (lambda: combine([torch.ones(1, 1).half()] * 2, ALL_TO_TWO), "x: got torch.float16"),
        (lambda: combine([bf16([[1.0]])] * 2, ALL_TO_TWO, topk_weights=[torch.ones(1, 1)]), "topk_weights"),
        (lambda: two_terms(1.0, 1.0, (1.0, 1.0, 1.0)), "at most 2"),
        (
            lambda: combine([bf16([[1.0]])] * 2, ALL_TO_TWO, biases=[(bf16([[1.0, 2.0]]),), ()]),
            "rank 0: bias",
        ),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
