"""One rank of several domains on GPUs in low latency, as tests/backends/cuda/test_domains.py starts it.

Arguments: the number of calls, the ranks of a domain, and what is tried:
    equal    every call has the bits of the reference backend, on the CPU
    many     calls in a row without a wait of the host; each has the bits that the reference had
    graph    the same of captured calls, each a graph, replayed by turns
    silent   a NIC falls silent: PeerTimeoutError has to come, and the context to live
    exact    as "equal", with the row of each entry going back
    domain   as "equal", in two levels, without hooks
Says how many bytes had to cross to each rank: "crossed: " and a list, by rank.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from harness import far_calls

import deepep
from deepep import Buffer

#: Calls that are made again and again: of each format, hooked or not, with and without weights and groups.
SEEDS = 12
TIMEOUTS = {"exact": 20.0, "domain": 20.0, "equal": 20.0, "many": 20.0, "graph": 20.0, "silent": 5.0}


def main() -> None:
    count, per_domain, tried = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", rank=rank, world_size=size)
    kept: dict[str, Any] = {
        "low_latency_mode": True,
        "ranks_per_domain": per_domain,
        "explicitly_destroy": True,
        "reduction": tried if tried in ("exact", "domain") else "expert_rank",
    }
    experts = far_calls.LOCAL_EXPERTS * size
    room = Buffer.get_low_latency_rdma_size_hint(
        *(far_calls.MOST, far_calls.HIDDEN, size, experts),
        ranks_per_domain=per_domain,
        reduction=kept["reduction"],
        num_topk=far_calls.TOPK,
    )
    buffer = Buffer(
        dist.group.WORLD, 0, room, backend="cuda", symmetric_bytes=64 << 20, timeout=TIMEOUTS[tried], **kept
    )
    reference = Buffer(dist.group.WORLD, backend="reference", device="cpu", timeout=60.0, **kept)
    calls = [far_calls.draw(seed, rank, size, per_domain) for seed in range(min(count, SEEDS))]
    if tried == "domain":
        calls = [replace(call, is_hooked=False) for call in calls]
    wanted = [far_calls.play(reference, far_calls.Given.of(call, "cpu")) for call in calls]
    given = [far_calls.Given.of(call, "cuda") for call in calls]
    # torch asks CUDA for memory now: not while a kernel waits for the wire, whose copies would wait as well.
    room = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (64 << 20, *[1 << 19] * 64)]
    del room
    if tried == "silent":
        fall_silent(buffer, given, count)
    made = count if tried in ("many", "graph") else len(calls)
    if tried == "many":
        many(buffer, given, wanted, count)
    elif tried == "graph":
        graph(buffer, given, wanted, count)
    else:
        for call, one, theirs in zip(calls, given, wanted, strict=True):
            outputs = far_calls.play(buffer, one)
            torch.cuda.synchronize()
            for number, (got, want) in enumerate(zip(outputs, theirs, strict=True)):
                assert torch.equal(got.cpu(), want), f"{call.form}, output {number}: {got.shape}"
    crossed = [
        sum(call.bytes_to(peer) for call in itertools.islice(itertools.cycle(calls), made))
        for peer in range(size)
    ]
    if kept["reduction"] == "expert_rank":
        print("crossed:", crossed, flush=True)
    buffer.destroy()
    reference.destroy()
    print("equal", flush=True)


def many(buffer: Buffer, given: list[Any], wanted: list[list[torch.Tensor]], count: int) -> None:
    """Compares on the device; a difference is counted and found out at the end."""
    right = [[one.to("cuda") for one in outputs] for outputs in wanted]
    wrong = torch.zeros(len(given), dtype=torch.int64, device="cuda")
    for number in range(count):
        at = number % len(given)
        for got, want in zip(far_calls.play(buffer, given[at]), right[at], strict=True):
            wrong[at] += (got != want).any()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0] * len(given)


def graph(buffer: Buffer, given: list[Any], wanted: list[list[torch.Tensor]], count: int) -> None:
    """Each call once as it is, then by replays."""
    kept = []
    for one in given:
        far_calls.play(buffer, one)
    for one in given:
        captured = torch.cuda.CUDAGraph()
        # The wire's thread copies meanwhile.
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            made = far_calls.play(buffer, one)
        kept.append((captured, made))
    for number in range(len(given), count):
        captured, made = kept[number % len(given)]
        captured.replay()
        torch.cuda.synchronize()
        for got, want in zip(made, wanted[number % len(given)], strict=True):
            assert torch.equal(got.cpu(), want), number
            got.zero_()


def fall_silent(buffer: Buffer, given: list[Any], count: int) -> None:
    try:
        for number in range(count):
            far_calls.play(buffer, given[number % len(given)])
            torch.cuda.synchronize()
    except deepep.PeerTimeoutError as error:
        print("timed out:", error, flush=True)
    else:
        raise AssertionError("no rank was missed")
    assert torch.zeros(1, device="cuda").item() == 0
    os._exit(0)  # NVSHMEM's end would wait for those whose NIC is silent


if __name__ == "__main__":
    main()
