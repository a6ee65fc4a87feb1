"""Errors of a buffer's life: constructors that do not fit, the wrong mode, after its end; and their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.refusals import raised

import deepep
from deepep import errors


def wrong_modes(ctx: Any) -> list[str]:
    plain = deepep.Buffer(ctx.group, timeout=30.0)
    x, idx = torch.ones(2, 128).bfloat16(), torch.zeros(2, 1, dtype=torch.int64)
    calls = (
        lambda: plain.low_latency_dispatch(x, idx, 4, ctx.num_ranks),
        lambda: plain.low_latency_combine(x, idx, torch.ones(2, 1), None),
        lambda: plain.clean_low_latency_buffer(4, 128, ctx.num_ranks),
        lambda: plain.get_next_low_latency_combine_buffer(None),
        lambda: plain.low_latency_update_mask_buffer(0, True),
        lambda: plain.low_latency_query_mask_buffer(torch.zeros(ctx.num_ranks, dtype=torch.int32)),
        plain.low_latency_clean_mask_buffer,
    )
    outcomes = [raised(call)[0] for call in calls]
    plain.destroy()
    return outcomes


def test_calls_in_the_wrong_mode(world_of: Any) -> None:
    for outcomes in world_of(2).run(wrong_modes):
        assert outcomes == ["ModeError"] * 7


def constructors(ctx: Any) -> list[Any]:
    import threading

    bad, threads = ctx.rank == 1, threading.active_count()
    outcomes = [
        raised(lambda: deepep.Buffer(ctx.group, num_nvl_bytes=100 if bad else 128, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, num_rdma_bytes=-128 if bad else 0, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, low_latency_mode=bad, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, enable_shrink=bad, timeout=30.0)),
    ]
    deepep.Buffer(ctx.group, timeout=30.0).destroy()
    for thread in threading.enumerate():
        if thread.name.startswith("deepep-rank") and threading.active_count() > threads:
            thread.join(5.0)
    assert threading.active_count() == threads
    return outcomes


def test_constructors_that_do_not_fit(world_of: Any) -> None:
    outcomes = world_of(2).run(constructors)
    assert outcomes[0] == outcomes[1]
    assert [(o[0], *o[2:]) for o in outcomes[0]] == [
        ("RangeError", "num_nvl_bytes", 1),
        ("RangeError", "num_rdma_bytes", 1),
        ("MismatchError", "low_latency", 1),
        ("MismatchError", "masks", 1),
    ]


def test_a_buffer_needs_a_group() -> None:
    with pytest.raises(ValueError, match="group, comm"):
        deepep.Buffer(None)
    with pytest.raises(errors.ArgumentTypeError, match="mpi4py"):
        deepep.Buffer(None, comm=object())


def destroyed(ctx: Any) -> list[str]:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    buffer = deepep.Buffer(ctx.group, explicitly_destroy=True, timeout=30.0, low_latency_mode=True)
    other = deepep.Buffer(ctx.group, timeout=30.0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, ctx.num_ranks)
    x = torch.ones(2, 8).bfloat16()
    received, *_, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert)
    buffer.destroy()
    buffer.destroy()
    names = []
    for call in (
        lambda: buffer.combine(received, handle),
        lambda: buffer.dispatch(x, handle),
        lambda: buffer.get_dispatch_layout(idx, ctx.num_ranks),
        lambda: buffer.low_latency_dispatch(x, idx, 4, ctx.num_ranks),
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
        buffer.get_comm_stream,
    ):
        try:
            call()
        except errors.DestroyedError as error:
            names.append(type(error).__name__)
    names.append(raised(lambda: other.combine(received, handle))[0])
    other.destroy()
    return names


def test_a_destroyed_buffer_and_its_handles(world_of: Any) -> None:
    for names in world_of(2).run(destroyed):
        assert names == ["DestroyedError"] * 6 + ["HandleError"]


def test_errors_keep_their_parts_when_they_travel() -> None:
    import pickle

    error = errors.CapacityError("num_worst_tokens", "1", "at least 2", 3)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.CapacityError
    assert (copy.argument, copy.got, copy.allowed, copy.rank) == ("num_worst_tokens", "1", "at least 2", 3)
    assert str(copy) == str(error) == "rank 3: num_worst_tokens: got 1; allowed: at least 2"
    record = errors.FaultRecord("dispatch", "payload", 0, (2,), 3, 2, 1.5)
    fault = pickle.loads(pickle.dumps(errors.PeerTimeoutError(record, "closed")))
    assert fault.record == record
    assert isinstance(fault, TimeoutError)
    assert "rank 2" in str(fault)
    assert issubclass(errors.ArgumentTypeError, TypeError)
    assert issubclass(errors.ArgumentError, ValueError)
