"""Ranks that die, stall or are masked: who is named, how soon,
and that the rest carry on with right results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep

pytestmark = pytest.mark.alone

RANKS, VICTIM, EXPERTS, TOPK, TOKENS, MOST = 4, 2, 8, 3, 5, 6
TIMEOUT = 10.0
GRACE = 10.0  # what the library allows itself (1 s + 5 %), and seconds that busy cores add


def topk_of(routing: Any, rank: int) -> torch.Tensor:
    idx = routing(rank, RANKS, EXPERTS, TOPK, TOKENS)
    idx[0] = -1  # a token that goes nowhere
    return idx


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(rank)).bfloat16()


def weights_of(rank: int) -> torch.Tensor:
    return torch.rand(TOKENS, TOPK, generator=torch.Generator().manual_seed(40 + rank))


def train(buffer: Any, routing: Any) -> dict[str, Any]:
    """A dispatch and a combine; what came of them."""
    idx = topk_of(routing, buffer.rank)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    received, indices, weights, counts, handle, _ = buffer.dispatch(
        rows_of(buffer.rank), None, per_rank, None, in_rank, per_expert, idx, weights_of(buffer.rank)
    )
    combined, combined_weights, _ = buffer.combine(received, handle, weights)
    return {
        "received": received,
        "indices": indices,
        "counts": counts,
        "combined": combined,
        "weights": combined_weights,
        "handle": handle,
    }


def decode(buffer: Any, routing: Any) -> dict[str, Any]:
    """A low-latency dispatch and combine, with hooks."""
    idx = topk_of(routing, buffer.rank)
    rows, count, handle, _, hook = buffer.low_latency_dispatch(
        rows_of(buffer.rank), idx, MOST, EXPERTS, use_fp8=False, return_recv_hook=True
    )
    hook()
    combined, _, hook = buffer.low_latency_combine(
        rows, idx, weights_of(buffer.rank), handle, return_recv_hook=True
    )
    hook()
    return {"rows": rows, "count": count, "ranges": handle[1], "combined": combined}


def check_trained(same_bits: Any, routing: Any, got: dict[str, Any], rank: int, masked: set[int]) -> None:
    from deepep.reference import high_throughput as oracle
    from deepep.reference.layout import dispatch_layout

    layouts = [dispatch_layout(topk_of(routing, r), EXPERTS, RANKS) for r in range(RANKS)]
    tables = [layout.is_token_in_rank for layout in layouts]
    outputs = oracle.dispatch(
        [
            oracle.DispatchInput(
                rows_of(r),
                tables[r],
                None,
                topk_of(routing, r),
                weights_of(r),
                layouts[r].num_tokens_per_expert,
            )
            for r in range(RANKS)
        ],
        EXPERTS,
        masked=masked,
    )
    assert same_bits(got["received"], outputs[rank].recv_x)
    assert same_bits(got["indices"], outputs[rank].recv_topk_idx)
    assert got["counts"] == outputs[rank].num_recv_tokens_per_expert
    summed = oracle.combine(
        [o.recv_x for o in outputs],
        tables,
        topk_weights=[o.recv_topk_weights for o in outputs],
        masked=masked,
    )[rank]
    assert same_bits(got["combined"], summed.x)
    assert same_bits(got["weights"], summed.topk_weights)


def check_decoded(same_bits: Any, routing: Any, got: dict[str, Any], rank: int, masked: set[int]) -> None:
    from deepep.reference import low_latency as oracle

    topk = [topk_of(routing, r) for r in range(RANKS)]
    outputs = oracle.dispatch(
        [rows_of(r) for r in range(RANKS)], topk, MOST, EXPERTS, fp8=False, masked=masked
    )
    assert same_bits(got["count"], outputs[rank].recv_count)
    assert same_bits(got["ranges"], outputs[rank].layout_range)
    for expert, n in enumerate(got["count"].tolist()):
        assert same_bits(got["rows"][expert, :n], outputs[rank].recv_x[expert, :n])
    combined = oracle.combine(
        [o.recv_x for o in outputs],
        topk,
        [weights_of(r) for r in range(RANKS)],
        outputs,
        num_max_tokens=MOST,
        num_experts=EXPERTS,
        masked=masked,
    )
    assert same_bits(got["combined"], combined[rank])


def check_both(buffer: Any, same_bits: Any, routing: Any, masked: set[int]) -> None:
    check_trained(same_bits, routing, train(buffer, routing), buffer.rank, masked)
    check_decoded(same_bits, routing, decode(buffer, routing), buffer.rank, masked)


def shrinking_buffer(ctx: Any, timeout: float = TIMEOUT) -> Any:
    import torch.distributed as dist

    import deepep.backends.reference.engine

    dist.barrier(group=ctx.group)
    return deepep.Buffer(ctx.group, low_latency_mode=True, enable_shrink=True, timeout=timeout)


def timed_fault(call: Any) -> tuple[deepep.FaultRecord, float]:
    import time

    begun = time.monotonic()
    try:
        call()
    except deepep.PeerTimeoutError as error:
        return error.record, time.monotonic() - begun
    raise AssertionError("nothing was raised")


# A rank is killed


def killed(ctx: Any, same_bits: Any, routing: Any, operation: str, phase: str) -> Any:
    import os
    import signal

    # With masks the library goes on without it, in low latency: test_shrink.py.
    masks = not operation.startswith("low_latency")
    buffer = shrinking_buffer(ctx) if masks else deepep.Buffer(ctx.group, 0, 0, True, timeout=TIMEOUT)
    check_both(buffer, same_bits, routing, set())
    old = train(buffer, routing)

    def die(now: str, where: str) -> None:
        if (now, where) == (operation, phase):
            os.kill(os.getpid(), signal.SIGKILL)

    if ctx.rank == VICTIM:
        buffer.runtime.observe(die)

    def work() -> None:
        # Twice: a rank that dies in its last phase has sent what the others need of this round.
        for _ in range(2):
            train(buffer, routing)
            decode(buffer, routing)

    record, seconds = timed_fault(work)
    # Until the rank is masked nothing works, and nothing waits.
    again, at_once = timed_fault(work)
    assert again.waited_on == record.waited_on
    assert at_once < TIMEOUT / 2
    if not masks:
        return record, seconds
    buffer.low_latency_update_mask_buffer(VICTIM, True)
    status = torch.full((RANKS,), -1, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r == VICTIM) for r in range(RANKS)]
    check_both(buffer, same_bits, routing, {VICTIM})
    check_old_handle(buffer, same_bits, routing, old)
    check_both(buffer, same_bits, routing, {VICTIM})
    buffer.destroy()
    return record, seconds


def check_old_handle(buffer: Any, same_bits: Any, routing: Any, old: dict[str, Any]) -> None:
    """A handle from before: its rows can still be summed, without the masked rank's; not dispatched again."""
    from deepep.reference import high_throughput as oracle
    from deepep.reference.layout import dispatch_layout

    tables = [dispatch_layout(topk_of(routing, r), EXPERTS, RANKS).is_token_in_rank for r in range(RANKS)]
    outputs = oracle.dispatch([oracle.DispatchInput(rows_of(r), tables[r]) for r in range(RANKS)], EXPERTS)
    wanted = oracle.combine([o.recv_x for o in outputs], tables, masked={VICTIM}, masked_at_dispatch=())[
        buffer.rank
    ]
    assert same_bits(buffer.combine(old["received"], old["handle"])[0], wanted.x)
    with pytest.raises(deepep.HandleError, match=f"rank {VICTIM}, masked since"):
        buffer.dispatch(rows_of(buffer.rank), handle=old["handle"])


