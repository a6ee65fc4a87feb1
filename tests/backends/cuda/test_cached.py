"""Cached dispatches like one before go a shorter way (cached.py): the results are the same,
and what is not alike does not go it.
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


class Memory:
    """Stands for symmetric memory whose pool is ordinary memory. overflow: bytes of its overflow area."""

    def __init__(self, overflow: int = 1 << 30) -> None:
        self.pool, self.overflow, self.is_full = self, SimpleNamespace(num_bytes=overflow), False
        self.launched: list[tuple[Any, ...]] = []
        domain = SimpleNamespace(dispatch_cached=lambda *call: self.launched.append(call))
        self.endpoint = SimpleNamespace(domain=domain, prepare_cached=self.prepare)
        self.prepared: list[tuple[Any, ...]] = []

    def prepare(self, x: Any, scales: Any, split: Any, capacity: int, plan: Any, payload: int) -> int:
        """Replaces preparation by a name: what is launched says which it was."""
        of_scales = None if scales is None else (scales.dtype, scales.shape[1], scales.stride())
        self.prepared.append((x.shape, x.dtype, of_scales, split, capacity, plan, payload))
        return len(self.prepared) - 1

    def acquire(self, spec: Any, capacity: int, is_guess: bool, stream: int) -> Any:
        return spec.of([torch.empty_like(t) for t in spec.templates(capacity, torch.device("cpu"))])

    def acquire_now(self, arrays: list[torch.Tensor], stream: int) -> list[torch.Tensor] | None:
        return None if self.is_full else [torch.empty_like(t) for t in arrays]


class Engine:
    """As much of an engine as cached dispatches ask: it launches nothing, on CPU tensors."""

    info = SimpleNamespace(num_ranks=2, rank=0)
    index, device, sms = -1, torch.device("cpu"), 132

    def __init__(self) -> None:
        self.issuing = threading.RLock()
        self.unsettled = self.is_faulty = self.capturing = False
        self.stream = 7
        self.symmetric = Memory()

    def has_fault(self) -> bool:
        return self.is_faulty

    def route(self, num_rows: int = 90, most_rows: int = 100) -> Any:
        """Of a dispatch of TOKENS tokens."""
        from deepep.backends.cuda.launch import Plan
        from deepep.runtime.requests import Route

        plan = Plan(torch.zeros((TOKENS + 2, 2), dtype=torch.int32), TOKENS, num_rows, 3, stream=7)
        plan.most_rows = most_rows
        is_token_in_rank = torch.ones((TOKENS, 2), dtype=torch.bool)
        return Route(self, TOKENS, 8, is_token_in_rank, num_rows, plan)  # type: ignore[arg-type]

    def usual(self, x: torch.Tensor, scales: Any, route: Any, num_sms: int) -> Any:
        """A dispatch along a route, the usual way."""
        from deepep.backends.cuda.cached import cached
        from deepep.runtime.requests import DispatchRequest, Schedule

        request = DispatchRequest(x, scales, route=route, num_sms=num_sms)
        return cached(self, request, route, Schedule(), False)  # type: ignore[arg-type]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")
    from deepep.runtime import streams

    made = Engine()
    monkeypatch.setattr(streams, "current_address", lambda index: made.stream)
    monkeypatch.setattr(streams, "current", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_only_what_is_alike_is_taken_for_it(engine: Engine) -> None:
    x = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
    rows = torch.zeros((TOKENS, HIDDEN), dtype=torch.uint8)
    scales = torch.zeros((TOKENS, 2))

    def cached_of(x: torch.Tensor, scales: torch.Tensor | None) -> Any:
        route = engine.route()
        engine.usual(x, scales, route, 24)
        return route.cached

    plain, scaled = cached_of(x, None), cached_of(rows, scales)
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
        assert plain.launch(given, None, 24) is None
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


def test_what_stands_in_the_way_of_a_launch(engine: Engine) -> None:
    """Calls that go the short way: those that nothing is to be done or raised before."""
    route = engine.route()
    x = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)

    def is_quick() -> bool:
        launched = engine.symmetric.launched
        before = len(launched)
        rows = None if route.cached is None else route.cached.launch(x, None, 24)
        assert len(launched) - before == (rows is not None)
        assert rows is None or rows.shape == (90, HIDDEN)
        return rows is not None

    assert not is_quick()
    engine.symmetric = Memory(overflow=90 * HIDDEN)
    engine.usual(x, None, route, 24)
    assert not is_quick(), "the overflow area is to grow first"
    engine.symmetric = Memory()
    engine.usual(x, None, route, 24)
    assert is_quick()
    launched = engine.symmetric.launched
    assert launched[-1][0] is launched[-2][0], "the kernel gets the same arguments"

    for name in ("unsettled", "is_faulty"):
        setattr(engine, name, True)
        assert not is_quick(), name
        setattr(engine, name, False)
    engine.stream = 8
    assert not is_quick(), "what the handle owns is to be recorded on another stream"
    engine.stream, engine.capturing = 7, True
    assert not is_quick()
    engine.capturing, engine.symmetric.is_full = False, True
    assert not is_quick()
    engine.symmetric.is_full = False
    assert is_quick()
    engine.symmetric = Memory()  # built anew
    assert not is_quick()
    engine.usual(x, None, route, 24)
    assert is_quick()


def test_nothing_old_is_launched(engine: Engine) -> None:
    """Arguments of such dispatches are prepared once along a route, and anew whenever any differs."""
    from deepep.backends.cuda.sm_split import dispatch_split

    memory = engine.symmetric
    plain = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
    bytes_ = torch.zeros((TOKENS, HIDDEN), dtype=torch.uint8)

    def scales(columns: int, wide: int = 0) -> torch.Tensor:
        """The first columns of `wide` where that is given: the same strides for any number."""
        return torch.zeros((TOKENS, wide or columns))[:, :columns]

    def launch(route: Any, x: torch.Tensor, s: torch.Tensor | None, sms: int = 24) -> None:
        got = engine.usual(x, s, route, sms)
        call, x_at, scales_at, to_x, to_scales, stream = memory.launched[-1]
        assert (x_at, stream) == (x.data_ptr(), 7)
        assert scales_at == (0 if s is None else s.data_ptr())
        assert to_x == got.x.data_ptr()
        assert to_scales == (0 if got.scales is None else got.scales.data_ptr())
        of_scales = None if s is None else (s.dtype, s.shape[1], s.stride())
        split, capacity = dispatch_split(sms, 2), max(64, route.plan.most_rows)
        assert memory.prepared[call] == (x.shape, x.dtype, of_scales, split, capacity, route.plan, 0)

    few, more = engine.route(), engine.route(most_rows=101)
    calls: list[tuple[Any, ...]] = [
        (few, plain, None),
        (more, plain, None),
        (few, bytes_, scales(28, wide=56)),
        (few, bytes_, scales(56)),  # the same strides, other columns
        (few, bytes_, scales(14).t().contiguous().t()),
        (few, bytes_, scales(28).t().contiguous().t()),  # likewise
        (few, plain[:, :64].contiguous(), None),
        (few, plain.float(), None),
        (few, plain, None, 8),
        (few, plain, None, 1),
    ]
    for call in calls:
        before = len(memory.prepared)
        launch(*call)
        assert len(memory.prepared) == before + 1
        launch(*call)
        assert len(memory.prepared) == before + 1, "the same again is prepared no more"
    for call in reversed(calls):
        launch(*call)


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
        from deepep.backends.cuda.cached import CachedDispatch

        quick, again = [0], CachedDispatch.launch

        def counted(*given: Any) -> Any:
            done = again(*given)
            quick[0] += done is not None
            return done

        CachedDispatch.launch = counted  # type: ignore[method-assign]
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
        CachedDispatch.launch = again  # type: ignore[method-assign]
        torch.cuda.synchronize()
        buffer.destroy()
        return quick[0], calls

    for quick, calls in pair.run(call):
        assert calls // 4 < quick < calls
