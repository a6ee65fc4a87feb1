"""Cached dispatches like one before go a shorter way (cached.py): the results are the same, and
what is not alike does not go it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.device_calls import dispatch, draw_on_device, laid_out, same_bits

from deepep.sim import World

TOKENS, HIDDEN = 200, 256


def test_only_what_is_alike_is_taken_for_it() -> None:
    pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")
    from deepep.backends.cuda.cached import Repeat

    x = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
    rows = torch.zeros((TOKENS, HIDDEN), dtype=torch.uint8)
    scales = torch.zeros((TOKENS, 2))
    nothing: Any = None

    def repeat_of(x: torch.Tensor, scales: torch.Tensor | None) -> Repeat:
        of_scales = None if scales is None else (scales.dtype, scales.shape, scales.stride())
        return Repeat(-1, x.shape, x.dtype, of_scales, 24, [], nothing, nothing)

    plain, scaled = repeat_of(x, None), repeat_of(rows, scales)
    assert plain.addresses(x, None, 24) == (x.data_ptr(), 0)
    assert scaled.addresses(rows, scales, 24) == (rows.data_ptr(), scales.data_ptr())
    other = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
    assert plain.addresses(other, None, 24) == (other.data_ptr(), 0)

    wide = torch.zeros((TOKENS, 2 * HIDDEN), dtype=torch.bfloat16)
    odd = torch.zeros(TOKENS * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(TOKENS, HIDDEN)
    unlike: list[Any] = [
        x[1:],
        x.half(),
        wide[:, :HIDDEN],
        wide,
        odd,
        x.view(-1),
        None,
        (x, scales),
    ]
    for given in unlike:
        assert plain.addresses(given, None, 24) is None
    assert plain.addresses(torch.nn.Parameter(x), None, 24) is None
    assert plain.addresses(x, scales, 24) is None
    assert plain.addresses(x, None, 8) is None
    for given in (
        None,
        scales[:, :1],
        scales.int(),
        laid_out(scales, "column"),
        laid_out(scales, "padded"),
        3,
    ):
        assert scaled.addresses(rows, given, 24) is None
    assert scaled.addresses(rows.view(torch.int8), scales, 24) is None


class Memory:
    """Stands for symmetric memory whose pool is ordinary memory. overflow: bytes of its overflow area."""

    def __init__(self, overflow: int = 1 << 30) -> None:
        self.pool, self.overflow, self.is_full = self, SimpleNamespace(num_bytes=overflow), False

    def acquire(self, spec: Any, capacity: int, is_guess: bool, stream: int) -> Any:
        return spec.of([torch.empty_like(t) for t in spec.templates(capacity, torch.device("cpu"))])

    def acquire_now(self, arrays: list[torch.Tensor], stream: int) -> list[torch.Tensor] | None:
        return None if self.is_full else [torch.empty_like(t) for t in arrays]


def test_what_stands_in_the_shorter_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that launches nothing, on CPU tensors: which calls it takes for repeated ones."""
    pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")
    from deepep.backends.cuda import engine as cuda_engine
    from deepep.backends.cuda import launch as nvlink
    from deepep.runtime.requests import DispatchRequest, Route, Schedule

    now = SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(cuda_engine.streams, "current_address", lambda index: now.stream)
    monkeypatch.setattr(cuda_engine.streams, "current", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    launched: list[tuple[Any, ...]] = []
    domain = SimpleNamespace(dispatch_cached=lambda *call: launched.append(call), has_fault=lambda: False)
    endpoint = nvlink.Endpoint.__new__(nvlink.Endpoint)
    endpoint.live, endpoint._domain = 3, domain  # type: ignore[assignment]
    engine: Any = cuda_engine.CudaEngine.__new__(cuda_engine.CudaEngine)
    engine._conductor = SimpleNamespace(issuing=threading.RLock())
    engine.info = SimpleNamespace(num_ranks=2, rank=0)
    engine._index, engine._device, engine._sms = -1, torch.device("cpu"), 132
    engine._stale = engine._refused = False
    engine._fault, engine._endpoint, engine._memory = None, endpoint, Memory()

    table = torch.zeros((TOKENS + 2, 2), dtype=torch.int32)
    plan = cuda_engine.NvlinkPlan(nvlink.Plan(table, TOKENS, 90, 3), 90, None, stream=7)
    plan.most_rows = 100
    route = Route(engine, TOKENS, 8, torch.ones((TOKENS, 2), dtype=torch.bool), 90, plan)
    x = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)

    def usual() -> None:
        engine._cached(DispatchRequest(x, route=route, num_sms=24), route, plan, Schedule(), False)

    def is_quick() -> bool:
        before = len(launched)
        rows = engine.dispatch_again(x, None, route, 24)
        assert len(launched) - before == (rows is not None)
        assert rows is None or rows.shape == (90, HIDDEN)
        return rows is not None

    assert not is_quick()
    engine._memory = Memory(overflow=90 * HIDDEN)
    usual()
    assert not is_quick(), "the overflow area is to grow first"
    engine._memory = Memory()
    usual()
    assert is_quick()
    assert launched[-1][0] is launched[-2][0], "the kernel is told the same"

    for name in ("_stale", "_refused", "_fault"):
        setattr(engine, name, True)
        assert not is_quick(), name
        setattr(engine, name, None)
    now.stream = 8
    assert not is_quick(), "what the handle owns is to be recorded on another stream"
    now.stream, now.capturing = 7, True
    assert not is_quick()
    now.capturing, engine._memory.is_full = False, True
    assert not is_quick()
    engine._memory.is_full = False
    assert is_quick()
    engine._memory = Memory()  # built anew
    assert not is_quick()
    usual()
    assert is_quick()


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


