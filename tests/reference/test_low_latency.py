"""The low-latency oracle against plain Python: rows looked up one by one, sums made of single floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference.formats import fp8_cast, ue8m0_pack
from deepep.reference.logfmt import logfmt_roundtrip
from deepep.reference.low_latency import LowLatencyOutput, combine, dispatch

Draw = Callable[[int, int, str], tuple[int, list[Tensor]]]
SameBits = Callable[[Tensor, Tensor], bool]
Floats = list[np.float32]


def random_rows(shape: tuple[int, ...], seed: int) -> Tensor:
    """bfloat16 with magnitudes far apart, so that the order of a sum shows."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)


MODES = [
    {"fp8": False},
    {"fp8": True},
    {"fp8": True, "round_scale": True},
    {"fp8": True, "round_scale": True, "ue8m0": True},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "+".join(k for k, v in mode.items() if v) or "bf16")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_dispatch_row_by_row(
    num_ranks: int, mode: dict[str, bool], draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits
) -> None:
    hidden = 512
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, num_ranks, pattern)
        num_local = num_experts // num_ranks
        room = 9 + seed % 2
        xs = [random_rows((idx.shape[0], hidden), seed + rank) for rank, idx in enumerate(topk)]
        masked = {seed % num_ranks} if seed % 3 == 2 and num_ranks > 1 else set()
        outputs = dispatch(xs, topk, room, num_experts, masked=masked, **mode)
        for rank, out in enumerate(outputs):
            assert out.recv_x.shape == (num_local, num_ranks * room, hidden)
            for local in range(num_local):
                row = 0
                for source, idx in enumerate(topk):
                    begin = row
                    for token, chosen in enumerate(idx.tolist()):
                        skip = source in masked or rank in masked
                        if skip or rank * num_local + local not in chosen:
                            continue
                        assert int(out.recv_src_info[local, row]) == token
                        if mode["fp8"]:
                            values, scale = fp8_cast(xs[source][token], mode.get("round_scale", False))
                            scale = ue8m0_pack(scale) if mode.get("ue8m0") else scale
                            assert out.recv_scales is not None
                            assert same_bits(out.recv_scales[local, row], scale)
                        else:
                            values = xs[source][token]
                        assert same_bits(out.recv_x[local, row], values)
                        row += 1
                    assert int(out.layout_range[local, source]) == begin * 2**32 + row - begin
                assert int(out.recv_count[local]) == row
                assert (out.recv_src_info[local, row:] == -1).all()
            if out.recv_scales is None:
                assert not mode["fp8"]
            else:
                groups = hidden // 512 if mode.get("ue8m0") else hidden // 128
                assert out.recv_scales.stride() == (groups * num_ranks * room, 1, num_ranks * room)
            assert out.recv_count.dtype == out.recv_src_info.dtype == torch.int32
            assert out.layout_range.dtype == torch.int64


