"""Times of dispatches of two virtual ranks into the expanded layout: one kernel, or a pass behind a dispatch.

    PYTHONPATH=tests python -m harness.expanded_times [--sms 24,64] [--kinds bf16,fp8] [--pushing 6,8]

Events around both ranks' launches, L2 flushed, median (90th percentile) of 30, microseconds. No link is in
it, and both ranks share one memory. "pass, rows" sorts and spreads the rows alone, "pass, all" does all that
ElasticBuffer does behind a dispatch: weights and scales, too. "copy" copies as many bytes as a rank has of
expanded rows, both ranks at once, with as many SMs. --pushing: the one kernel with other numbers of SMs that
push, besides the engine's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from deepep import _cuda
from deepep.reference.elastic import ElasticInput
from harness.expanded_ranks import ExpandedDomain
from harness.virtual_ranks import VirtualDomain

TOKENS, TOPK, EXPERTS, ALIGNMENT, ROUNDS, RANKS = 4096, 8, 256, 128, 30, 2
#: Bytes and scales of a row.
KINDS = {"bf16": (14336, 0), "fp8": (7168, 56), "fp8 rows": (7168, 0)}


def inputs(num_bytes: int, num_scales: int) -> list[ElasticInput]:
    """Uniform routing of two ranks' tokens; rows of so many bytes."""
    made = []
    for _ in range(RANKS):
        idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK, 1).indices
        x = torch.randint(0, 256, (TOKENS, num_bytes), dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        scales = torch.rand(TOKENS, num_scales, device="cuda") if num_scales else None
        made.append(ElasticInput(x, idx, torch.rand(TOKENS, TOPK, device="cuda"), scales))
    return made


def expanded_rows(given: list[ElasticInput]) -> list[int]:
    """The expanded rows of each rank, gaps included."""
    counts = torch.cat([rank.topk_idx.flatten() for rank in given]).bincount(minlength=EXPERTS)
    aligned = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return [int(rows) for rows in aligned.view(RANKS, -1).sum(1)]


def measure(domain: VirtualDomain, run: Callable[[], None]) -> str:
    """Median and 90th percentile of `run`'s time, from before both ranks' launches to behind them."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(ROUNDS + 5):
        flush.fill_(i)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # both ranks' launches are queued when it ends
        begin.record()
        for stream in domain.streams:
            stream.wait_event(begin)
        run()
        for stream in domain.streams:
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    times = sorted(times[5:])
    return f"{statistics.median(times):.1f} ({times[int(0.9 * len(times))]:.1f})"


def measure_kind(kind: str, sms: int, pushing: list[int]) -> str:
    """The line of one kind of rows and number of SMs."""
    given = inputs(*KINDS[kind])
    domain = VirtualDomain(RANKS, num_sms=sms, heap_bytes=1 << 30)
    calls = ExpandedDomain(
        domain,
        given,
        EXPERTS,
        capacities=expanded_rows(given),
        room=RANKS * TOKENS,
        alignment=ALIGNMENT,
        column_major=True,
        worst=RANKS * TOKENS,
    )
    received = [RANKS * TOKENS] * RANKS

    def behind() -> None:
        calls.launch(spreads=False)
        calls.spread_behind(received)

    def finished() -> None:
        calls.launch(spreads=False)
        calls.finish_behind(received)

    def copies() -> None:
        for stream, mine in zip(domain.streams, calls.ranks, strict=True):
            to = mine.expanded.x
            source = copied[: to.numel()]
            num_bytes = to.numel() * to.element_size()
            _cuda.copy(source.data_ptr(), to.data_ptr(), num_bytes, sms, stream.cuda_stream)

    copied = torch.empty_like(max((mine.expanded.x for mine in calls.ranks), key=len)).flatten()
    tried = {
        "one kernel": calls.launch,
        **{f"{n} pushing": (lambda n=n: calls.launch(pushing=n)) for n in pushing if n < sms},
        "pass, rows": behind,
        "pass, all": finished,
        "pass, all, of one rank alone": lambda: calls.finish_behind(received[:1]),
        "no rows spread": lambda: calls.launch(spreads=False),
        "copy": copies,
    }
    times = {name: measure(domain, run) for name, run in tried.items()}
    for endpoint in domain.endpoints:
        fault = endpoint.take_fault(torch.cuda.current_stream().cuda_stream)
        assert fault is None, fault
    return f"{kind}, {sms} SMs a rank: " + ", ".join(f"{name} {time}" for name, time in times.items())


def main() -> None:
    """Prints a line for each kind of rows and number of SMs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sms", default="24,64", help="of a rank")
    parser.add_argument("--kinds", default=",".join(KINDS), help=", ".join(KINDS))
    parser.add_argument("--pushing", default="", help="numbers of SMs")
    asked = parser.parse_args()
    pushing = [int(n) for n in asked.pushing.split(",") if n]
    for kind in asked.kinds.split(","):
        for sms in asked.sms.split(","):
            print(measure_kind(kind, int(sms), pushing), flush=True)


if __name__ == "__main__":
    main()
