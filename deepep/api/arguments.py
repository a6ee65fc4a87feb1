"""From V1's arguments to the engine's requests: what a call of Buffer means, before any engine sees it."""

from __future__ import annotations

import os
from typing import Any

import torch

from deepep.config import Config
from deepep.errors import ArgumentError, ArgumentTypeError, RangeError
from deepep.events import EventHandle, EventOverlap
from deepep.runtime.checks import check_int
from deepep.runtime.completion import Completion
from deepep.runtime.engine import Reduction
from deepep.runtime.requests import Layout, Schedule

DEFAULT_TIMEOUT = 100.0
"""Seconds a rank waits for its peers; the constructor's `timeout` or DEEPEP_TIMEOUT set another."""

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_BYTES_ALIGNMENT = 128


def timeout(given: float | None) -> float:
    """Seconds to wait for peers: as given, else DEEPEP_TIMEOUT, else DEFAULT_TIMEOUT."""
    seconds = float(os.environ.get("DEEPEP_TIMEOUT", DEFAULT_TIMEOUT)) if given is None else float(given)
    if not seconds > 0:
        raise RangeError("timeout", str(seconds), "more than 0 seconds")
    return seconds


def reduction(given: str | None) -> Reduction:
    """Where a low-latency combine sums: as given, else by DEEPEP_REDUCE_ON_EXPERT_RANK, else "exact"."""
    if given is None:
        return "expert_rank" if os.environ.get("DEEPEP_REDUCE_ON_EXPERT_RANK", "0") == "1" else "exact"
    if given == "exact" or given == "expert_rank":
        return given
    raise RangeError("reduction", repr(given), "'exact' or 'expert_rank'")


def constructor_problem(num_nvl_bytes: int, num_rdma_bytes: int) -> ArgumentError | None:
    """What is wrong with the constructor's sizes. The other ranks have to hear of it, so it is not raised."""
    try:
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            check_int(name, size, 0)
            if size % _BYTES_ALIGNMENT:
                raise RangeError(name, str(size), f"a multiple of {_BYTES_ALIGNMENT}")
    except ArgumentError as problem:
        return problem
    return None


_AT_ONCE = Schedule()


def schedule(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> Schedule:
    """V1's three scheduling options; outputs on the communication stream need an event and no wait."""
    if previous_event is None and not async_finish and not allocate_on_comm_stream:
        return _AT_ONCE
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise ArgumentTypeError("previous_event", type(previous_event).__name__, "an EventOverlap or None")
    event = None if previous_event is None else previous_event.event
    if allocate_on_comm_stream and (event is None or not async_finish):
        raise ArgumentError(
            "allocate_on_comm_stream", "True", "True only with a previous_event and async_finish=True"
        )
    after = None if event is None else event.completion
    return Schedule(after, bool(async_finish), allocate_on_comm_stream=bool(allocate_on_comm_stream))


def low_latency_schedule(async_finish: bool, return_recv_hook: bool) -> Schedule:
    """Return early with an event or with a hook, not both."""
    if async_finish and return_recv_hook:
        raise ArgumentError("return_recv_hook", "True, with async_finish", "one of the two")
    return Schedule(asynchronous=bool(async_finish), hook=bool(return_recv_hook))


def overlap(completion: Completion | None) -> EventOverlap:
    """What calls return as their event: without one where the call was synchronous."""
    return EventOverlap(None if completion is None else EventHandle(completion))


def num_sms(config: Config | None, default: int) -> int:
    """SMs that a call may use: its config's, else the class-wide default."""
    if config is None:
        return default
    if not isinstance(config, Config):
        raise ArgumentTypeError("config", type(config).__name__, "a Config or None")
    return config.num_sms


def split_rows(x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x, or (x, scales)."""
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentTypeError("x", f"a tuple of {len(x)}", "a tensor or (x, scales)")
        return x
    return x, None


def layout(
    num_tokens_per_rank: torch.Tensor | None,
    num_tokens_per_rdma_rank: torch.Tensor | None,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_expert: torch.Tensor | None,
) -> Layout:
    """The layout tensors, all of which a fresh dispatch needs."""
    if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
        needed = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        missing = next(name for name, tensor in needed.items() if tensor is None)
        raise ArgumentError(missing, "None, without a handle", "the tensor of get_dispatch_layout")
    return Layout(num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank)


def biases(bias: Any) -> tuple[torch.Tensor, ...]:
    """None, one or two tensors, as a tuple."""
    if bias is None:
        return ()
    biases = bias if isinstance(bias, tuple) else (bias,)
    if len(biases) > 2:
        raise ArgumentTypeError("bias", f"{len(biases)} tensors", "at most two")
    return biases