@pytest.mark.gpu
def test_repeated_calls_are_right(pair: World) -> None:
    """Calls of many specs in random order along two handles, on two streams; some results are kept."""

    def call(ctx: Any) -> tuple[int, int]:
        import deepep
        from deepep import Buffer

        buffer: Any = deepep.Buffer(ctx.group, timeout=20.0)
        engine = buffer.runtime
        quick, again = [0], engine.dispatch_again

        def counted(*given: Any) -> Any:
            done = again(*given)
            quick[0] += done is not None
            return done

        engine.dispatch_again = counted
        handles = [dispatch(buffer, draw_on_device(s, ctx.rank, TOKENS, ctx.device))[4] for s in range(2)]
        chance = torch.Generator().manual_seed(5)

        def pick(*choices: Any) -> Any:
            return choices[int(torch.randint(0, len(choices), (1,), generator=chance))]

        def values(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            of_rank = torch.Generator().manual_seed(1000 * step + rank)
            bits = torch.randint(0, 256, (TOKENS, 2 * HIDDEN), generator=of_rank, dtype=torch.uint8)
            return bits.cuda(), torch.rand((TOKENS, 2), generator=of_rank).cuda()

        def arrived(handle: Any, of_ranks: list[torch.Tensor]) -> torch.Tensor:
            """The rows that come here, if rank r sends of_ranks[r]."""
            first = int(handle[0][0, ctx.rank])
            source = handle[3].long()
            return torch.cat([of_ranks[0][source[:first]], of_ranks[1][source[first:]]])

        side = torch.cuda.Stream()
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        calls = 150
        for step in range(calls):
            if step == 0 or pick(True, False, False, False):
                handle, layout = pick(*handles), pick(None, None, "row", "column", "padded")
                Buffer.set_num_sms(pick(24, 8))
            stream = pick(*[torch.cuda.current_stream()] * 4, side)
            early, keeps = pick(False, False, False, True), pick(False, False, True)
            given = [values(step, rank) for rank in range(2)]
            if layout is None:
                rows: Any = [bits.view(torch.bfloat16) for bits, _ in given]
            else:
                rows = [bits[:, :HIDDEN].contiguous() for bits, _ in given]
            mine = (
                rows[ctx.rank] if layout is None else (rows[ctx.rank], laid_out(given[ctx.rank][1], layout))
            )
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got, *_, event = buffer.dispatch(mine, handle=handle, async_finish=early)
                if early:
                    event.current_stream_wait()
            torch.cuda.current_stream().wait_stream(side)
            recv_x, recv_scales = (got, None) if layout is None else got
            want = arrived(handle, rows)
            assert same_bits(recv_x, want), step
            if recv_scales is not None:
                assert same_bits(recv_scales, arrived(handle, [scales for _, scales in given])), step
            if keeps:
                kept.append((recv_x, want))
            for now, then in kept:
                assert same_bits(now, then), step
            del kept[:-6]
            if step % 50 == 49:  # what is wrong is said as ever, and nothing is out of step after it
                with pytest.raises(deepep.LayoutError):
                    buffer.dispatch(
                        given[ctx.rank][0].view(torch.bfloat16).t().contiguous().t(), handle=handle
                    )
        Buffer.set_num_sms(24)
        torch.cuda.synchronize()
        buffer.destroy()
        return quick[0], calls

    for quick, calls in pair.run(call):
        assert calls // 4 < quick < calls
