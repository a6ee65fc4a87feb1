"""async_finish, previous_event and receive hooks on CPU: work that really goes on beside the caller.

Delays are injected by events that the test completes itself, so nothing here depends on timing.
"""

from __future__ import annotations

from typing import Any

import torch

import deepep

RANKS, EXPERTS, MOST = 3, 6, 4


def pending() -> Any:
    """(set, event): an event that passes when `set` is called."""
    from concurrent.futures import Future

    from deepep.runtime.completion import HostCompletion

    future: Future[None] = Future()
    event = deepep.EventOverlap(deepep.EventHandle(HostCompletion(future)))
    return lambda: future.set_result(None), event


def running(event: Any) -> bool:
    return not event.event.completion.future.done()


def arguments_of(buffer: Any, routing: Any, rank: int) -> dict[str, Any]:
    idx = routing(rank, RANKS, EXPERTS, 2, MOST)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    return {
        "x": torch.randn(MOST, 16, generator=torch.Generator().manual_seed(rank)).bfloat16(),
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": idx,
        "topk_weights": torch.ones(MOST, 2),
    }


def inputs_after_the_event(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    """Every operation, issued while its inputs are garbage, and given them before the event passes."""
    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    received, indices, weights, _, handle, _ = buffer.dispatch(**good)
    combined, combined_weights, _ = buffer.combine(received, handle, topk_weights=weights)

    garbage = {name: torch.full_like(value, 1) for name, value in good.items()}
    release, event = pending()
    layout = buffer.get_dispatch_layout(garbage["topk_idx"], EXPERTS, previous_event=event, async_finish=True)
    worst = buffer.dispatch(**garbage, num_worst_tokens=RANKS * MOST, previous_event=event, async_finish=True)
    cached = buffer.dispatch(
        garbage["x"], handle, previous_event=event, async_finish=True, allocate_on_comm_stream=True
    )
    rows, row_weights = torch.ones_like(received), torch.ones_like(weights)
    summed = buffer.combine(rows, handle, row_weights, previous_event=event, async_finish=True)
    assert all(running(result[-1]) for result in (layout, worst, cached, summed))
    for name, value in good.items():
        garbage[name].copy_(value)
    rows.copy_(received)
    row_weights.copy_(weights)
    release()
    summed[2].current_stream_wait()  # the queue is in order: the last is done, so all are
    assert not any(running(result[-1]) for result in (layout, worst, cached, summed))
    n = received.shape[0]
    assert same_bits(layout[0], good["num_tokens_per_rank"])
    assert same_bits(layout[2], good["num_tokens_per_expert"])
    assert same_bits(layout[3], good["is_token_in_rank"])
    assert same_bits(worst[0][:n], received)
    assert same_bits(worst[1][:n], indices)
    assert bool((worst[1][n:] == -1).all())
    assert same_bits(cached[0], received)
    assert same_bits(summed[0], combined)
    assert same_bits(summed[1], combined_weights)
    # The handle of a dispatch that did not wait serves like any other.
    again, _, _ = buffer.combine(worst[0], worst[4])
    assert same_bits(again, combined)


def test_inputs_are_read_after_the_previous_event(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(RANKS).run(inputs_after_the_event, buffer_of, same_bits, routing)


def counts_are_waited_for(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    """A dispatch that must know N returns once the counts are there; its payload may still be under way."""
    import threading

    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    expected = buffer.dispatch(**good)
    release, event = pending()
    entered = threading.Event()
    buffer.runtime.observe(lambda operation, phase: entered.set())
    try:
        # Whoever is at "control" has passed the event: nothing may be entered before it is released.
        helper = threading.Thread(target=lambda: release() if not entered.is_set() else None)
        layout_event = buffer.get_dispatch_layout(good["topk_idx"], EXPERTS, event, True)[4]
        assert running(layout_event)
        helper.start()
        got = buffer.dispatch(**good, previous_event=layout_event, async_finish=True)
        helper.join()
    finally:
        buffer.runtime.observe(None)
    got[5].current_stream_wait()
    assert got[3] == expected[3]
    assert same_bits(got[0], expected[0])


def test_a_dispatch_of_unknown_size_waits_for_its_counts(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(RANKS).run(counts_are_waited_for, buffer_of, same_bits, routing)


def users_own_collectives(ctx: Any, buffer_of: Any, routing: Any) -> None:
    """While a rank's operation is held back, the user's collectives on the same group go through."""
    import torch.distributed as dist

    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    handle = buffer.dispatch(**good)[4]
    release, event = pending()
    held = buffer.dispatch(
        good["x"], handle, previous_event=event if ctx.rank == 0 else None, async_finish=True
    )
    for i in range(3):
        total = torch.full((2,), float(ctx.rank + i))
        dist.all_reduce(total, group=ctx.group)
        assert total.tolist() == [float(sum(range(RANKS)) + RANKS * i)] * 2
    # Without rank 0 nobody's control exchange can have ended.
    assert running(held[5])
    dist.barrier(group=ctx.group)
    release()
    held[5].current_stream_wait()


def test_the_users_collectives_never_meet_ours(world_of: Any, buffer_of: Any, routing: Any) -> None:
    world_of(RANKS).run(users_own_collectives, buffer_of, routing)


def inputs_may_be_dropped(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    import gc

    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    expected, *_, handle, _ = buffer.dispatch(**good)
    release, event = pending()
    x = good.pop("x")
    got, *_, done = buffer.dispatch(x, handle, previous_event=event, async_finish=True)
    del x
    gc.collect()
    filler = [torch.full((MOST, 16), -1.0).bfloat16() for _ in range(64)]
    release()
    with done:
        del filler
    assert same_bits(got, expected)


def test_inputs_live_as_long_as_the_work(world_of: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    world_of(RANKS).run(inputs_may_be_dropped, buffer_of, same_bits, routing)


def asynchronous_refusals(ctx: Any, buffer_of: Any, routing: Any) -> Any:
    """The offender raises at the call, the others when they wait;
    then a failed event spoils what depends on it.
    """
    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    received, *_, handle, _ = buffer.dispatch(**good)
    seen = []
    if ctx.rank == 1:
        try:
            buffer.combine(received[1:], handle, async_finish=True)
        except deepep.ShapeError as error:
            seen.append(("call", str(error)))
    else:
        event = buffer.combine(received, handle, async_finish=True)[2]
        try:
            event.current_stream_wait()
        except deepep.ShapeError as error:
            seen.append(("wait", str(error)))
    # num_worst_tokens too small on rank 2: found out in the queue by all.
    room = 1 if ctx.rank == 2 else RANKS * MOST
    *_, lost, event = buffer.dispatch(**good, num_worst_tokens=room, async_finish=True)
    try:
        event.current_stream_wait()
    except deepep.CapacityError as error:
        seen.append(("wait", str(error)))
    for call in (
        lambda: buffer.combine(torch.zeros(room, 16).bfloat16(), lost),
        lambda: buffer.dispatch(good["x"], handle, previous_event=event),
    ):
        try:
            call()
        except deepep.ArgumentError as error:
            seen.append((type(error).__name__, error.rank))
    buffer.combine(received, handle)
    return seen


def test_refusals_of_work_under_way(world_of: Any, buffer_of: Any, routing: Any) -> None:
    results = world_of(RANKS).run(asynchronous_refusals, buffer_of, routing)
    assert [seen[0][0] for seen in results] == ["wait", "call", "wait"]
    assert len({seen[0][1] for seen in results}) == 1
    assert "rank 1: x: got [" in results[0][0][1]
    for seen in results:
        assert "rank 2: num_worst_tokens: got 1" in seen[1][1]
        assert seen[2:] == [("HandleError", 0), ("CapacityError", 2)]


def inference_mode(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer = buffer_of(ctx)
    with torch.inference_mode():
        good = arguments_of(buffer, routing, ctx.rank)
        received, *_, handle, _ = buffer.dispatch(**good)
        summed, _, _ = buffer.combine(received, handle)
        stats = torch.zeros(2, dtype=torch.int32)
        x = torch.ones(MOST, 128).bfloat16()
        rows, count, ll_handle, _, hook = buffer.low_latency_dispatch(
            x, good["topk_idx"], MOST, EXPERTS, stats, use_fp8=False, return_recv_hook=True
        )
        hook()
        assert torch.equal(stats, count)
        combined, _, _ = buffer.low_latency_combine(rows, good["topk_idx"], good["topk_weights"], ll_handle)
    assert same_bits(combined, 2 * x)
    # Tensors that need gradients are read as they are; gradients are the caller's business.
    x = good["x"].clone().requires_grad_()
    again, *_ = buffer.dispatch(x, handle)
    assert not again.requires_grad
    assert same_bits(again, received)
    assert same_bits(buffer.combine(again, handle)[0], summed)


def test_inference_mode_and_gradients(world_of: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    world_of(RANKS).run(inference_mode, buffer_of, same_bits, routing)


# Hooks


def low_latency(buffer: Any, routing: Any, rank: int, **options: Any) -> Any:
    x = torch.full((MOST, 128), float(rank + 1)).bfloat16()
    idx = routing(rank, RANKS, EXPERTS, 2, MOST)
    return buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False, **options)


def nothing_arrives_before_the_hook(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer = buffer_of(ctx)
    expected, expected_count, *_ = low_latency(buffer, routing, ctx.rank)
    rows, count, _, event, hook = low_latency(buffer, routing, ctx.rank, return_recv_hook=True)
    assert event.event is None
    # Everything the others sent may be here; the outputs are not written before the hook all the same.
    torch.distributed.barrier(group=ctx.group)
    rows.fill_(-7)
    count.fill_(-7)
    torch.distributed.barrier(group=ctx.group)
    assert bool((count == -7).all())
    assert bool((rows == -7).all())
    hook()
    assert same_bits(count, expected_count)
    for expert, n in enumerate(count.tolist()):
        assert same_bits(rows[expert, :n], expected[expert, :n])


def test_outputs_are_written_by_the_hook(world_of: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    world_of(RANKS).run(nothing_arrives_before_the_hook, buffer_of, same_bits, routing)


def forgotten_hook(ctx: Any, buffer_of: Any, routing: Any) -> Any:
    buffer = buffer_of(ctx)
    good = arguments_of(buffer, routing, ctx.rank)
    outcomes = []
    calls = {
        "dispatch": lambda: buffer.dispatch(**good),
        "low_latency_dispatch": lambda: low_latency(buffer, routing, ctx.rank),
        "clean": lambda: buffer.clean_low_latency_buffer(MOST, 128, EXPERTS),
    }
    for call in calls.values():
        _, count, handle, _, hook = low_latency(buffer, routing, ctx.rank, return_recv_hook=True)
        if ctx.rank != 2:
            hook()
        try:
            call()
        except deepep.HookPendingError as error:
            outcomes.append((str(error), error.rank))
        if ctx.rank == 2:
            assert int(count.shape[0]) == 2
            hook()  # what was sent is not lost
        assert int(count.sum()) == int((handle[0] >= 0).sum())
        call()  # and work goes on
    return outcomes


def test_a_forgotten_hook_stops_the_next_operation_everywhere(
    world_of: Any, buffer_of: Any, routing: Any
) -> None:
    results = world_of(RANKS).run(forgotten_hook, buffer_of, routing)
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 3
    assert all(rank == 2 and "the hook of low_latency_dispatch" in text for text, rank in results[0])


def refused_before_the_hook(ctx: Any, buffer_of: Any, routing: Any) -> Any:
    buffer = buffer_of(ctx)
    seen = ""
    try:
        *_, hook = low_latency(
            buffer, routing, ctx.rank, return_recv_hook=True, **({"round_scale": True} if ctx.rank else {})
        )
        seen = "issued"
        hook()
    except deepep.MismatchError as error:
        seen += str(error.argument)
    low_latency(buffer, routing, ctx.rank)
    return seen


def test_a_refusal_reaches_the_others_at_their_hooks(world_of: Any, buffer_of: Any, routing: Any) -> None:
    assert world_of(RANKS).run(refused_before_the_hook, buffer_of, routing) == ["issuedround_scale"] * RANKS
