"""`Buffer` in low latency between domains on CUDA: memory, agreement, refusals, masks; on stubs, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.refusals import raised

from deepep import ArgumentError, Buffer, PeerTimeoutError, RangeError, layout
from deepep.sim import World

MOST, HIDDEN, EXPERTS = 8, 512, 12
X = torch.zeros(MOST, HIDDEN, dtype=torch.bfloat16)
IDX, WEIGHTS = torch.zeros(MOST, 2, dtype=torch.int64), torch.ones(MOST, 2)


def size_of(ranks: int, most: int = MOST) -> int:
    return Buffer.get_low_latency_rdma_size_hint(most, HIDDEN, ranks, EXPERTS, ranks_per_domain=1)


def in_processes(ranks: int, run: Callable[[Any, Any], None]) -> None:
    """Runs `run` on ranks of their own, with stubs that stay in their processes."""

    def begin(ctx: Any) -> None:
        from harness.stub_domains import Domains

        run(ctx, Domains(ctx))

    world = World(ranks)
    try:
        world.run(begin)
    finally:
        world.close()


def buffer_of(ctx: Any, size: int | None = None, per_domain: int = 1, **how: Any) -> Any:
    given = {"low_latency_mode": True, "timeout": 60.0, "symmetric_bytes": 1 << 20, **how}
    size = size_of(ctx.num_ranks) if size is None else size
    return Buffer(ctx.group, 0, size, backend="stub", device="cpu", ranks_per_domain=per_domain, **given)


def dispatch(buffer: Any, most: int = MOST, **how: Any) -> Any:
    return buffer.low_latency_dispatch(X, IDX, most, EXPERTS, **{"use_fp8": False, **how})


def test_memory_and_launches() -> None:
    """Heaps of the own domain, a part at the slab's end, whoever serves puts, and an SM for that."""

    def run(ctx: Any, domains: Any) -> None:
        size = Buffer.get_low_latency_rdma_size_hint(MOST, HIDDEN, 3, EXPERTS, ranks_per_domain=2)
        buffer = buffer_of(ctx, size, per_domain=2)
        assert buffer.info.operations["low-latency dispatch"] == "CUDA kernels, puts over NVSHMEM"
        assert buffer.info.memory["memory for puts"] == 0
        rows, _, handle, _, hook = dispatch(buffer, return_recv_hook=True)
        hook()
        given = domains.given
        near = ctx.rank // 2
        assert [heap != 0 for heap in given["heaps"]] == [r // 2 == near for r in range(3)]
        assert given["serve"] == 99
        assert given["pes"] == [0, 1, 2]
        assert domains.made[-1].live == 0b111
        whole, free = domains.slab()
        assert domains.part() == free[-1][1] >= whole - size - 256
        assert buffer.info.memory["memory for puts"] == size
        buffer.low_latency_combine(rows, IDX, WEIGHTS, handle)
        assert domains.since() == [
            "low_latency_dispatch send",
            "low_latency_dispatch receive",
            "low_latency_combine",
        ]
        for how in ({"use_fp8": True}, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}):
            dispatch(buffer, topk_weights=WEIGHTS, **how)
        assert len(domains.made) == 1  # there is room for all formats
        buffer.destroy()
        assert domains.slab()[1] == [(0, whole // 256 * 256)]

    in_processes(3, run)


def test_blocks_leave_an_sm() -> None:
    def run(ctx: Any, domains: Any) -> None:
        size = Buffer.get_low_latency_rdma_size_hint(512, HIDDEN, 2, EXPERTS, ranks_per_domain=1)
        with buffer_of(ctx, size) as buffer:
            dispatch(buffer, most=512)
            (form,) = buffer.runtime._low_latency.state.agreed.values()
            assert form.num_blocks == 131

    in_processes(2, run)


def test_what_has_no_room_is_refused_on_all_ranks() -> None:
    """Before and after there is memory, and the calls that have room go on."""

    def run(ctx: Any, domains: Any) -> None:
        size = size_of(ctx.num_ranks, 2 * MOST)
        with buffer_of(ctx, size) as buffer:
            kind, text, argument, _ = raised(lambda: dispatch(buffer, most=4 * MOST))
            assert (kind, argument) == ("CapacityError", "num_rdma_bytes")
            assert f"got {size}" in text
            assert "get_low_latency_rdma_size_hint" in text
            dispatch(buffer)
            first = domains.part()
            assert raised(lambda: dispatch(buffer, most=4 * MOST))[0] == "CapacityError"
            dispatch(buffer)
            assert len(domains.made) == 1
            dispatch(buffer, most=2 * MOST)  # made anew in the part that there is
            assert len(domains.made) == 2
            assert domains.part() == first
            buffer.release_memory()
            dispatch(buffer)
            assert len(domains.made) == 3
            assert domains.part() == first

    in_processes(2, run)


def test_what_is_not_there_is_refused_on_all_ranks() -> None:
    def run(ctx: Any, domains: Any) -> None:
        assert raised(lambda: buffer_of(ctx, 0))[::2] == ("CapacityError", "num_rdma_bytes")
        differs = raised(lambda: buffer_of(ctx, size_of(2) + 128 * ctx.rank))
        assert differs[::2] == ("MismatchError", "num_rdma_bytes")
        one_alone = raised(lambda: buffer_of(ctx, low_latency_mode=ctx.rank == 0))
        assert one_alone[::2] == ("MismatchError", "low_latency")

    in_processes(2, run)


def test_the_exact_mode_and_logfmt() -> None:
    """Memory has room for the row of each top-k entry."""

    def run(ctx: Any, domains: Any) -> None:
        sizes = {
            topk: Buffer.get_low_latency_rdma_size_hint(
                MOST, HIDDEN, 2, EXPERTS, ranks_per_domain=1, reduction="exact", num_topk=topk
            )
            for topk in (1, 2)
        }
        with buffer_of(ctx, sizes[1], reduction="exact") as buffer:
            assert raised(lambda: dispatch(buffer))[0] == "CapacityError"
        with buffer_of(ctx, sizes[2], reduction="exact") as buffer:
            for logfmt in (False, True, True):
                rows, _, handle, _, hook = dispatch(buffer, return_recv_hook=True)
                hook()
                buffer.low_latency_combine(rows, IDX, WEIGHTS, handle, use_logfmt=logfmt)
            assert domains.made[-1].given["shape"].entries == 1
        with buffer_of(ctx) as buffer:
            rows, _, handle, _, _ = dispatch(buffer)
            buffer.low_latency_combine(rows, IDX, WEIGHTS, handle, use_logfmt=True)
            assert domains.made[-1].given["shape"].entries == 0

    in_processes(2, run)


def test_two_levels() -> None:
    """Calls that have no way through gateways are refused for all ranks, before and after there is memory."""

    def run(ctx: Any, domains: Any) -> None:
        how = {"per_domain": 2, "reduction": "domain"}
        size = Buffer.get_low_latency_rdma_size_hint(
            MOST, HIDDEN, 4, EXPERTS, ranks_per_domain=2, reduction="domain"
        )
        assert raised(lambda: buffer_of(ctx, size, per_domain=3, reduction="domain"))[::2] == (
            "ModeError",
            "ranks_per_domain",
        )
        masks = raised(lambda: buffer_of(ctx, size, enable_shrink=True, **how))
        assert masks[::2] == ("ModeError", "enable_shrink")
        with buffer_of(ctx, size, **how) as buffer:
            for refused in ([], ["low_latency_dispatch refused"]):
                domains.since()
                hooked = raised(lambda: dispatch(buffer, return_recv_hook=True))
                assert hooked[::2] == ("ModeError", "return_recv_hook")
                assert domains.since() == refused
                rows, _, handle, _, _ = dispatch(buffer)
            assert domains.made[-1].given["shape"].has_gateways
            assert handle[-1] is not None
            domains.since()
            for extra, name in (
                ({"use_logfmt": True}, "use_logfmt"),
                ({"return_recv_hook": True}, "return_recv_hook"),
            ):
                wrong = raised(
                    lambda extra=extra: buffer.low_latency_combine(rows, IDX, WEIGHTS, handle, **extra)
                )
                assert wrong[::2] == ("ModeError", name)
                assert domains.since() == ["low_latency_combine refused"]
            buffer.low_latency_combine(rows, IDX, WEIGHTS, handle)

    in_processes(4, run)


def test_each_generation_has_another_part_where_ranks_are_masked() -> None:
    """A put of a rank that is masked may still be on its way."""

    def run(ctx: Any, domains: Any) -> None:
        buffer = buffer_of(ctx, enable_shrink=True)
        dispatch(buffer)
        torch.distributed.barrier()
        if ctx.rank == 2:
            torch.distributed.barrier()
            buffer.runtime.abandon()
            return
        parts = [domains.part()]
        for masked in (True, False, True):  # the third: cleaned, and masked again
            buffer.low_latency_update_mask_buffer(2, masked)
            if masked:
                dispatch(buffer)
                assert domains.made[-1].live == 0b011
                assert domains.given["pes"][2] == -1
                parts.append(domains.part())
        buffer.low_latency_update_mask_buffer(2, True)
        dispatch(buffer)
        parts.append(domains.part())
        assert len(set(parts[:3])) == 3
        assert parts[3] == parts[0]
        torch.distributed.barrier()
        buffer.runtime.abandon()

    in_processes(3, run)


def test_memory_that_graphs_put_from_is_not_used_again() -> None:
    """Then there is no room for larger calls, which all ranks learn, whoever captured."""

    def run(ctx: Any, domains: Any) -> None:
        with buffer_of(ctx, size_of(2, 2 * MOST)) as buffer:
            dispatch(buffer)
            domains.made[-1].captured = ctx.rank == 0
            for _ in range(2):
                assert raised(lambda: dispatch(buffer, most=2 * MOST))[0] == "CapacityError"

    in_processes(2, run)


def test_both_modes_of_a_buffer_have_memory() -> None:
    """The throughput mode's parts are at the slab's front."""

    def run(ctx: Any, domains: Any) -> None:
        with buffer_of(ctx, enable_shrink=True) as buffer:
            dispatch(buffer)
            buffer.runtime.endpoint()
            low, high = domains.part(), domains.slab()[1][0][0]
            assert high > 0
            assert low > high
            total = size_of(2) + high
            assert buffer.info.memory["memory for puts"] == pytest.approx(total, abs=256)

    in_processes(2, run)


def test_a_rank_that_is_missed_is_an_error_until_it_is_masked() -> None:
    def run(ctx: Any, domains: Any) -> None:
        from harness import stub_cuda

        buffer = buffer_of(ctx, enable_shrink=True)
        rows, _, handle, _, _ = dispatch(buffer)
        torch.distributed.barrier()
        if ctx.rank == 2:
            torch.distributed.barrier()
            buffer.runtime.abandon()
            return
        fault = stub_cuda.Fault(operation=4, phase=1, missing=0b100, expected=1, seen=0)
        domains.made[-1].faults.append(fault)
        for _ in range(2):
            with pytest.raises(PeerTimeoutError) as caught:
                buffer.low_latency_combine(rows, IDX, WEIGHTS, handle)
            assert caught.value.record.waited_on == (2,)
        buffer.low_latency_update_mask_buffer(2, True)
        buffer.low_latency_combine(rows, IDX, WEIGHTS, handle)
        assert domains.made[-1].live == 0b011
        torch.distributed.barrier()
        buffer.runtime.abandon()

    in_processes(3, run)


def test_the_hint_of_other_reductions() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint
    flat, exact, domain = (
        hint(128, 7168, 64, 256, ranks_per_domain=8, num_topk=8, reduction=reduction)
        for reduction in ("expert_rank", "exact", "domain")
    )
    assert 4 < exact / flat < 5  # 1 + 8 rows where there were 1 + 1
    assert flat / domain == pytest.approx(56 / 7, rel=0.02)  # stretches, as many as ranks or as other domains
    assert hint(128, 7168, 64, 256, ranks_per_domain=8, reduction="exact") > exact
    for given in ({"reduction": "none"}, {"num_topk": 0}, {"num_topk": 33}):
        with pytest.raises(RangeError):
            hint(128, 7168, 64, 256, ranks_per_domain=8, **given)
    with pytest.raises(ArgumentError, match="a divisor of num_ranks"):
        hint(128, 7168, 64, 256, ranks_per_domain=7, reduction="domain")


def test_the_hint() -> None:
    """The bytes that calls of any top-k need, and V1's number inside one domain."""
    hint, of_core = Buffer.get_low_latency_rdma_size_hint, layout.low_latency_nic_bytes
    assert round(of_core(128, 7168, 64, 256, 8, num_topk=8) / 1e6) == 833  # docs/low_latency.md
    assert hint(128, 7168, 16, 256, ranks_per_domain=16) == hint(128, 7168, 16, 256)
    assert of_core(128, 7168, 16, 256, 16) == of_core(128, 7168, 16, 256, 17) == 0
    for ranks, per_domain, hidden in [(2, 1, 7168), (32, 8, 4096), (32, 1, 4096), (5, 3, 5120)]:
        needed = hint(128, hidden, ranks, 2 * ranks, ranks_per_domain=per_domain)
        assert needed % 128 == 0
        assert needed <= hint(128, hidden, ranks, 2 * ranks), "V1's is enough"
        assert of_core(128, hidden, ranks, 2 * ranks, per_domain, 1) < needed