def round_bf16(value: np.float32) -> np.float32:
    """To nearest even, in integers."""
    bits = int(value.view(np.uint32))
    return np.array((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16, dtype=np.uint32).view(np.float32)[()]


def ordered_sum(terms: list[Floats], hidden: int) -> Floats:
    total = terms[0] if terms else [np.float32(0.0)] * hidden
    for term in terms[1:]:
        total = [a + b for a, b in zip(total, term, strict=True)]
    return [round_bf16(value) for value in total]


def sent(row: list[np.float32], logfmt: bool) -> Floats:
    if not logfmt:
        return row
    return list(logfmt_roundtrip(torch.tensor(np.array(row)).to(torch.bfloat16)).numpy())


def combine_by_hand(
    topk: Tensor,
    weights: Tensor,
    row_of: Callable[[int, int], Floats | None],
    num_local: int,
    hidden: int,
    logfmt: bool,
    reduce: str,
) -> list[Floats]:
    """One owner's sums. `row_of(expert, token)`: the expert's row, or None for a masked rank."""
    out = []
    for token, chosen in enumerate(topk.tolist()):
        products: list[tuple[int, Floats]] = []  # (rank, weighted row), k ascending
        for k, expert in enumerate(chosen):
            row = row_of(expert, token) if expert >= 0 else None
            if row is not None:
                row = sent(row, logfmt and reduce == "token")
                products.append((expert // num_local, [weights[token, k].numpy() * value for value in row]))
        if reduce == "token":
            out.append(ordered_sum([row for _, row in products], hidden))
        else:
            partials = {
                rank: sent(ordered_sum([row for r, row in products if r == rank], hidden), logfmt)
                for rank in sorted({rank for rank, _ in products})
            }
            if reduce == "domain":  # of two ranks
                partials = {
                    domain: ordered_sum([row for r, row in partials.items() if r // 2 == domain], hidden)
                    for domain in sorted({rank // 2 for rank in partials})
                }
            out.append(ordered_sum(list(partials.values()), hidden))
    return out


@pytest.mark.parametrize(
    ("reduce", "logfmt"),
    [("token", False), ("rank", False), ("token", True), ("rank", True), ("domain", False)],
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_combine_float_by_float(
    num_ranks: int, logfmt: bool, reduce: str, draw_routing: Draw, patterns: tuple[str, ...]
) -> None:
    hidden, room = 128, 9
    for seed, pattern in enumerate(patterns):
        num_experts, topk = draw_routing(seed, num_ranks, pattern)
        topk = [idx[:3] for idx in topk]  # floats one by one are slow
        num_local = num_experts // num_ranks
        xs = [random_rows((idx.shape[0], hidden), seed) for idx in topk]
        layouts = dispatch(xs, topk, room, num_experts, fp8=False)
        experts = [random_rows((num_local, num_ranks * room, hidden), seed + r) for r in range(num_ranks)]
        experts = [
            (rows.float() / 2.0**14).to(torch.bfloat16) for rows in experts
        ]  # below 1, mostly: encoded
        weights = [
            torch.from_numpy(np.random.default_rng(seed).random(i.shape, dtype=np.float32)) for i in topk
        ]
        masked = {seed % num_ranks} if seed % 3 == 2 and num_ranks > 1 else set()
        outputs = combine(
            experts,
            topk,
            weights,
            layouts,
            num_max_tokens=room,
            num_experts=num_experts,
            logfmt=logfmt,
            reduce=reduce,  # type: ignore[arg-type]
            ranks_per_domain=2,
            masked=masked,
        )
        for owner, idx in enumerate(topk):

            def row_of(expert: int, token: int, owner: int = owner) -> Floats | None:
                rank, local = divmod(expert, num_local)  # noqa: B023 - called in this round alone
                if {owner, rank} & masked:  # noqa: B023
                    return None
                begin, count = divmod(int(layouts[rank].layout_range[local, owner]), 2**32)  # noqa: B023
                tokens = layouts[rank].recv_src_info[local, begin : begin + count].tolist()  # noqa: B023
                return list(experts[rank][local, begin + tokens.index(token)].float().numpy())  # noqa: B023

            want = combine_by_hand(idx, weights[owner], row_of, num_local, hidden, logfmt, reduce)
            got = outputs[owner]
            assert got.dtype == torch.bfloat16
            assert got.float().tolist() == [[float(v) for v in row] for row in want]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 4), scale=st.integers(-6, 2))
def test_logfmt_encodes_the_rounded_partial_sums(
    seed: int, num_ranks: int, scale: int, draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits
) -> None:
    """A row that a rank returns is encoded as it would travel without LogFMT: in bfloat16.

    A rank's partial sum is what all comes to if the token's other entries are -1.
    """
    hidden, room = 512, 9
    num_experts, topk = draw_routing(seed % 997, num_ranks, patterns[seed % len(patterns)])
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.zeros(idx.shape[0], hidden, dtype=torch.bfloat16) for idx in topk]
    layouts = dispatch(xs, topk, room, num_experts, fp8=False)
    shape = (num_experts // num_ranks, num_ranks * room, hidden)
    experts = [
        (torch.randn(shape, generator=generator) * 2.0**scale).to(torch.bfloat16) for _ in range(num_ranks)
    ]
    weights = [torch.rand(idx.shape, generator=generator) for idx in topk]

    def combined(indices: list[Tensor], logfmt: bool) -> list[Tensor]:
        sizes = {"num_max_tokens": room, "num_experts": num_experts}
        return combine(experts, indices, weights, layouts, **sizes, logfmt=logfmt)

    totals: list[Tensor | None] = [None] * num_ranks
    started = [torch.zeros(idx.shape[0], 1, dtype=torch.bool) for idx in topk]
    for rank in range(num_ranks):
        of_rank = [idx // (num_experts // num_ranks) == rank for idx in topk]
        mine = [torch.where(here, idx, -1) for here, idx in zip(of_rank, topk, strict=True)]
        for owner, partial in enumerate(combined(mine, logfmt=False)):
            sent, total = logfmt_roundtrip(partial), totals[owner]
            here = of_rank[owner].any(1, keepdim=True)
            if total is None:
                total = torch.zeros_like(sent)
            added = torch.where(started[owner], total + sent, sent)
            totals[owner] = torch.where(here, added, total)
            started[owner] |= here
    for owner, got in enumerate(combined(topk, logfmt=True)):
        total = totals[owner]
        assert total is not None
        assert same_bits(got, total.to(torch.bfloat16))


class TestNumbers:
    """Single sums whose rounding can be followed by hand: one token, its experts on one or two ranks."""

    def sum_of(
        self,
        rows: list[float],
        weights: list[float],
        reduce: str = "token",
        num_ranks: int = 1,
        hidden: int = 1,
    ) -> Tensor:
        """Expert k has rows[k]; experts are spread over the ranks in blocks."""
        num_experts = len(rows)
        topk = [torch.arange(num_experts).unsqueeze(0)]
        topk += [torch.zeros(0, num_experts, dtype=torch.int64)] * (num_ranks - 1)
        empty = torch.zeros(0, hidden, dtype=torch.bfloat16)
        xs = [torch.zeros(1, hidden, dtype=torch.bfloat16), *[empty] * (num_ranks - 1)]
        layouts = dispatch(xs, topk, 1, num_experts, fp8=False)
        values = torch.tensor(rows).to(torch.bfloat16).view(num_ranks, num_experts // num_ranks, 1, 1)
        experts = [v.expand(-1, num_ranks, hidden).contiguous() for v in values]
        scale = [torch.tensor([weights]), *[torch.zeros(0, num_experts)] * (num_ranks - 1)]
        out = combine(experts, topk, scale, layouts, num_max_tokens=1, num_experts=num_experts, reduce=reduce)  # type: ignore[arg-type]
        return out[0]

    def test_products_are_rounded_before_they_are_added(self) -> None:
        # The float32 next to 1/3 times 3 is 1 + 2**-25 before rounding and 1 after it. A fused multiply-add
        # would leave the 2**-25 behind.
        third = float(np.float32(1 / 3))
        assert third * 3.0 == 1.0 + 2.0**-25
        assert self.sum_of([-1.0, 3.0], [1.0, third]).item() == 0.0

    def test_k_ascending(self) -> None:
        huge = 2.0**40
        assert self.sum_of([huge, -huge, 1.0], [1.0] * 3).item() == 1.0
        assert self.sum_of([huge, 1.0, -huge], [1.0] * 3).item() == 0.0

    def test_the_two_modes_round_differently(self) -> None:
        # 256 + 1 is a tie of bfloat16 on rank 0; the 1 of rank 1 comes before that rounding or after it.
        rows = [256.0, 1.0, 1.0, 0.0]
        assert self.sum_of(rows, [1.0] * 4, num_ranks=2).item() == 258.0
        assert (
            self.sum_of(rows, [1.0] * 4, "rank", num_ranks=2).item() == 256.0
        )  # 256, and 256 + 1 again a tie
        assert self.sum_of([258.0, 1.0, 1.0, 0.0], [1.0] * 4, "rank", num_ranks=2).item() == 260.0

    def test_ranks_sum_first_unless_told_otherwise(self) -> None:
        x, topk = (
            torch.ones(1, 4, dtype=torch.bfloat16),
            [torch.tensor([[0, 2, 3]]), torch.zeros(0, 3).long()],
        )
        layouts = dispatch([x, x[:0]], topk, 1, 4, fp8=False)
        rows = [torch.full((2, 2, 4), value).to(torch.bfloat16) for value in (1.0, 1.0)]
        rows[1][0] = 256.0
        given = (rows, topk, [torch.ones(1, 3), torch.ones(0, 3)], layouts)
        assert (combine(*given, num_max_tokens=1, num_experts=4)[0] == 256.0).all()
        assert (combine(*given, num_max_tokens=1, num_experts=4, reduce="token")[0] == 258.0).all()

    @pytest.mark.parametrize("reduce", ["token", "rank"])
    def test_a_lone_minus_zero_stays(self, reduce: str) -> None:
        assert self.sum_of([-0.0], [1.0], reduce).view(torch.int16).item() == -(1 << 15)
        assert self.sum_of([0.0], [-1.0], reduce).view(torch.int16).item() == -(1 << 15)
        assert self.sum_of([-0.0, 0.0], [1.0, 1.0], reduce).view(torch.int16).item() == 0

    @pytest.mark.parametrize("reduce", ["token", "rank"])
    def test_nan_has_one_pattern(self, reduce: str) -> None:
        for rows in ([float("nan"), 1.0], [float("inf"), -float("inf")]):
            assert self.sum_of(rows, [1.0, 1.0], reduce).view(torch.int16).item() == 0x7FFF
        assert self.sum_of([float("inf"), 1.0], [0.0, 1.0], reduce).view(torch.int16).item() == 0x7FFF

    def test_duplicates_share_a_row_and_add_their_weights(self) -> None:
        topk = [torch.tensor([[0, 0, -1]])]
        x = torch.ones(1, 4, dtype=torch.bfloat16)
        layouts = dispatch([x], topk, 2, 1, fp8=False)
        assert layouts[0].recv_count.tolist() == [1]
        rows = torch.full((1, 2, 4), 3.0).to(torch.bfloat16)
        weights = [torch.tensor([[0.5, 0.25, 100.0]])]
        out = combine([rows], topk, weights, layouts, num_max_tokens=2, num_experts=1)
        assert (out[0] == 2.25).all()

    def test_rows_past_the_count_are_not_read(self) -> None:
        topk = [torch.tensor([[0]])]
        layouts = dispatch([torch.ones(1, 4, dtype=torch.bfloat16)], topk, 3, 1, fp8=False)
        rows = torch.full((1, 3, 4), float("nan")).to(torch.bfloat16)
        rows[0, 0] = 1.0
        out = combine([rows], topk, [torch.ones(1, 1)], layouts, num_max_tokens=3, num_experts=1)
        assert (out[0] == 1.0).all()

    def test_no_renormalising_over_masked_ranks(self) -> None:
        topk = [torch.tensor([[0, 1]]), torch.zeros(0, 2, dtype=torch.int64)]
        xs = [torch.ones(n, 4, dtype=torch.bfloat16) for n in (1, 0)]
        layouts = dispatch(xs, topk, 1, 2, fp8=False)
        rows = [torch.ones(1, 2, 4, dtype=torch.bfloat16)] * 2
        weights = [torch.full((1, 2), 0.5), torch.zeros(0, 2)]
        out = combine(rows, topk, weights, layouts, num_max_tokens=1, num_experts=2, masked=[1])
        assert (out[0] == 0.5).all()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def layout() -> list[LowLatencyOutput]:
    return dispatch([ones(2, 128)], [torch.zeros(2, 1, dtype=torch.int64)], 3, 2, fp8=False)


def call_combine(**changes: object) -> object:
    given: dict[str, object] = {
        "xs": [ones(2, 3, 128)],
        "topk_idx": [torch.zeros(2, 1, dtype=torch.int64)],
        "topk_weights": [torch.ones(2, 1)],
        "layouts": layout(),
        "num_max_tokens": 3,
        "num_experts": 2,
    }
    return combine(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dispatch([ones(2, 128)], [torch.zeros(2, 1).int()], 1, 1), "at most 1 tokens"),
        (lambda: dispatch([ones(2, 128)], [torch.zeros(3, 1).int()], 3, 1), "rank 0: x"),
        (lambda: dispatch([ones(2, 128).float()], [torch.zeros(2, 1).int()], 3, 1), "x: got torch.float32"),
        (lambda: dispatch([ones(2, 64)], [torch.zeros(2, 1).int()], 3, 1), "multiple of 128"),
        (lambda: dispatch([ones(2, 128)], [torch.zeros(2, 1).int()], 3, 1, ue8m0=True), "round_scale"),
        (lambda: dispatch([ones(2, 128)], [torch.ones(2, 1).int()], 3, 1), "topk_idx"),
        (lambda: dispatch([ones(2, 128)], [], 3, 1), "topk_idx: got 0"),
        (lambda: dispatch([ones(2, 128)] * 2, [torch.zeros(2, 1).int()] * 2, 3, 3), "num_experts: got 3"),
        (lambda: call_combine(xs=[ones(2, 3, 128).float()]), "rank 0: x"),
        (lambda: call_combine(xs=[ones(2, 4, 128)]), "rank 0: x"),
        (lambda: call_combine(topk_weights=[torch.ones(2, 2)]), "rank 0: topk_weights"),
        (lambda: call_combine(topk_weights=[torch.ones(2, 1).double()]), "rank 0: topk_weights"),
        (lambda: call_combine(topk_idx=[torch.ones(2, 1).long()]), "rank 0: topk_idx.*expert 1"),
        (lambda: call_combine(reduce="node"), "reduce"),
        (lambda: call_combine(reduce="domain"), "ranks_per_domain: got 0"),
        (lambda: call_combine(reduce="domain", ranks_per_domain=1, logfmt=True), "logfmt: got True"),
        (lambda: call_combine(layouts=[]), "layouts: got 0"),
        (lambda: call_combine(topk_weights=[]), "topk_weights: got 0"),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
