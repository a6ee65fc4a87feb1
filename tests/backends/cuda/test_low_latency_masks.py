"""Low-latency kernels that mask a missing rank, on GPUs: virtual ranks, graphs, a process that is killed."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.low_latency_trips import LowLatencyShape, bits, check_received, prepare

from deepep.sim import World

pytestmark = pytest.mark.gpu

SHAPE = LowLatencyShape((24, 30, 17), most=32, hidden=1024, topk=6, local_experts=8, pattern="distinct")
TIMEOUT = 0.5
GONE = 2


def virtual_ranks(shape: LowLatencyShape) -> Any:
    from harness.virtual_low_latency import VirtualLowLatency

    from deepep.backends.cuda.low_latency_launch import LowLatencyRoom

    stretches = shape.ranks if shape.exact else 0
    room = LowLatencyRoom(shape.local_experts, shape.num_max_tokens, shape.topk, shape.hidden, stretches)
    return VirtualLowLatency(shape.ranks, room, timeout=TIMEOUT, shrinks=True)


def form_of(shape: LowLatencyShape) -> Any:
    from deepep.backends.cuda.low_latency_launch import LowLatencyFormat

    return LowLatencyFormat(
        num_ranks=shape.ranks,
        num_local_experts=shape.local_experts,
        num_max_tokens=shape.num_max_tokens,
        num_topk=shape.topk,
        hidden=shape.hidden,
        index_dtype=shape.index_dtype,
        use_fp8=shape.fp8,
        with_weights=shape.with_weights,
        num_blocks=1,
        entry_stretches=shape.ranks if shape.exact else 0,
    )


def round_trip(virtual: Any, shape: LowLatencyShape, seed: int, ranks: tuple[int, ...], gone: str) -> None:
    """A round trip of `ranks`, judged by what each has masked. gone: "", or the last operation in which the
    rank that goes sends: "dispatch" or "combine".
    """
    from harness.virtual_low_latency import VirtualGiven

    case = prepare(shape, seed)
    given = [VirtualGiven(*(t.cuda() for t in inputs)) for inputs in case.inputs]
    sends = (*ranks, GONE) if gone else ranks
    hooked = shape.hooked or bool(gone)
    torch.cuda.synchronize()
    made = {r: virtual.dispatch_rank(r, form_of(shape), given[r], hooked=hooked) for r in sends}
    torch.cuda.synchronize()
    plans, rows = {}, {}
    for rank, (plan, out) in made.items():
        wanted = prepare(shape, seed, masked_by(virtual, rank))
        if rank in ranks:
            check_received(out, wanted.layouts[rank])
        plans[rank], rows[rank] = plan, wanted.rows[rank].cuda()
    sends = ranks if gone == "dispatch" else sends
    sums = {r: virtual.combine_rank(r, plans[r], rows[r], given[r], hooked=hooked) for r in sends}
    torch.cuda.synchronize()
    assert virtual.faults() == [None] * shape.ranks
    for rank in ranks:
        wanted = prepare(shape, seed, masked_by(virtual, rank))
        assert torch.equal(bits(sums[rank]), bits(wanted.sums[rank]))


def masked_by(virtual: Any, rank: int) -> tuple[int, ...]:
    word = int(virtual.endpoints[rank].masked_word())
    assert word == virtual.endpoints[rank].masked()
    return tuple(r for r in range(virtual.num_ranks) if word >> r & 1)


@pytest.mark.parametrize("gone", ["between", "dispatch", "combine"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_the_others_go_on(gone: str, fp8: bool, exact: bool, with_weights: bool) -> None:
    """A rank goes between calls, or once it has sent its dispatch or its combine."""
    shape = replace(SHAPE, fp8=fp8, exact=exact, with_weights=with_weights)
    virtual = virtual_ranks(shape)
    stay = tuple(r for r in range(shape.ranks) if r != GONE)
    round_trip(virtual, shape, 0, (0, 1, 2), "")
    if gone != "between":
        round_trip(virtual, shape, 1, stay, gone)
    round_trip(virtual, shape, 2, stay, "")
    assert [masked_by(virtual, rank) for rank in stay] == [(GONE,)] * 2
    for seed in range(3, 6):
        round_trip(virtual, shape, seed, stay, "")


def test_replayed_graphs_go_on() -> None:
    """Graphs captured before a rank was gone."""
    from harness.virtual_low_latency import VirtualGiven

    shape = replace(SHAPE, with_weights=True)
    virtual, form = virtual_ranks(shape), form_of(shape)
    case = prepare(shape, 7)
    given = [VirtualGiven(*(t.cuda() for t in inputs)) for inputs in case.inputs]
    rows = [r.cuda() for r in case.rows]
    graphs, sums = [], []
    for rank in range(shape.ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=virtual.streams[rank]):
            plan, _ = virtual.dispatch_rank(rank, form, given[rank])
            sums.append(virtual.combine_rank(rank, plan, rows[rank], given[rank]))
        graphs.append(graph)

    def replay(ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            with torch.cuda.stream(virtual.streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()

    replay((0, 1, 2))
    for rank in range(shape.ranks):
        assert torch.equal(bits(sums[rank]), bits(case.sums[rank]))
    wanted = prepare(shape, 7, (GONE,))
    for _ in range(3):
        replay((0, 1))
        for rank in (0, 1):
            assert torch.equal(bits(sums[rank]), bits(wanted.sums[rank]))
    assert [masked_by(virtual, rank) for rank in (0, 1)] == [(GONE,)] * 2
    assert virtual.faults() == [None] * shape.ranks
    round_trip(virtual, shape, 8, (0, 1), "")


# Processes


def serve(ctx: Any, rank: int, ranks: int, folder: str, dies_after: int) -> tuple[list[int], int]:
    """Decodes until a rank has been gone for some steps: the mask at the end, the steps made without it."""
    import deepep

    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store", ranks)
    os.environ["DEEPEP_DEVICE"] = "cuda"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    buffer = deepep.Buffer(dist.group.WORLD, low_latency_mode=True, enable_shrink=True, timeout=20.0)
    status = torch.zeros(ranks, dtype=torch.int32, device="cuda")
    without = 0
    for seed in range(dies_after + 6):
        if rank == GONE and seed == dies_after:
            torch.cuda.synchronize()
            Path(folder, "dying").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == dies_after:
            while not Path(folder, "dead").exists():
                time.sleep(0.002)
        # The last two are of another format: hosts have to agree on it.
        shape = replace(SHAPE, with_weights=seed < dies_after + 4)
        case = prepare(shape, seed)
        x, idx, weights = (t.cuda() for t in case.inputs[rank])
        received, count, handle, _, _ = buffer.low_latency_dispatch(
            *(x, idx, shape.num_max_tokens, shape.num_experts),
            use_fp8=False,
            topk_weights=weights if shape.with_weights else None,
        )
        buffer.low_latency_query_mask_buffer(status)
        masked = tuple(status.nonzero().flatten().tolist())
        wanted = prepare(shape, seed, masked)
        assert torch.equal(count.cpu(), wanted.layouts[rank].recv_count)
        for expert, n in enumerate(count.tolist()):
            assert torch.equal(bits(received[expert, :n]), bits(wanted.layouts[rank].recv_x[expert, :n]))
        sums, _, _ = buffer.low_latency_combine(wanted.rows[rank].cuda(), idx, weights, handle)
        assert torch.equal(bits(sums), bits(wanted.sums[rank]))
        without += bool(masked)
    assert buffer.info.masked_ranks == (GONE,)
    final = status.tolist()
    buffer.destroy()
    return final, without


def test_a_process_that_is_killed_is_masked_and_decoding_goes_on() -> None:
    with TemporaryDirectory(prefix="deepep-masks-", ignore_cleanup_errors=True) as folder:
        worlds = [World(1, timeout=180.0) for _ in range(3)]
        try:
            running = [
                world.submit(serve, rank, 3, folder, 3, timeout=150.0) for rank, world in enumerate(worlds)
            ]
            running[GONE].outcomes()
            Path(folder, "dead").touch()
            for rank in (0, 1):
                (outcome,) = running[rank].outcomes()
                assert outcome.ok, outcome.describe()
                assert outcome.value == ([0, 0, 1], 6)
        finally:
            for world in worlds:
                world.discard()
