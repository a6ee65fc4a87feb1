"""Named results under V1's tuples, handles, Buffer.info, `with Buffer`, memory and sums by argument."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

import deepep
from deepep.api import results
from deepep.api.handles import DispatchHandle, LowLatencyHandle
from deepep.runtime import backends as registry

LENGTHS = {
    results.DispatchLayoutResult: 5,
    results.DispatchResult: 6,
    results.CombineResult: 3,
    results.LowLatencyDispatchResult: 5,
    results.LowLatencyCombineResult: 3,
}


def test_lengths_are_v1s() -> None:
    for kind, length in LENGTHS.items():
        assert issubclass(kind, tuple)
        assert len(kind._fields) == length


def named_results(ctx: Any, buffer_of: Any, routing: Any) -> None:
    buffer = buffer_of(ctx)
    num_experts = 2 * ctx.num_ranks
    idx = routing(ctx.rank, ctx.num_ranks, num_experts, 2, 5)
    x, weights = torch.randn(5, 128).bfloat16(), torch.rand(5, 2)

    layout = buffer.get_dispatch_layout(idx, num_experts)
    assert type(layout) is results.DispatchLayoutResult
    per_rank, per_domain, per_expert, in_rank, event = layout
    assert layout.num_tokens_per_rank is per_rank
    assert layout.num_tokens_per_rdma_rank is per_domain is None
    assert layout.num_tokens_per_expert is per_expert
    assert layout.is_token_in_rank is in_rank
    assert layout.event is event

    fresh = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
    assert type(fresh) is results.DispatchResult
    received, local_idx, local_weights, counts, handle, event = fresh
    assert (fresh.recv_x, fresh.recv_topk_idx, fresh.recv_topk_weights) == (
        received,
        local_idx,
        local_weights,
    )
    assert fresh.num_recv_tokens_per_expert_list is counts
    assert type(counts) is list
    assert fresh.handle is handle
    assert isinstance(handle, DispatchHandle)
    assert f"{len(received)} rows received" in repr(handle)
    assert fresh.event is event

    again = buffer.dispatch(x, handle)
    assert type(again) is results.DispatchResult
    assert again[1:5] == (None, None, None, None)
    assert torch.equal(again.recv_x, received)

    combined = buffer.combine(received, handle, local_weights)
    assert type(combined) is results.CombineResult
    assert combined[0] is combined.combined_x
    assert combined[1] is combined.combined_topk_weights
    assert type(buffer.internode_combine(received, handle)) is results.CombineResult

    sent = buffer.low_latency_dispatch(x, idx, 5, num_experts, use_fp8=False)
    assert type(sent) is results.LowLatencyDispatchResult
    rows, count, slots, _, hook = sent
    assert sent.recv_x is rows
    assert sent.recv_count is count
    assert sent.handle is slots
    assert isinstance(slots, LowLatencyHandle)
    assert sent.hook is hook is None
    back = buffer.low_latency_combine(rows, idx, weights, sent.handle)
    assert type(back) is results.LowLatencyCombineResult
    by_tuple = buffer.low_latency_combine(rows, idx, weights, tuple(slots))
    assert torch.equal(back.combined_x, by_tuple[0])
    (values, scales), *_ = buffer.low_latency_dispatch(x, idx, 5, num_experts)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32


def test_results_have_names_and_are_tuples(world_of: Any, buffer_of: Any, routing: Any) -> None:
    world_of(2).run(named_results, buffer_of, routing)


OPERATIONS = {
    *("layout", "dispatch", "cached dispatch", "combine"),
    *("low-latency dispatch", "low-latency combine", "barrier"),
    *("all-gather sessions", "sends around a ring", "Engram storage"),
}


def info(ctx: Any) -> str:
    with deepep.Buffer(ctx.group, 256, low_latency_mode=True, enable_shrink=True, timeout=25.0) as buffer:
        about = buffer.info
        assert (about.rank, about.num_ranks, about.timeout) == (ctx.rank, ctx.num_ranks, 25.0)
        assert (about.device, about.num_sms) == (torch.device("cpu"), deepep.Buffer.num_sms)
        assert (about.low_latency_mode, about.enable_shrink) == (True, True)
        assert (about.reduction, about.masked_ranks) == ("expert_rank", ())
        assert about.ranks_per_domain == 8
        assert set(about.operations) == OPERATIONS
        assert all(about.operations.values())
        if about.backend == "emulator":
            assert about.operations["dispatch"] == "emulated kernels"
        with pytest.raises(dataclasses.FrozenInstanceError):
            about.rank = 5
        assert "get_local_buffer_tensor" not in about.memory
        buffer.get_local_buffer_tensor(torch.uint8)
        assert buffer.info.memory["get_local_buffer_tensor"] == 256
        if ctx.num_ranks > 2:
            buffer.low_latency_update_mask_buffer(2 if ctx.rank != 2 else 1, True)
            assert buffer.info.masked_ranks == ((2,) if ctx.rank != 2 else (1,))
            buffer.low_latency_clean_mask_buffer()
        text = str(buffer.info)
        assert repr(buffer) == f"<deepep.Buffer: rank {ctx.rank} of {ctx.num_ranks}, backend {about.backend}>"
    assert repr(buffer).endswith("destroyed>")
    with pytest.raises(deepep.DestroyedError):
        _ = buffer.info
    return text


def test_info(world_of: Any) -> None:
    tables = world_of(3).run(info)
    lines = dict(line.split("  ", 1) for line in tables[1].splitlines())
    assert lines["rank"].strip() == "1 of 3"
    assert lines["time-out"].strip() == "25 s"
    assert lines["memory: get_local_buffer_tensor"].strip() == "256 bytes"
    starts = {line.index(line.split("  ", 1)[1].strip()) for line in tables[1].splitlines()}
    assert len(starts) == 1, "one column"


def sums_and_sizes(ctx: Any) -> None:
    os.environ["DEEPEP_SYMMETRIC_BYTES"] = "1048576"
    try:
        with deepep.Buffer(ctx.group, timeout=30.0) as buffer:
            assert buffer._engine.info.options.symmetric_bytes == 1 << 20
        # What the constructor is given comes first.
        with deepep.Buffer(ctx.group, timeout=30.0, symmetric_bytes=1 << 21, reduction="exact") as buffer:
            assert buffer.info.reduction == "exact"
            assert buffer._engine.info.options.symmetric_bytes == 1 << 21
    finally:
        del os.environ["DEEPEP_SYMMETRIC_BYTES"]
    with deepep.Buffer(ctx.group, timeout=30.0) as buffer:
        assert buffer.info.reduction == "expert_rank"
        assert buffer._engine.info.options.symmetric_bytes == 0


def domains(ctx: Any) -> list[Any]:
    """Counts by domain and what the buffer says of itself, by argument, by environment, by neither."""
    idx = torch.arange(ctx.num_ranks).repeat(5, 1)
    seen = []
    for given, environment in ((1, "2"), (None, "2"), (None, None)):
        if environment is not None:
            os.environ["DEEPEP_RANKS_PER_DOMAIN"] = environment
        try:
            buffer = deepep.Buffer(ctx.group, timeout=30.0, backend="reference", ranks_per_domain=given)
        finally:
            os.environ.pop("DEEPEP_RANKS_PER_DOMAIN", None)
        with buffer:
            per_domain = buffer.get_dispatch_layout(idx, ctx.num_ranks)[1]
            counts = None if per_domain is None else per_domain.tolist()
            seen.append((buffer.info.ranks_per_domain, counts))
    return seen


def test_domains_are_counted(world_of: Any) -> None:
    for seen in world_of(3).run(domains):
        assert seen == [(1, [5, 5, 5]), (2, [5, 5]), (8, None)]


def test_arguments_before_the_environment(world_of: Any) -> None:
    world_of(2).run(sums_and_sizes)


def refused(ctx: Any, options: dict[str, Any], environment: dict[str, str]) -> Any:
    """Rank 1 constructs with what is wrong: every rank raises the same."""
    mine = options if ctx.rank == 1 else {}
    if ctx.rank == 1:
        os.environ.update(environment)
    try:
        deepep.Buffer(ctx.group, timeout=30.0, **mine)
    except deepep.ArgumentError as error:
        return type(error), str(error)
    finally:
        for name in environment:
            os.environ.pop(name, None)
    return None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], type, str]] = {
    "negative": ({"symmetric_bytes": -1}, {}, deepep.RangeError, "rank 1: symmetric_bytes: got -1"),
    "no rank": ({"ranks_per_domain": 0}, {}, deepep.RangeError, "rank 1: ranks_per_domain: got 0"),
    "half a rank": ({"ranks_per_domain": 0.5}, {}, deepep.ArgumentTypeError, "ranks_per_domain: got float"),
    "a word": (
        {},
        {"DEEPEP_RANKS_PER_DOMAIN": "all"},
        deepep.RangeError,
        "rank 1: DEEPEP_RANKS_PER_DOMAIN: got 'all'",
    ),
    "zero": ({"symmetric_bytes": 0}, {}, deepep.RangeError, "rank 1: symmetric_bytes: got 0"),
    "uneven": ({"symmetric_bytes": 1000}, {}, deepep.RangeError, "a multiple of 128"),
    "float": ({"symmetric_bytes": 1.5}, {}, deepep.ArgumentTypeError, "symmetric_bytes: got float"),
    "no such sum": ({"reduction": "tree"}, {}, deepep.RangeError, "rank 1: reduction: got 'tree'"),
    "a list": ({"reduction": ["exact"]}, {}, deepep.ArgumentTypeError, "rank 1: reduction: got list"),
    "no sum": ({"reduction": None}, {}, deepep.ArgumentTypeError, "rank 1: reduction: got NoneType"),
    "text": ({}, {"DEEPEP_SYMMETRIC_BYTES": "3G"}, deepep.RangeError, "DEEPEP_SYMMETRIC_BYTES: got '3G'"),
    "other sums": (
        {"reduction": "exact"},
        {},
        deepep.MismatchError,
        "reduction: got exact; allowed: expert_rank, as on rank 0",
    ),
    "other sizes": (
        {"symmetric_bytes": 1 << 20},
        {},
        deepep.MismatchError,
        "symmetric_bytes: got 1048576; allowed: 0, as on rank 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_ranks_refuse_what_one_was_given(world_of: Any, case: str) -> None:
    options, environment, kind, text = REFUSED[case]
    outcomes = world_of(3).run(refused, options, environment)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0] is kind
    assert text in outcomes[0][1]


def with_domains(ctx: Any, backend: str, per_domain: list[int | None]) -> str:
    with pytest.raises(deepep.ArgumentError) as caught:
        deepep.Buffer(ctx.group, timeout=30.0, backend=backend, ranks_per_domain=per_domain[ctx.rank])
    return f"{type(caught.value).__name__}: {caught.value}"


def test_domains_have_to_agree_and_be_served(world_of: Any) -> None:
    for text in world_of(3).run(with_domains, "reference", [2, 1, 2]):
        assert text.startswith("MismatchError: rank 1: ranks_per_domain: got 1; allowed: 2, as on rank 0")


def test_a_backend_of_one_domain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    of_one = dataclasses.replace(registry._backends["emulator"], several_domains=False)
    monkeypatch.setitem(registry._backends, "emulator", of_one)
    with pytest.raises(deepep.RangeError, match="emulator: it serves one scale-up domain"):
        registry.choose("emulator", None, torch.device("cpu"), num_ranks=4, ranks_per_domain=2)


def left(ctx: Any, routing: Any) -> Any:
    """Rank 0 fails between two operations; the others are in the next one, with a time-out of an hour."""
    buffer = deepep.Buffer(ctx.group, timeout=3600.0)
    idx = routing(ctx.rank, ctx.num_ranks, 6, 2, 4)
    x = torch.ones(4, 16).bfloat16()
    try:
        with buffer:
            layout = buffer.get_dispatch_layout(idx, 6)
            given = (layout.num_tokens_per_rank, None, layout.is_token_in_rank, layout.num_tokens_per_expert)
            buffer.dispatch(x, None, *given)
            if ctx.rank == 0:
                raise KeyError("of this rank alone")
            buffer.dispatch(x, None, *given)
    except KeyError:
        with pytest.raises(deepep.DestroyedError):
            buffer.get_dispatch_layout(idx, 6)
        buffer.destroy()  # nothing is left to do
        return "mine"
    except deepep.PeerTimeoutError as error:
        return error.record.waited_on
    return "nothing"


def test_an_exception_reaches_the_peers_before_their_time_out(fresh_world: Any, routing: Any) -> None:
    assert fresh_world(3).run(left, routing) == ["mine", (0,), (0,)]


def left_with_work_under_way(ctx: Any) -> str:
    """The failing rank has an operation under way that its peer does not come to: it leaves all the same."""
    idx = torch.tensor([[0], [1]])
    try:
        with deepep.Buffer(ctx.group, low_latency_mode=True, timeout=3600.0) as buffer:
            if ctx.rank == 0:
                buffer.low_latency_dispatch(torch.ones(2, 128).bfloat16(), idx, 2, 2, async_finish=True)
            raise KeyError("of both")
    except KeyError:
        return "left"


def test_a_failing_rank_does_not_wait_for_its_own_operation(fresh_world: Any) -> None:
    assert fresh_world(2).run(left_with_work_under_way) == ["left", "left"]


def ended(ctx: Any, routing: Any) -> None:
    with deepep.Buffer(ctx.group, timeout=30.0) as buffer:
        assert isinstance(buffer, deepep.Buffer)
    with pytest.raises(deepep.DestroyedError):
        buffer.get_dispatch_layout(routing(ctx.rank, ctx.num_ranks, 2, 1, 4), 2)
    with deepep.Buffer(ctx.group, timeout=30.0) as buffer:
        buffer.destroy()  # early, and once more on leaving


def test_with_destroys(world_of: Any, routing: Any) -> None:
    world_of(2).run(ended, routing)
