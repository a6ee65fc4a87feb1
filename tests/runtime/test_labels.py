"""Labels of calls: there in a profile, once each, with their hooks; and nowhere without one."""

from __future__ import annotations

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


def test_an_error_leaves_no_label_behind() -> None:
    class Thing:
        def call(self, number: int) -> int:
            raise ValueError(number)

    for _ in range(2):
        with pytest.raises(ValueError, match="3"):
            labels.labelled(Thing.call, {"self": Thing(), "number": 3, "__class__": Thing})
        assert not labels.inside.on