PHASES = [
    ("dispatch", "control"),
    ("dispatch", "counts"),
    ("dispatch", "payload"),
    ("combine", "control"),
    ("combine", "payload"),
    ("low_latency_dispatch", "control"),
    ("low_latency_dispatch", "send"),
    ("low_latency_dispatch", "receive"),
    ("low_latency_combine", "control"),
    ("low_latency_combine", "send"),
    ("low_latency_combine", "receive"),
]


@pytest.mark.parametrize(("operation", "phase"), PHASES)
def test_a_rank_killed_between_phases(
    world_of: Any, same_bits: Any, routing: Any, operation: str, phase: str
) -> None:
    outcomes = world_of(RANKS).try_run(killed, same_bits, routing, operation, phase)
    assert outcomes[VICTIM].status.name == "DIED"
    for rank, outcome in enumerate(outcomes):
        if rank == VICTIM:
            continue
        assert outcome.ok, outcome
        record, seconds = outcome.value
        assert record.waited_on == (VICTIM,)
        assert (record.rank, record.expected, record.seen) == (rank, RANKS, RANKS - 1)
        # On one host the death is known at once; the deadline is not needed.
        assert seconds < TIMEOUT
        if phase == "control":
            assert (record.operation, record.phase) == (operation, "control")


@pytest.mark.slow
def test_twenty_deaths_in_a_row(world_of: Any, same_bits: Any, routing: Any) -> None:
    for round_number in range(20):
        operation, phase = PHASES[round_number % len(PHASES)]
        outcomes = world_of(RANKS).try_run(killed, same_bits, routing, operation, phase)
        survivors = [o for o in outcomes if o.rank != VICTIM]
        assert all(o.ok and o.value[0].waited_on == (VICTIM,) for o in survivors), outcomes


