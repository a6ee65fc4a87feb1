"""Times of dispatches of two virtual ranks into the expanded layout: one kernel, or a pass behind a dispatch.

    PYTHONPATH=tests python -m harness.expanded_times

Events around both ranks' launches, L2 flushed, median (90th percentile) of 30, microseconds. No link is in
it, and both ranks share one memory. The pass is the sort and the spreading of the rows alone, without scales.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from deepep.reference.elastic import ElasticInput
from harness.expanded_ranks import ExpandedDomain
from harness.virtual_ranks import VirtualDomain

TOKENS, TOPK, EXPERTS, ALIGNMENT, ROUNDS = 4096, 8, 256, 128, 30


def inputs(num_bytes: int, num_scales: int) -> list[ElasticInput]:
    """Uniform routing of two ranks' tokens; rows of so many bytes."""
    made = []
    for _ in range(2):
        idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK, 1).indices
        x = torch.randint(0, 256, (TOKENS, num_bytes), dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        scales = torch.rand(TOKENS, num_scales, device="cuda") if num_scales else None
        made.append(ElasticInput(x, idx, torch.rand(TOKENS, TOPK, device="cuda"), scales))
    return made


def measure(domain: VirtualDomain, run: Callable[[], None]) -> str:
    """Median and 90th percentile of `run`'s time, from before both ranks' launches to behind them."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(ROUNDS + 5):
        flush.fill_(i)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # both ranks' launches are queued when it ends
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


def main() -> None:
    """Prints a line for each kind of rows and number of SMs."""
    kinds = (("BF16", 14336, 0), ("FP8", 7168, 56), ("FP8 without its scales", 7168, 0))
    for name, num_bytes, num_scales in kinds:
        for sms in (24, 48, 64):
            given = inputs(num_bytes, num_scales)
            domain = VirtualDomain(2, num_sms=sms, heap_bytes=1 << 30)
            calls = ExpandedDomain(
                domain,
                given,
                EXPERTS,
                capacities=[TOKENS * TOPK * 5 // 4 + ALIGNMENT * EXPERTS // 2] * 2,
                room=2 * TOKENS,
                alignment=ALIGNMENT,
                column_major=True,
                worst=2 * TOKENS,
            )

            def behind(calls: ExpandedDomain = calls) -> None:
                calls.launch(spreads=False)
                calls.spread_behind([2 * TOKENS] * 2)

            def alone(calls: ExpandedDomain = calls) -> None:
                calls.launch(spreads=False)

            fused, pass_behind, plain = (measure(domain, run) for run in (calls.launch, behind, alone))
            for endpoint in domain.endpoints:
                fault = endpoint.take_fault(torch.cuda.current_stream().cuda_stream)
                assert fault is None, fault
            print(
                f"{name}, {sms} SMs a rank: one kernel {fused}, a pass {pass_behind}, no rows spread {plain}"
            )


if __name__ == "__main__":
    main()
