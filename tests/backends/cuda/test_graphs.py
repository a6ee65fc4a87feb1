"""CUDA graphs of dispatch, an expert stand-in and combine, of two processes: replayed with new inputs, among
eager calls of the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness.device_calls import Given, dispatch, draw_on_device, expected, on_device, same_bits

from deepep.sim import World

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, REPLAYS = 256, 7168, 100


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    import deepep

    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = deepep.Buffer(ctx.group, timeout=20.0)
    assert ctx.scratch["buffer"].runtime.info.backend == "cuda"
    return ctx.scratch["buffer"]


class Captured:
    """A step on inputs that stay where they are, to be captured, replayed or called."""

    def __init__(self, buffer: Any, first: Given, step: Callable[[Any, Given], Any]) -> None:
        self._buffer = buffer
        self._held = Given(first.x.clone(), first.idx.clone(), first.weights.clone(), first.num_experts)
        self._step = step
        self._graph = torch.cuda.CUDAGraph()
        self._out: Any = None

    def eager(self, given: Given) -> list[torch.Tensor]:
        """The step's results, called."""
        self._take(given)
        return [t.clone() for t in self._step(self._buffer, self._held)]

    def capture(self) -> None:
        """Captures the step."""
        with torch.cuda.graph(self._graph):
            self._out = self._step(self._buffer, self._held)

    def replay(self, given: Given) -> list[torch.Tensor]:
        """The step's results, replayed; they stay where they are until the next replay."""
        self._take(given)
        self._graph.replay()
        return list(self._out)

    def _take(self, given: Given) -> None:
        self._held.x.copy_(given.x)
        self._held.idx.copy_(given.idx)
        self._held.weights.copy_(given.weights)


def there_and_back(buffer: Any, given: Given) -> list[torch.Tensor]:
    """Layout, dispatch, twice the rows, combine: (sums, returned weights, indices received)."""
    rows, idx, weights, _, handle, _ = dispatch(buffer, given, num_worst_tokens=2 * TOKENS)
    sums, returned, _ = buffer.combine(rows * 2, handle, topk_weights=weights)
    return [sums, returned, idx]


def with_a_second_layer(buffer: Any, given: Given) -> list[torch.Tensor]:
    """A training step: forward, then the backward's cached dispatch and its combine, asynchronous."""
    rows, _, _, _, handle, event = dispatch(buffer, given, num_worst_tokens=2 * TOKENS, async_finish=True)
    event.current_stream_wait()
    sums, _, event = buffer.combine(rows * 2, handle, bias=given.x, async_finish=True)
    event.current_stream_wait()
    again, *_ = buffer.dispatch(sums, handle=handle)
    back, *_ = buffer.combine(again * 0.5, handle)
    return [sums, back]


@pytest.mark.parametrize("step", [there_and_back, with_a_second_layer], ids=lambda step: step.__name__)
def test_replays_among_eager_calls(pair: World, step: Any) -> None:
    """100 replays with 100 inputs; then eager calls; then replays and eager calls in turn."""

    def run(ctx: Any, step: Any, captured: Any, sizes: tuple[int, int, int]) -> None:
        tokens, hidden, replays = sizes
        buffer = buffer_of(ctx)

        def given(seed: int, rank: int = ctx.rank) -> Given:
            return draw_on_device(seed, rank, tokens, ctx.device, hidden=hidden)

        subject = captured(buffer, given(0), step)
        wanted = [subject.eager(given(seed)) for seed in range(replays)]
        assert not same_bits(wanted[0][0], wanted[1][0])
        subject.capture()

        def check(got: list[torch.Tensor], seed: int, how: str) -> None:
            torch.cuda.synchronize()
            for number, (a, b) in enumerate(zip(got, wanted[seed], strict=True)):
                if a.dtype == torch.int64:  # indices: all rows count, -1 past the last
                    assert torch.equal(a, b), f"{how}, input {seed}, result {number}"
                else:
                    assert same_bits(a, b), f"{how}, input {seed}, result {number}"

        for seed in range(replays):
            check(subject.replay(given(seed)), seed, "replay")
        for seed in range(5):
            check(subject.eager(given(seed)), seed, "eager after replays")
        for seed in range(replays - 1, replays - 21, -1):
            check(subject.replay(given(seed)), seed, "replay after eager calls")
            check(subject.eager(given(seed // 2)), seed // 2, "eager between replays")
        # Queued up, without waiting for the device in between: the last one's results are left.
        for seed in range(10):
            last = subject.replay(given(seed))
        check(last, 9, "replays in a row")
        kept = dispatch(buffer, given(1))[0]
        before = kept.clone()
        subject.replay(given(2))
        torch.cuda.synchronize()
        assert same_bits(kept, before), "a replay wrote to what an eager call had handed out"

    pair.run(run, step, Captured, (TOKENS, HIDDEN, REPLAYS))


def test_a_replay_gives_what_the_oracle_gives(pair: World) -> None:
    def run(ctx: Any, step: Any, captured: Any, sizes: tuple[int, int]) -> None:
        tokens, hidden = sizes
        buffer = buffer_of(ctx)
        inputs = [
            [draw_on_device(seed, rank, tokens, ctx.device, hidden=hidden) for rank in range(2)]
            for seed in range(4)
        ]
        subject = captured(buffer, inputs[0][ctx.rank], step)
        subject.eager(inputs[0][ctx.rank])
        subject.capture()
        for givens in inputs:
            sums = expected([on_device(given, torch.device("cpu")) for given in givens])[ctx.rank][1]
            got = subject.replay(givens[ctx.rank])
            torch.cuda.synchronize()
            assert same_bits(got[0], sums)

    pair.run(run, there_and_back, Captured, (TOKENS, HIDDEN))


def test_asking_a_stream_that_is_captured_spoils_nothing() -> None:
    """A dispatch that looks for memory asks the streams that read its slots,
    also while another thread captures.
    """
    from deepep.runtime import streams

    held = torch.zeros(4, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held.add_(1)
        assert not streams.is_idle(stream)
        streams.is_idle(torch.cuda.Stream())
        streams.is_idle(torch.cuda.default_stream())
    graph.replay()
    torch.cuda.synchronize()
    assert held.tolist() == [1.0] * 4
    assert streams.is_idle(stream)