# A rank does not come


def absent(ctx: Any, same_bits: Any, routing: Any, timeout: float, rounds: int) -> Any:
    import torch.distributed as dist

    buffer = shrinking_buffer(ctx, timeout)
    results = []
    for _ in range(rounds):
        if ctx.rank == VICTIM:
            dist.barrier(group=ctx.group)  # passes once the others have given up, masked and gone on
        results.append(timed_fault(lambda: train(buffer, routing)))
        if ctx.rank != VICTIM:
            buffer.low_latency_update_mask_buffer(VICTIM, True)
            check_both(buffer, same_bits, routing, {VICTIM})
            dist.barrier(group=ctx.group)
        dist.barrier(group=ctx.group)
        # All are back: take the rank in again. It forgets its own fault the same way.
        buffer.low_latency_clean_mask_buffer()
        check_both(buffer, same_bits, routing, set())
    buffer.destroy()
    return results


def test_a_rank_that_does_not_come_and_comes_back(world_of: Any, same_bits: Any, routing: Any) -> None:
    timeout, rounds = 1.5, 3
    for rank, results in enumerate(world_of(RANKS).run(absent, same_bits, routing, timeout, rounds)):
        assert len(results) == rounds
        for record, seconds in results:
            assert record.waited_on == (VICTIM,)
            assert (record.operation, record.phase, record.rank) == ("dispatch", "control", rank)
            if rank != VICTIM:
                assert timeout <= seconds < timeout + GRACE


def stalled(ctx: Any, same_bits: Any, routing: Any, timeout: float) -> Any:
    """Rank 2 enters the operation and stops in the middle of it, alive."""
    import threading

    import torch.distributed as dist

    buffer = shrinking_buffer(ctx, timeout)
    train(buffer, routing)
    over = threading.Event()

    def stop(operation: str, phase: str) -> None:
        if phase == "payload":
            over.wait()

    if ctx.rank == VICTIM:
        buffer.runtime.observe(stop)
        waiter = threading.Thread(target=lambda: (dist.barrier(group=ctx.group), over.set()))
        waiter.start()
        found = timed_fault(lambda: train(buffer, routing))
        waiter.join()
        buffer.runtime.observe(None)
    else:
        found = timed_fault(lambda: train(buffer, routing))
        buffer.low_latency_update_mask_buffer(VICTIM, True)
        check_both(buffer, same_bits, routing, {VICTIM})
        dist.barrier(group=ctx.group)
    buffer.low_latency_clean_mask_buffer()
    check_both(buffer, same_bits, routing, set())
    buffer.destroy()
    return found


def test_a_rank_that_stops_in_the_middle(world_of: Any, same_bits: Any, routing: Any) -> None:
    timeout = 1.5
    for rank, (record, seconds) in enumerate(world_of(RANKS).run(stalled, same_bits, routing, timeout)):
        assert record.waited_on == (VICTIM,)
        assert (record.operation, record.phase) == ("dispatch", "payload")
        if rank != VICTIM:
            assert seconds < timeout + GRACE


def never_constructed(ctx: Any) -> Any:
    import torch.distributed as dist

    found = None
    if ctx.rank != VICTIM:
        found = timed_fault(lambda: deepep.Buffer(ctx.group, timeout=1.5))[0]
    dist.barrier(group=ctx.group)
    return found


def test_a_rank_that_does_not_construct(fresh_world: Any) -> None:
    for rank, record in enumerate(fresh_world(RANKS).run(never_constructed)):
        if rank != VICTIM:
            assert (record.operation, record.waited_on) == ("construct", (VICTIM,))


