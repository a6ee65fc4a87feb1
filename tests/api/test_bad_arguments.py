"""Every parameter of every public callable, given odd values: the library's own error, which names it.

A value may be taken only if it is of a kind that the parameter's annotation says.

Collective calls: on every rank the same, if one rank is bad as if all are; and the next call works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from harness import bad_arguments as bad

import deepep
from deepep import formats, gate

RANKS, LOCAL, TOPK, TOKENS, HIDDEN, MOST = 2, 2, 2, 3, 512, 4
EXPERTS = RANKS * LOCAL

#: other names that an error may have for what is wrong, by parameter
NAMES = {
    "x": ("scales", "is_token_in_rank", "bias"),
    "num_tokens_per_expert": ("num_experts",),
    "handle": ("num_experts", "x", "topk"),
    "topk_idx": ("topk_weights", "num_worst_tokens", "num_experts"),
    "topk_weights": ("topk_idx",),
    "is_token_in_rank": ("num_tokens_per_rank",),
    "num_max_dispatch_tokens_per_rank": ("x",),
    "num_experts": ("topk_idx", "num_max_dispatch_tokens_per_rank", "cumulative_local_expert_recv_stats"),
    "zero_copy": ("use_logfmt",),
    "use_nvfp4": ("NVFP4",),
    "out": ("topk_idx",),
    "use_ue8m0": ("round_scale",),
}
#: what says nothing here, and is not looked at
UNUSED = {
    *("num_tokens_per_rdma_rank", "packed_recv_count", "comp_signal", "block_m", "threshold"),
    *("src_signals", "src_signal_expect_value", "align_fp8_quantization"),
}


class Calls:
    """Good calls of a rank, by method: complete arguments, made anew for each."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        made = torch.Generator().manual_seed(buffer.rank)
        self.x = torch.randn(TOKENS, HIDDEN, generator=made).bfloat16()
        self.idx = torch.rand(TOKENS, EXPERTS, generator=made).topk(TOPK).indices
        self.weights = torch.rand(TOKENS, TOPK, generator=made)
        self.layout = buffer.get_dispatch_layout(self.idx, EXPERTS)
        per_rank, _, per_expert, in_rank, _ = self.layout
        self.routing = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }
        result = buffer.dispatch(self.x, None, per_rank, None, in_rank, per_expert, self.idx, self.weights)
        self.rows, self.row_weights, self.handle = result[0], result[2], result[4]

    def get_dispatch_layout(self) -> dict[str, Any]:
        return {"topk_idx": self.idx, "num_experts": EXPERTS}

    def dispatch(self) -> dict[str, Any]:
        return {"x": self.x, **self.routing, "topk_idx": self.idx, "topk_weights": self.weights}

    def combine(self) -> dict[str, Any]:
        bias = torch.ones(TOKENS, HIDDEN).bfloat16()
        return {"x": self.rows, "handle": self.handle, "topk_weights": self.row_weights, "bias": bias}

    def clean_low_latency_buffer(self) -> dict[str, Any]:
        return {"num_max_dispatch_tokens_per_rank": MOST, "hidden": HIDDEN, "num_experts": EXPERTS}

    def low_latency_dispatch(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "topk_idx": self.idx,
            "num_max_dispatch_tokens_per_rank": MOST,
            "num_experts": EXPERTS,
            "cumulative_local_expert_recv_stats": torch.zeros(LOCAL, dtype=torch.int32),
            "dispatch_wait_recv_cost_stats": torch.zeros(RANKS, dtype=torch.int64),
            "use_fp8": False,
        }

    def low_latency_combine(self) -> dict[str, Any]:
        if not hasattr(self, "held"):
            self.held = self.buffer.low_latency_dispatch(self.x, self.idx, MOST, EXPERTS, use_fp8=False)
        return {
            "x": self.held[0],
            "topk_idx": self.idx,
            "topk_weights": self.weights,
            "handle": self.held[2],
            "out": torch.zeros(TOKENS, HIDDEN).bfloat16(),
            "combine_wait_recv_cost_stats": torch.zeros(RANKS, dtype=torch.int64),
        }


COLLECTIVE = [name for name in vars(Calls) if not name.startswith("_")]


def finish(result: Any) -> None:
    """Everything that a call has started: hooks and events."""
    for part in result if isinstance(result, tuple) else ():
        if callable(part) and not isinstance(part, (torch.Tensor, deepep.EventOverlap)):
            part()
        elif isinstance(part, deepep.EventOverlap) and part.event is not None:
            part.current_stream_wait()


