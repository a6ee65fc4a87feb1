"""Ambient modes of torch change nothing: every operation, under every mode, gives its bits without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import deepep

RANKS, LOCAL, TOPK, TOKENS, HIDDEN, MOST = 2, 2, 2, 5, 512, 8
EXPERTS = RANKS * LOCAL
OPTIONS: dict[str, Any] = {
    "num_nvl_bytes": 1 << 12,
    "num_rdma_bytes": 1 << 12,
    "low_latency_mode": True,
    "enable_shrink": True,
    "timeout": 30.0,
}


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    # As torch.use_deterministic_algorithms does it, which imports all of inductor to tell it so.
    torch._C._set_deterministic_algorithms(True)  # and memory that is not initialised is filled
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": torch.autograd.detect_anomaly,
}


def inputs(rank: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(rank)
    return {
        "x": torch.randn(TOKENS, HIDDEN, generator=made).bfloat16(),
        "idx": torch.rand(TOKENS, EXPERTS, generator=made).topk(TOPK).indices,
        "weights": torch.rand(TOKENS, TOPK, generator=made),
        "bias": torch.randn(TOKENS, HIDDEN, generator=made).bfloat16(),
        "scales": torch.rand(TOKENS, HIDDEN // 128, generator=made),
        "out": torch.zeros(TOKENS, HIDDEN).bfloat16(),
        "stats": torch.zeros(LOCAL, dtype=torch.int32),
        "mask": torch.full((RANKS,), -1, dtype=torch.int32),
    }


def operations(buffer: Any, given: dict[str, torch.Tensor], results: dict[str, Any]) -> None:
    """Every public operation once; what they give goes to `results`, by name."""
    x, idx, weights, bias = (given[name] for name in ("x", "idx", "weights", "bias"))
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, EXPERTS, async_finish=True)
    results |= {"per_rank": per_rank, "per_expert": per_expert, "in_rank": in_rank}
    layout = (per_rank, None, in_rank, per_expert)
    rows, row_idx, row_weights, counts, handle, event = buffer.dispatch(
        x, None, *layout, idx, weights, previous_event=event, async_finish=True, allocate_on_comm_stream=True
    )
    event.current_stream_wait()
    results |= {
        "rows": rows,
        "row idx": row_idx,
        "row weights": row_weights,
        "counts": row_idx.new_tensor(counts),
    }
    results["combined"], results["combined weights"], _ = buffer.combine(rows, handle, row_weights, bias)
    (results["bytes"], results["byte scales"]), _, _, _, other, _ = buffer.dispatch(
        (x.to(torch.float8_e4m3fn), given["scales"]), None, *layout, idx, weights, num_worst_tokens=16
    )
    real = len(rows)
    results["bytes"], results["byte scales"] = results["bytes"][:real], results["byte scales"][:real]
    results["again"] = buffer.dispatch(x, handle)[0]
    results["handle"] = [entry for made in (handle, other) for entry in made if entry is not None]
    for fp8 in (False, True):
        got, count, ll_handle, _, hook = buffer.low_latency_dispatch(
            x, idx, MOST, EXPERTS, given["stats"], use_fp8=fp8, round_scale=True, return_recv_hook=True
        )
        hook()
        parts = got if fp8 else (got,)
        results |= {f"slots {fp8} {i}": valid(part, count) for i, part in enumerate(parts)}
        results |= {f"count {fp8}": count, f"ranges {fp8}": ll_handle[1]}
        results["handle"] += list(ll_handle[:2])
        results[f"source {fp8}"] = valid(ll_handle[0], count)
        if not fp8:
            slots = got
    held = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)[2]
    for logfmt in (False, True):
        event = buffer.low_latency_combine(
            slots, idx, weights, held, logfmt, out=given["out"], async_finish=True
        )[1]
        event.current_stream_wait()
        results[f"out {logfmt}"] = given["out"].clone()
        held = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)[2]
    staged = buffer.get_next_low_latency_combine_buffer(held)
    staged.copy_(slots)
    results["zero copy"] = buffer.low_latency_combine(staged, idx, weights, held, zero_copy=True)[0]
    buffer.clean_low_latency_buffer(MOST, HIDDEN, EXPERTS)
    buffer.low_latency_query_mask_buffer(given["mask"])
    results |= {"stats": given["stats"], "mask": given["mask"]}
    results["local"] = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([4, 4]))


def valid(slots: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The rows that were received; what lies behind them is whatever was there."""
    raw = slots.contiguous().view(torch.uint8)
    return torch.cat([part[:n] for part, n in zip(raw, count.tolist(), strict=True)])


def under(ctx: Any, backend: str, mode: str, same_bits: Any) -> None:
    plain: dict[str, Any] = {}
    scratch = ctx.scratch.setdefault("ambient", {})
    if backend not in scratch:
        scratch[backend] = deepep.Buffer(ctx.group, backend=backend, **OPTIONS)
    operations(scratch[backend], inputs(ctx.rank), plain)
    given, results = inputs(ctx.rank), dict[str, Any]()
    with MODES[mode]():
        if mode == "inference":  # tensors of the mode may be written in it alone
            given = {name: tensor.clone() for name, tensor in given.items()}
        buffer = deepep.Buffer(ctx.group, backend=backend, **OPTIONS)
        operations(buffer, given, results)
    after: dict[str, Any] = {}
    operations(buffer, inputs(ctx.rank), after)  # what was made in the mode serves without it
    for found in (results, after):
        assert found.keys() == plain.keys()
        for name, wanted in plain.items():
            if name != "handle":
                assert same_bits(found[name], wanted), name
    rows, handle = results["rows"], results["handle"]
    for tensor in (*handle, rows, results["combined"], results["local"]):
        assert tensor.device == torch.device("cpu")
        assert not tensor.is_inference()
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.own_backend
@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_a_mode_changes_nothing(world_of: Any, same_bits: Any, backend: str, mode: str) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    world_of(RANKS).run(under, backend, mode, same_bits)
