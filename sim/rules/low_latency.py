"""Properties of low-latency dispatch and combine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import other_rows
from deepep.sim.rules.checking import (
    Floats,
    Property,
    Violation,
    arriving_at_expert,
    bf16,
    check_equal,
    floats,
    need,
    ordered_sum,
    sent,
)
from deepep.sim.rules.observed import Array, RankView, bits

GROUP = 128
E4M3_NAN = 0x7F
E4M3_MAX = np.float32(448.0)
AMAX_FLOOR = np.float32(1e-4)


def low_latency_counts(case: Case, views: list[RankView]) -> None:
    """Each expert gets one row per token that chose it, however often, in (source rank, token) order."""
    for rank in case.dispatch_members:
        experts = range(rank * case.num_local_experts, (rank + 1) * case.num_local_experts)
        pairs = [arriving_at_expert(case, expert) for expert in experts]
        check_equal("recv_count", rank, [len(p) for p in pairs], need(views[rank].recv_count))
        room = case.num_ranks * case.num_max_tokens
        tokens = [[token for _, token in p] + [-1] * (room - len(p)) for p in pairs]
        check_equal("recv_src_info", rank, tokens, need(views[rank].recv_src_info))
        if case.options.stats:
            check_equal("receive statistics", rank, [len(p) for p in pairs], need(views[rank].stats))


def ranges_partition_the_rows(case: Case, views: list[RankView]) -> None:
    """The (begin, count) of the source ranks follow each other without gap or overlap up to the count."""
    for rank in case.dispatch_members:
        ranges, counts = need(views[rank].layout_range), need(views[rank].recv_count)
        for expert in range(case.num_local_experts):
            pairs = arriving_at_expert(case, rank * case.num_local_experts + expert)
            begin = 0
            for source in range(case.num_ranks):
                first, count = divmod(int(ranges[expert, source]), 1 << 32)
                if count != sum(s == source for s, _ in pairs) or (count and first != begin):
                    raise Violation(
                        f"rank {rank}: expert {expert}: source {source}: expected rows from {begin} on, "
                        f"got {count} from {first}",
                        rank,
                        (expert, source),
                    )
                begin += count
            check_equal(f"rows in ranges of expert {expert}", rank, begin, counts[expert])


def rows_reach_their_experts(case: Case, views: list[RankView]) -> None:
    """bf16 rows arrive to the bit."""
    for rank, pairs in _expert_rows(case).items():
        check_equal("rows", rank, _sent_rows(case, pairs), need(views[rank].recv_rows))


def fp8_rows_are_close(case: Case, views: list[RankView]) -> None:
    """Scales follow the formulas; a value is off by at most half a step of e4m3.

    e4m3 has three mantissa bits: half a step is at most 2^-4 of a normal value and 2^-10 (times the scale) of
    a subnormal one. The scaling's own two float32 roundings are 2^-23 of the value, doubled here to be safe.
    """
    for rank, pairs in _expert_rows(case).items():
        rows, stored = need(views[rank].recv_rows), need(views[rank].recv_row_scales)
        x = floats(_sent_rows(case, pairs)).reshape(len(pairs), case.hidden // GROUP, GROUP)
        scale = _scale_values(stored, case)
        if rows.shape != (len(pairs), case.hidden) or scale.shape != x.shape[:2]:
            raise Violation(f"rank {rank}: rows {rows.shape} with scales {scale.shape} for {x.shape}", rank)
        amax = np.maximum(np.where(np.isnan(x), 0, np.abs(x)).max(axis=2), AMAX_FLOOR)
        exact = amax / E4M3_MAX
        if case.options.low_latency == "fp8":
            check_equal("scales", rank, exact, scale)
        else:
            with np.errstate(over="ignore"):
                power_of_two = np.frexp(scale)[0] == 0.5
                tight = (scale >= exact) & (scale < 2 * exact)
            _all_hold(
                "scale is not the next power of two", rank, (power_of_two & tight) | ~np.isfinite(exact)
            )
        room, words = case.num_ranks * case.num_max_tokens, stored.shape[1]
        strides = [
            0 if case.num_local_experts == 1 else room * words,
            int(room > 1),
            0 if words == 1 else room,
        ]
        check_equal("strides of scales (column-major)", rank, strides, need(views[rank].scale_strides))
        value = _e4m3(rows).reshape(x.shape).astype(np.float64)
        with np.errstate(invalid="ignore"):
            slack = np.maximum(np.abs(x).astype(np.float64) * (2**-4 + 2**-22), scale[..., None] * 2.0**-10)
            off = np.abs(value * scale[..., None] - x)
        judged = np.isfinite(amax)[..., None] & np.isfinite(x)
        _all_hold("value is off by more than half a step", rank, (off <= slack) | ~judged)
        nans = rows.reshape(x.shape)[np.isnan(x)]
        check_equal("NaNs", rank, np.full_like(nans, E4M3_NAN), nans)


def combine_weighs_and_sums(case: Case, views: list[RankView]) -> None:
    """Weighted sum over k ascending, each product rounded to float32, one rounding to bf16 at the end.

    Reduced by rank first: one more rounding to bf16 per rank.
    """
    for rank in case.members:
        got = need(views[rank].combined_x)
        for token in range(case.num_tokens[rank]):
            terms = _terms(case, rank, token)
            if case.options.reduce == "rank":
                per_rank = {
                    owner: [t for o, t in terms if o == owner] for owner in sorted({o for o, _ in terms})
                }
                partial = [floats(bf16(ordered_sum(mine, case.hidden))) for mine in per_rank.values()]
                total = ordered_sum(partial, case.hidden)
            else:
                total = ordered_sum([t for _, t in terms], case.hidden)
            check_equal(f"combined token {token}", rank, bf16(total), got[token])


def logfmt_stays_within_its_bound(case: Case, views: list[RankView]) -> None:
    """A row that travels in LogFMT is off by at most half the step between neighbouring codes.

    Codes are a factor 2^(32/510) < 1.0445 apart at most, so a value is off by at most 2.3 % of itself, or,
    below the smallest code, by at most that code: 2^-32 of the largest value of its 128. bf16 rounds once per
    rank at most and once at the end, 2^-8 of the sum of magnitudes each.
    """
    for rank in case.members:
        got = floats(need(views[rank].combined_x))
        for token in range(case.num_tokens[rank]):
            terms = [term for _, term in _terms(case, rank, token)]
            if not terms:
                check_equal(f"combined token {token}", rank, np.zeros(case.hidden, np.float32), got[token])
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                size = np.sum([np.abs(t) for t in terms], axis=0)
                largest = np.repeat(size.reshape(-1, GROUP).max(axis=1), GROUP)
                bound = size * np.float32(0.023 + 3 * 2**-8) + largest * np.float32(2**-31)
                off = np.abs(got[token] - np.sum(terms, axis=0, dtype=np.float32))
            sound = np.isfinite(bound)
            if (off > bound)[sound].any():
                worst = int(np.argmax(np.where(sound, off - bound, -1)))
                worst_seen = f"token {token}: channel {worst}: off by {off[worst]}, allowed {bound[worst]}"
                raise Violation(f"rank {rank}: {worst_seen}", rank, (token, worst))


def _terms(case: Case, rank: int, token: int) -> list[tuple[int, Floats]]:
    """(expert's rank, weight times row) of each living entry of a token, k ascending."""
    weights = sent(case, rank).topk_weights.view(np.float32)
    returned = _returned(case)
    terms = []
    for k, expert in enumerate(case.topk_idx[rank][token].tolist()):
        owner = expert // case.num_local_experts
        if expert >= 0 and owner not in case.masked:
            with np.errstate(all="ignore"):
                terms.append((owner, weights[token, k] * returned[expert, rank, token]))
    return terms


@lru_cache(maxsize=4)
def _returned(case: Case) -> dict[tuple[int, int, int], Floats]:
    """Rows that each global expert returns for each token, by (expert, source rank, token)."""
    returned: dict[tuple[int, int, int], Floats] = {}
    for rank in case.dispatch_members:
        first = rank * case.num_local_experts
        keys = [
            (expert, *pair)
            for expert in range(first, first + case.num_local_experts)
            for pair in arriving_at_expert(case, expert)
        ]
        if case.options.combine_rows == "same":
            rows = [floats(sent(case, source).tokens[token]) for _, source, token in keys]
        else:
            rows = list(floats(bits(other_rows(case, rank, len(keys)))))
        returned.update(zip(keys, rows, strict=True))
    return returned


def _expert_rows(case: Case) -> dict[int, list[tuple[int, int]]]:
    """By rank: (source rank, token) of every row received there, expert after expert."""
    local = case.num_local_experts
    return {
        rank: [pair for i in range(local) for pair in arriving_at_expert(case, rank * local + i)]
        for rank in case.dispatch_members
    }


def _sent_rows(case: Case, pairs: list[tuple[int, int]]) -> Array:
    """[C, H] bf16 bits of these tokens."""
    rows = [sent(case, source).tokens[token] for source, token in pairs]
    return np.stack(rows) if rows else np.empty((0, case.hidden), np.uint16)


def _all_hold(complaint: str, rank: int, holds: Array) -> None:
    if not holds.all():
        place = tuple(int(i) for i in np.argwhere(~holds)[0])
        raise Violation(f"rank {rank}: {complaint}: at {list(place)}", rank, place)


def _scale_values(stored: Array, case: Case) -> Floats:
    """[C, H / 128] scales as numbers: float32 as they are, packed exponents unpacked."""
    if case.options.low_latency != "fp8+ue8m0":
        return stored.view(np.float32)
    exponents = np.ascontiguousarray(stored, dtype="<u4").view(np.uint8).astype(np.uint32)
    return (exponents << 23).view(np.float32)


def _e4m3(codes: Array) -> Floats:
    """e4m3fn bytes as numbers: 4 exponent bits of bias 7, 3 mantissa bits, NaN at 0x7F and 0xFF."""
    exponent, mantissa = (codes >> 3) & 0xF, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    return np.where(codes & 0x80, -value, value).astype(np.float32)


def _ll(case: Case) -> bool:
    return case.options.mode == "ll"


LOW_LATENCY = (
    Property("low-latency counts", _ll, low_latency_counts),
    Property("low-latency ranges partition the rows", _ll, ranges_partition_the_rows),
    Property(
        "rows reach their experts",
        lambda case: _ll(case) and case.options.low_latency == "bf16",
        rows_reach_their_experts,
    ),
    Property(
        "FP8 rows are close",
        lambda case: _ll(case) and case.options.low_latency != "bf16",
        fp8_rows_are_close,
    ),
    Property(
        "low-latency combine weighs and sums",
        lambda case: _ll(case) and not case.options.logfmt,
        combine_weighs_and_sums,
    ),
    Property(
        "LogFMT stays within its bound",
        lambda case: _ll(case) and case.options.logfmt,
        logfmt_stays_within_its_bound,
    ),
)