def collective(ctx: Any, backend: str, method: str, everyone: bool) -> list[Any]:
    """All outcomes of this rank, and what is wrong with them."""
    key = ("bad arguments", backend)
    if key not in ctx.scratch:
        ctx.scratch[key] = deepep.Buffer(
            ctx.group, low_latency_mode=True, backend=backend, enable_shrink=True, timeout=20.0
        )
    buffer = ctx.scratch[key]
    calls, call = Calls(buffer), getattr(buffer, method)
    found = []
    for parameter in bad.parameters(call):
        if parameter in UNUSED:
            continue
        for name, value in bad.odd_values(getattr(calls, method)().get(parameter)):
            given = getattr(calls, method)()
            if everyone or ctx.rank == 1:
                given[parameter] = value

            def work(given: dict[str, Any] = given) -> None:
                result = call(**given)
                finish(result)
                if method == "get_dispatch_layout":  # local: a refusal is told in the dispatch that follows
                    fresh(calls)

            outcome, wrong = bad.judge(parameter, work, NAMES.get(parameter, ()))
            if outcome is not None and outcome[0] == "took it" and parameter in given:
                wrong = bad.wrongly_taken(call, parameter, name, given[parameter])
            found.append((f"{method}: {parameter} is {name}", outcome, wrong))
            if outcome is None:
                return found  # the ranks may be out of step
        finish(call(**getattr(calls, method)()))  # the next good call works
    return found


def fresh(calls: Calls) -> None:
    finish(calls.buffer.dispatch(**calls.dispatch()))


@pytest.mark.own_backend
@pytest.mark.parametrize("everyone", [False, True], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("method", COLLECTIVE)
@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_collective_calls(world_of: Any, backend: str, method: str, everyone: bool) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    ranks = world_of(RANKS).run(collective, backend, method, everyone, timeout=60)
    complaints = [
        f"rank {r}: {case}: {wrong}" for r, found in enumerate(ranks) for case, _, wrong in found if wrong
    ]
    assert not complaints, "\n".join(complaints)
    refused = 0
    for mine, theirs in zip(*ranks, strict=True):
        assert mine[1][:2] == theirs[1][:2], f"{mine}\n{theirs}"
        refused += mine[1][0] != "took it"
    assert refused > 20, "nothing was refused"


ELSEWHERE = {
    "join",
    *("count_experts", "gather_expert_counts", "release_memory"),  # test_expert_counts, test_release_memory
    *("measure_waits", "wait_statistics", "gather_wait_statistics"),  # tests/runtime/test_waits.py
    "record_warps",  # tests/api/test_warp_lines.py
}
"""Methods whose bad arguments other files try."""


def test_every_collective_call_is_tried() -> None:
    aliases = {"internode_dispatch", "internode_combine"}
    local = {"destroy", "capture", "set_num_sms", "info", "num_sms", *LOCAL_METHODS}
    public = {name for name in dir(deepep.Buffer) if not name.startswith("_")}
    static = {n for n in public if isinstance(inspect.getattr_static(deepep.Buffer, n), staticmethod)}
    assert public - local - static - aliases - set(CHANGES) - ELSEWHERE == set(COLLECTIVE)
    for name in aliases:
        assert bad.parameters(getattr(deepep.Buffer, name))


#: Calls that change the ranks, each with its parameter and a good value; who joins is test_joining's.
CHANGES = {"invite": ("ranks", [2]), "admit": ("invitation", "text"), "dismiss": ("ranks", [1])}


def changes(ctx: Any, everyone: bool) -> list[str]:
    complaints = []
    with deepep.Buffer(ctx.group, enable_shrink=True, max_num_ranks=3, timeout=20.0) as buffer:
        for method, (parameter, good) in CHANGES.items():
            refused = 0
            for name, value in bad.odd_values(good):
                given = value if everyone or ctx.rank == 1 else good

                def work(method: str = method, given: Any = given) -> None:
                    getattr(buffer, method)(given)

                others = ("ranks", "invitation")
                outcome, wrong = bad.judge(parameter, work, others)
                complaints += [f"{method}: {name}: {wrong}"] if wrong else []
                if outcome is None:
                    return complaints
                refused += outcome[0] != "took it"
            assert refused > 20, method
            assert buffer.invite([2])
    return complaints


@pytest.mark.parametrize("everyone", [False, True], ids=["one rank", "all ranks"])
def test_calls_that_change_the_ranks(world_of: Any, everyone: bool) -> None:
    assert world_of(RANKS).run(changes, everyone, timeout=60) == [[], []]


LOCAL_METHODS: dict[str, dict[str, Any]] = {
    "get_comm_stream": {},
    "get_local_buffer_tensor": {"dtype": torch.uint8, "size": torch.Size([4]), "offset": 0},
    "get_next_low_latency_combine_buffer": {},
    "low_latency_clean_mask_buffer": {},
    "low_latency_query_mask_buffer": {"mask_status": torch.zeros(1, dtype=torch.int32)},
    "low_latency_update_mask_buffer": {"rank_to_mask": 0, "mask": False},
}


def local_methods(ctx: Any) -> list[str]:
    with deepep.Buffer(
        ctx.group, 256, 256, low_latency_mode=True, enable_shrink=True, timeout=20.0
    ) as buffer:
        return [
            wrong
            for name, good in LOCAL_METHODS.items()
            if good
            for wrong in bad.complaints_of(getattr(buffer, name), good)
        ]


def test_local_methods() -> None:
    from deepep.sim import World

    with World(1) as world:
        (found,) = world.run(local_methods)
    assert not found, "\n".join(found)


ROWS = torch.randn(3, 512)
LOGITS = torch.randn(4, 8)
PLAIN: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (deepep.Config, {}),
    (deepep.Config().get_nvl_buffer_size_hint, {"hidden_bytes": 512, "num_ranks": 2}),
    (deepep.Config().get_rdma_buffer_size_hint, {"hidden_bytes": 512, "num_ranks": 2}),
    (deepep.Buffer.get_dispatch_config, {"num_ranks": 2}),
    (deepep.Buffer.get_combine_config, {"num_ranks": 2}),
    (
        deepep.Buffer.get_low_latency_rdma_size_hint,
        {
            "num_max_dispatch_tokens_per_rank": 4,
            "hidden": 512,
            "num_ranks": 2,
            "num_experts": 4,
            "ranks_per_domain": 1,
        },
    ),
    (deepep.EventHandle, {}),
    (deepep.EventOverlap, {}),
    (formats.fp8_cast, {"x": ROWS}),
    (formats.fp8_uncast, {"values": ROWS.to(torch.float8_e4m3fn), "scales": torch.ones(3, 4)}),
    (formats.ue8m0_pack, {"scales": torch.ones(3, 4)}),
    (formats.ue8m0_unpack, {"packed": torch.ones(3, 4, dtype=torch.int32)}),
    (formats.column_major_scales, {"scales": torch.ones(3, 4)}),
    (gate.stable_topk, {"values": LOGITS, "k": 2}),
    (gate.softmax_topk, {"logits": LOGITS, "num_topk": 2}),
    (gate.sigmoid_topk, {"logits": LOGITS, "num_topk": 2}),
    (gate.group_limited_topk, {"logits": LOGITS, "num_topk": 2, "num_groups": 2, "num_kept_groups": 1}),
    (
        gate.nodes_per_token,
        {"topk_idx": torch.zeros(2, 2, dtype=torch.int64), "num_experts": 8, "num_nodes": 2},
    ),
]


