"""Measurements on one rank, together with all others: the same work round after round, with traffic of a
buffer between; messages between every two ranks; the process' share of a core.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from deepep.api.buffer import Buffer
from deepep.api.waits import WaitStatistics
from deepep.doctor.judge import Evidence
from deepep.errors import ModeError
from deepep.runtime.control.transport import device_type_of, gather_bytes
from deepep.runtime.control.waits import charges

MESSAGE = {"cpu": 4 << 20, "cuda": 1 << 30}  # bytes: long enough that a third of the rate shows
SPIN = 0.1  # seconds of CPU time
TRIES = 8  # messages on each link, before the rounds and after


@dataclass(frozen=True)
class Delay:
    """A fault to be found: seconds of sleep in each round's work, or before each message `to` one rank."""

    rank: int
    seconds: float
    to: int | None = None


@dataclass(frozen=True)
class Examination:
    """All ranks' measurements, the same on every rank. waits: matrices of the buffer's traffic, where its
    backend measures them. backend: of the traffic.
    """

    evidence: Evidence
    waits: WaitStatistics | None
    backend: str


def examine(
    group: dist.ProcessGroup,
    device: torch.device,
    rounds: int = 30,
    backend: str | None = None,
    delay: Delay | None = None,
) -> Examination:
    """Measures; collective over the group. Raises what `Buffer` raises."""
    size = group.size()
    at = device if device_type_of(group) == "cuda" else torch.device("cpu")
    # Before and after: what lasts for a moment only, of a busy machine, is nobody's fault.
    shares, links = [_share_of_a_core()], [0.0] * size
    _time_links(group, at, delay, links)
    shares.append(_share_of_a_core())
    late, work, waits, used = _rounds(group, device, at, rounds, backend, delay)
    shares.append(_share_of_a_core())
    _time_links(group, at, delay, links)
    mine = [late, links, max(shares), work, socket.gethostname()]
    everyone = [json.loads(raw) for raw in gather_bytes(group, json.dumps(mine).encode())]
    lates, all_links, all_shares, works, names = zip(*everyone, strict=True)
    hosts = [names.index(name) for name in names]
    usual = sorted(works)[(size - 1) // 2]
    return Examination(Evidence(lates, all_links, all_shares, usual, hosts), waits, used)


def _time_links(group: dist.ProcessGroup, at: torch.device, delay: Delay | None, least: list[float]) -> None:
    """Exchanges messages with every other rank; keeps the `least` seconds that one has taken from each."""
    for _ in range(TRIES):
        for peer in _opponents(group.rank(), group.size()):
            _meet(group, at)
            if peer is not None:
                took = _message_from(group, peer, at, delay)
                least[peer] = min(took, least[peer] or took)


def _share_of_a_core() -> float:
    """CPU time over time, of a thread that asks for all of it."""
    began, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < SPIN:
        pass
    return SPIN / (time.perf_counter() - began)


def _rounds(
    group: dist.ProcessGroup,
    device: torch.device,
    at: torch.device,
    rounds: int,
    backend: str | None,
    delay: Delay | None,
) -> tuple[list[float], float, WaitStatistics | None, str]:
    """(by rank how long this one waited for it, this rank's work, the buffer's waits, its backend), in
    seconds, medians of all rounds.
    """
    rank, size = group.rank(), group.size()
    waited: list[list[float]] = [[] for _ in range(size)]
    works = []
    operand = torch.randn(384 if device.type == "cpu" else 4096, device=device).outer(
        torch.ones(384 if device.type == "cpu" else 4096, device=device)
    )
    with Buffer(group, low_latency_mode=True, backend=backend, device=device) as buffer:
        with contextlib.suppress(ModeError):
            buffer.measure_waits()
        for _ in range(rounds):
            _traffic(buffer, device)
            _meet(group, at)
            began = time.perf_counter_ns()
            _work(operand)
            if delay is not None and delay.rank == rank and delay.to is None:
                time.sleep(delay.seconds)
            busy = time.perf_counter_ns() - began
            gathered = _gather(group, busy, at)
            passed = time.perf_counter_ns() - began - busy
            charged = charges(dict(enumerate(gathered)), rank, passed)
            for peer in range(size):
                waited[peer].append(charged.get(peer, 0) / 1e9)
            works.append(busy / 1e9)
        waits: WaitStatistics | None = None
        with contextlib.suppress(ModeError):
            waits = buffer.gather_wait_statistics()
        used = buffer.info.backend
    return [median(times) for times in waited], median(works), waits, used


def _work(operand: torch.Tensor) -> None:
    """The same on every rank: a few milliseconds of matrix products."""
    for _ in range(4):
        operand @ operand
    if operand.is_cuda:
        torch.cuda.synchronize()


def _traffic(buffer: Buffer, device: torch.device) -> None:
    """A dispatch and a combine of each mode: every rank sends to every other."""
    size, tokens, hidden = buffer.group_size, 32, 1024
    x = torch.ones(tokens, hidden, dtype=torch.bfloat16, device=device)
    idx = torch.arange(size, device=device).expand(tokens, size).contiguous()
    weights = torch.ones(tokens, size, device=device)
    sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=size)
    assert isinstance(sent.recv_x, torch.Tensor)
    assert sent.handle is not None
    buffer.combine(sent.recv_x, sent.handle)
    quick = buffer.low_latency_dispatch(x, idx, tokens, size, use_fp8=False)
    assert isinstance(quick.recv_x, torch.Tensor)
    buffer.low_latency_combine(quick.recv_x, idx, weights, quick.handle)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _opponents(rank: int, size: int) -> list[int | None]:
    """By turn, whom this rank meets, each other rank once, so that no rank is met by two; None: nobody."""
    players = size + size % 2
    turns: list[int | None] = []
    for turn in range(players - 1):
        if rank == players - 1:
            opponent = next(r for r in range(players - 1) if (2 * r) % (players - 1) == turn)
        else:
            opponent = (turn - rank) % (players - 1)
            opponent = players - 1 if opponent == rank else opponent
        turns.append(opponent if opponent < size else None)
    return turns


def _message_from(group: dist.ProcessGroup, peer: int, at: torch.device, delay: Delay | None) -> float:
    """Seconds from asking a peer for its message until it has come; the peer asks first or afterwards."""
    rank = group.rank()
    took = 0.0
    word = torch.ones(1, dtype=torch.uint8, device=at)
    message = torch.ones(MESSAGE[at.type], dtype=torch.uint8, device=at)
    theirs = dist.get_global_rank(group, peer)
    for asks in (min(rank, peer), max(rank, peer)):
        if rank == asks:
            began = time.perf_counter()
            dist.send(word, theirs, group=group)
            dist.recv(message, theirs, group=group)
            if at.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
        else:
            dist.recv(word, theirs, group=group)
            if delay is not None and (delay.rank, delay.to) == (rank, peer):
                time.sleep(delay.seconds)
            dist.send(message, theirs, group=group)
    return took


def _gather(group: dist.ProcessGroup, value: int, at: torch.device) -> list[int]:
    mine = torch.tensor([value], dtype=torch.int64, device=at)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return [int(one) for one in everyone]


def _meet(group: dist.ProcessGroup, at: torch.device) -> None:
    """Returns on all ranks at nearly the same time."""
    _gather(group, 0, at)


def run_examination(context: Any, rounds: int, backend: str | None, delay: Delay | None) -> Examination:
    """The same on a rank of a world (deepep.sim)."""
    torch.set_num_threads(1)
    return examine(context.group, context.device, rounds, backend, delay)