def asynchronous(ctx: Any, routing: Any) -> Any:
    """The fault of work under way is raised by the wait, and by all that was queued behind it."""
    import torch.distributed as dist

    buffer = shrinking_buffer(ctx, 4.0)
    old = train(buffer, routing)
    if ctx.rank != VICTIM:
        first = buffer.combine(old["received"], old["handle"], async_finish=True)[2]
        second = buffer.dispatch(rows_of(ctx.rank), old["handle"], async_finish=True)[5]
        records = [timed_fault(event.current_stream_wait)[0] for event in (first, second)]
        assert records[0] == records[1]
        assert records[0].waited_on == (VICTIM,)
        assert records[0].operation == "combine"
    dist.barrier(group=ctx.group)


def test_a_fault_in_work_under_way(fresh_world: Any, routing: Any) -> None:
    fresh_world(RANKS).run(asynchronous, routing)


def between_send_and_hook(ctx: Any, same_bits: Any, routing: Any) -> Any:
    """An exception on one rank between send and hook: it leaves; the others are not left waiting."""
    buffer = deepep.Buffer(ctx.group, low_latency_mode=True, timeout=1.5)
    idx = topk_of(routing, ctx.rank)
    *_, hook = buffer.low_latency_dispatch(rows_of(ctx.rank), idx, MOST, EXPERTS, return_recv_hook=True)
    if ctx.rank == VICTIM:
        raise KeyError("the user's own mistake")

    def go_on() -> None:
        hook()  # may fail already: a connection that closes with rows unread takes along those under way
        decode(buffer, routing)

    return timed_fault(go_on)[0]


def test_an_exception_between_send_and_hook(fresh_world: Any, same_bits: Any, routing: Any) -> None:
    outcomes = fresh_world(RANKS).try_run(between_send_and_hook, same_bits, routing)
    assert isinstance(outcomes[VICTIM].error, KeyError)
    for rank, outcome in enumerate(outcomes):
        if rank != VICTIM:
            assert outcome.ok, outcome
            assert outcome.value.waited_on == (VICTIM,)


# Masks without faults


def masked(ctx: Any, same_bits: Any, routing: Any) -> None:
    import torch.distributed as dist

    buffer = shrinking_buffer(ctx)
    check_both(buffer, same_bits, routing, set())
    for left_out in ({1}, {1, 3}, {0}, {0, 1, 2}):
        for rank in left_out:
            if ctx.rank not in left_out:
                buffer.low_latency_update_mask_buffer(rank, True)
        if ctx.rank not in left_out:
            check_both(buffer, same_bits, routing, left_out)
        dist.barrier(group=ctx.group)
        if ctx.rank not in left_out:  # those who were masked need not know
            buffer.low_latency_clean_mask_buffer()
        check_both(buffer, same_bits, routing, set())
    status = torch.full((RANKS,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * RANKS
    with pytest.raises(deepep.RangeError, match="itself"):
        buffer.low_latency_update_mask_buffer(ctx.rank, True)
    with pytest.raises(deepep.RangeError, match="rank_to_mask"):
        buffer.low_latency_update_mask_buffer(RANKS, True)
    with pytest.raises(deepep.ArgumentTypeError, match="mask_status"):
        buffer.low_latency_query_mask_buffer(torch.zeros(RANKS, dtype=torch.int64))
    buffer.destroy()


def test_masked_ranks_are_left_out_and_taken_in_again(world_of: Any, same_bits: Any, routing: Any) -> None:
    world_of(RANKS).run(masked, same_bits, routing)


def masks_that_differ(ctx: Any, routing: Any) -> Any:
    buffer = shrinking_buffer(ctx, 4.0)
    train(buffer, routing)
    if ctx.rank in (2, 3):
        return None
    buffer.low_latency_update_mask_buffer(2 + ctx.rank, True)
    buffer.low_latency_update_mask_buffer(3, True)
    try:
        train(buffer, routing)
    except deepep.MismatchError as error:
        return error.argument, error.rank
    return None


def test_masks_must_agree(fresh_world: Any, routing: Any) -> None:
    results = fresh_world(RANKS).run(masks_that_differ, routing)
    # Rank 0 masks 2 and 3, rank 1 masks 3 alone, and waits for 2 as well.
    assert results[0] == ("unmasked ranks", 1)
    assert results[1] == ("unmasked ranks", 0)