@pytest.mark.parametrize(("function", "good"), PLAIN, ids=[f.__qualname__ for f, _ in PLAIN])
def test_local_callables(function: Any, good: dict[str, Any]) -> None:
    found = bad.complaints_of(function, good, is_of_torch=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("words", "name", "value", "wanted"),
    [
        ({"bool"}, "an array", numpy.array([1, 0]), False),
        ({"bool"}, "zero", 0, True),
        ({"bool"}, "a float", 1.5, False),
        ({"int"}, "true", True, False),
        ({"int"}, "2^70", 1 << 70, False),
        ({"int"}, "nothing", None, False),
        ({"int", "None"}, "nothing", None, True),
        ({"float"}, "NaN", float("nan"), False),
        ({"float"}, "zero", 0, True),
        ({"Tensor"}, "negated in place", torch.ones(1), False),
        ({"Tensor"}, "a list", [1], False),
        ({"Config", "None"}, "an object", object(), False),
        ({"Config", "None"}, "a config", deepep.Config(), True),
    ],
)
def test_what_may_be_taken(words: set[str], name: str, value: Any, wanted: bool) -> None:
    assert bad.fits(words, name, value) is wanted


# The constructor


#: without them a rank has no peers
ALONE = {"group", "comm"}


def constructor(ctx: Any, everyone: bool) -> list[Any]:
    """Outcomes of this rank, and what is wrong with them: half of the values for one rank, half for all."""
    good = {"num_nvl_bytes": 256, "num_rdma_bytes": 256, "timeout": 20.0}
    found = []
    for parameter in bad.parameters(deepep.Buffer):
        if parameter in ALONE and not everyone:
            continue
        for name, value in list(bad.odd_values(None))[everyone::2]:
            is_bad = everyone or ctx.rank == 1

            def work(parameter: str = parameter, value: Any = value, is_bad: bool = is_bad) -> None:
                given = {"group": ctx.group, **good, **({parameter: value} if is_bad else {})}
                deepep.Buffer(**given).destroy()

            outcome, wrong = bad.judge(parameter, work, ("group, comm",))
            if outcome is not None and outcome[0] == "took it" and is_bad:
                wrong = bad.wrongly_taken(deepep.Buffer, parameter, name, value)
            found.append((f"Buffer: {parameter} is {name}", outcome, wrong))
            if outcome is None:
                return found  # the ranks may be out of step
    deepep.Buffer(ctx.group, **good).destroy()
    return found


@pytest.mark.parametrize("everyone", [False, True], ids=["one rank", "all ranks"])
def test_the_constructor(fresh_world: Any, everyone: bool) -> None:
    ranks = fresh_world(RANKS).run(constructor, everyone, timeout=200)
    complaints = [
        f"rank {r}: {case}: {wrong}" for r, found in enumerate(ranks) for case, _, wrong in found if wrong
    ]
    assert not complaints, "\n".join(complaints)
    for mine, theirs in zip(*ranks, strict=True):
        assert mine[1][:2] == theirs[1][:2], f"{mine}\n{theirs}"
