"""Labels of calls: there in a profile, once each, with their hooks; and nowhere without one."""

from __future__ import annotations

import inspect
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from deepep import Buffer, ElasticBuffer
from deepep.runtime import labels

CALLS = ("get_dispatch_layout", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")


def calls(buffer: Buffer, elastic: ElasticBuffer) -> list[torch.Tensor]:
    """Every labelled call once, low latency with hooks; then `ElasticBuffer`'s."""
    x, weights = torch.ones(4, 128).bfloat16(), torch.ones(4, 2)
    idx = torch.arange(8).view(4, 2) % 2
    layout = buffer.get_dispatch_layout(idx, 2)
    sent = buffer.dispatch(
        x,
        num_tokens_per_rank=layout.num_tokens_per_rank,
        is_token_in_rank=layout.is_token_in_rank,
        num_tokens_per_expert=layout.num_tokens_per_expert,
    )
    back = buffer.combine(sent.recv_x, sent.handle)
    quick = buffer.low_latency_dispatch(x, idx, 4, 2, use_fp8=False, return_recv_hook=True)
    quick.hook()
    home = buffer.low_latency_combine(quick.recv_x, idx, weights, quick.handle, return_recv_hook=True)
    home.hook()
    spread = elastic.dispatch(x, idx, weights, num_experts=2, num_max_tokens_per_rank=4)
    elastic.combine(spread.recv_x, spread.handle)
    return [back.combined_x, home.combined_x]


def labels_of_calls(context: Any) -> tuple[dict[str, int], bool, int]:
    with (
        Buffer(context.group, low_latency_mode=True) as buffer,
        ElasticBuffer(context.group, 2 << 20) as other,
    ):
        plain = calls(buffer, other)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            again = calls(buffer, other)
        counts = {e.key: e.count for e in seen.key_averages() if e.key.startswith("deepep.")}
        with mock.patch.object(labels, "label", side_effect=AssertionError("nobody looks")):
            calls(buffer, other)
    return counts, all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), labels.inside.on


def test_calls_are_labelled_while_somebody_looks(world_of: Any) -> None:
    ((counts, same, inside),) = world_of(1).run(labels_of_calls)
    expected = dict.fromkeys((f"deepep.{name}" for name in CALLS), 1)
    expected["deepep.dispatch"] = expected["deepep.combine"] = 2  # of either class
    expected |= {f"deepep.low_latency_{name}.hook": 1 for name in ("dispatch", "combine")}
    assert counts == expected
    assert same
    assert not inside


def other_labels(context: Any) -> dict[str, int]:
    """The calls beside dispatch and combine, each once, and what they return to be called."""
    with ElasticBuffer(context.group, 4 << 20, num_cpu_bytes=2 << 20) as buffer:
        buffer.agrs_set_config(1 << 12, 2)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            buffer.barrier()
            with buffer.agrs_new_session():
                _, wait = buffer.all_gather(torch.ones(4))
                wait()
            buffer.pp_set_config(64, 1)
            buffer.pp_send(torch.ones(4), (context.rank + 1) % 2)
            buffer.pp_recv(torch.empty(4), (context.rank + 1) % 2)
            buffer.engram_write(torch.ones(4, 64).bfloat16())
            buffer.engram_fetch(torch.zeros(4, 1, dtype=torch.int32))()
            buffer.gather_expert_counts(torch.zeros(2, dtype=torch.int64))
            buffer.gather_wait_statistics()
            buffer.release_memory()
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("deepep.")}


OTHERS = (
    *("barrier", "create_agrs_session", "all_gather", "all_gather.hook", "destroy_agrs_session"),
    *("pp_set_config", "pp_send", "pp_recv", "engram_write", "engram_fetch", "engram_fetch.hook"),
    *("gather_expert_counts", "gather_wait_statistics", "release_memory"),
)


def test_calls_beside_dispatch_and_combine_are_labelled(world_of: Any) -> None:
    wanted = {f"deepep.{name}": 1 for name in OTHERS}
    assert world_of(2).run(other_labels) == [wanted] * 2


#: Local, or read off: nobody waits in them. `capture`: a context of many calls.
UNLABELLED = re.compile(
    "get_|is_|set_|agrs_|measure_waits|record_warps|wait_statistics|count_experts|capture"
)
#: Under the label of what they call.
INSIDE = ("internode_dispatch", "internode_combine", "low_latency_query_mask_buffer")


@pytest.mark.parametrize("kind", [Buffer, ElasticBuffer])
def test_every_call_that_may_wait_has_a_label(kind: type) -> None:
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not (name.startswith("_") or UNLABELLED.match(name) or name in INSIDE):
            source = inspect.getsource(method)
            assert "@with_label" in source or "is_profiled()" in source or "super()." in source, name


def test_an_error_leaves_no_label_behind() -> None:
    class Thing:
        def call(self, number: int) -> int:
            raise ValueError(number)

    for _ in range(2):
        with pytest.raises(ValueError, match="3"):
            labels.labelled(Thing.call, {"self": Thing(), "number": 3, "__class__": Thing})
        assert not labels.inside.on
