"""Handles taken apart, saved entry by entry and put together again, as XTuner does; and edited ones."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import deepep

RANKS, LOCAL, TOPK, TOKENS, HIDDEN = 3, 2, 2, 7, 64
EXPERTS = RANKS * LOCAL
BAD = 1


def dispatched(buffer: Any, tokens: int = TOKENS, **options: Any) -> Any:
    made = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(tokens, HIDDEN, generator=made).bfloat16()
    idx = torch.rand(tokens, EXPERTS, generator=made).topk(TOPK).indices
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    weights = torch.rand(tokens, TOPK, generator=made)
    return x, buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights, **options)


def saved_for_backward(ctx: Any, buffer_of: Any, same_bits: Any) -> None:
    """XTuner's functions: the entries go to save_for_backward, `saved_tensors` is the handle."""
    buffer = buffer_of(ctx)

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            _, result = dispatched(buffer)
            context.save_for_backward(*result.handle)
            context.mark_non_differentiable(*(entry for entry in result.handle if entry is not None))
            return (result.recv_x.clone(), *result.handle)

        @staticmethod
        def backward(context: Any, grad: Any, *_: Any) -> Any:
            return buffer.combine(grad.contiguous(), context.saved_tensors)[0]

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, rows: Any, *handle: Any) -> Any:
            context.save_for_backward(*handle)
            return buffer.combine(rows, handle)[0]

        @staticmethod
        def backward(context: Any, grad: Any) -> Any:
            return buffer.dispatch(grad.contiguous(), handle=context.saved_tensors)[0], *([None] * 6)

    def offloaded(entry: torch.Tensor) -> torch.Tensor:
        return entry.clone()

    for hooks in (lambda t: t, offloaded):
        x, result = dispatched(buffer)
        wanted, again = buffer.combine(result.recv_x, result.handle)[0], buffer.dispatch(x, result.handle)[0]
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hooks, hooks):
            rows, *handle = Dispatch.apply(x)
            combined = Combine.apply(rows, *handle)
        assert same_bits(combined.detach(), wanted)
        combined.backward(x.detach())
        assert same_bits(x.grad, buffer.combine(again, result.handle)[0])


def test_entries_saved_for_a_backward(world_of: Any, buffer_of: Any, same_bits: Any) -> None:
    world_of(RANKS).run(saved_for_backward, buffer_of, same_bits)


def every_kind(ctx: Any, buffer_of: Any, same_bits: Any) -> None:
    buffer = buffer_of(ctx)
    for tokens, options in (
        (TOKENS, {}),
        (TOKENS * (ctx.rank != 1), {}),
        (0, {}),
        (TOKENS, {"num_worst_tokens": RANKS * TOKENS}),
        (TOKENS, {"num_worst_tokens": RANKS * TOKENS, "async_finish": True}),
    ):
        x, (rows, _, weights, _, handle, event) = dispatched(buffer, tokens, **options)
        entries = tuple(handle)  # before the event is waited for
        if event.event is not None:
            event.current_stream_wait()
        assert len(entries) == len(handle) == 6
        assert all(entry is again for entry, again in zip(entries, handle, strict=True))
        for rebuilt in (entries, list(entries)):
            for ours, theirs in (
                (buffer.combine(rows, handle, weights), buffer.combine(rows, rebuilt, weights)),
                (buffer.dispatch(x, handle), buffer.dispatch(x, rebuilt)),
            ):
                if ours[0].shape[0] == RANKS * TOKENS:  # what lies past the last row means nothing
                    assert ours[0].shape == theirs[0].shape
                    real = int(handle[0][-1, ctx.rank])
                    assert same_bits(ours[0][:real], theirs[0][:real])
                else:
                    assert same_bits(ours[0], theirs[0])


def test_rebuilt_handles_of_every_kind(world_of: Any, buffer_of: Any, same_bits: Any) -> None:
    world_of(RANKS).run(every_kind, buffer_of, same_bits)


def one(entries: tuple[Any, ...], index: int, entry: Any) -> tuple[Any, ...]:
    return tuple(entry if i == index else old for i, old in enumerate(entries))


EDITS: dict[str, tuple[Any, type[deepep.ArgumentError]]] = {
    "rows exchanged": (lambda h: one(h, 4, h[4].flip(0)), deepep.HandleError),
    "other counts": (lambda h: one(h, 0, h[0] + 1), deepep.HandleError),
    "other sources": (lambda h: one(h, 3, h[3].flip(0).clone()), deepep.HandleError),
    "more experts": (lambda h: one(h, 1, h[1] + torch.tensor([0, 3, 0, 0])), deepep.HandleError),
    "another buffer": (lambda h: one(h, 1, h[1] + torch.tensor([1, 0, 0, 0])), deepep.HandleError),
    "another seal": (lambda h: one(h, 1, h[1][:2]), deepep.HandleError),
    "a float seal": (lambda h: one(h, 1, h[1].float()), deepep.HandleError),
    "no seal": (lambda h: one(h, 1, None), deepep.ArgumentTypeError),
    "no table": (lambda h: one(h, 4, None), deepep.ArgumentTypeError),
    "a table of numbers": (lambda h: one(h, 4, h[4].tolist()), deepep.ArgumentTypeError),
    "a meta table": (lambda h: one(h, 4, h[4].to("meta")), deepep.ArgumentTypeError),
    "narrow": (lambda h: one(h, 0, h[0].short()), deepep.HandleError),
    "five": (lambda h: h[:5], deepep.ArgumentTypeError),
    "none at all": (lambda h: (None,) * 6, deepep.ArgumentTypeError),
    "a dictionary": (lambda h: dict(enumerate(h)), deepep.ArgumentTypeError),
}


def edited(ctx: Any, buffer_of: Any, edit: Any, operation: str) -> Any:
    buffer = buffer_of(ctx)
    x, (rows, *_, handle, _) = dispatched(buffer)
    given = edit(tuple(handle)) if ctx.rank == BAD else tuple(handle)
    try:
        buffer.combine(rows, given) if operation == "combine" else buffer.dispatch(x, given)
        outcome: Any = None
    except deepep.ArgumentError as error:
        outcome = type(error).__name__, error.argument[:6], error.rank
    dispatched(buffer)
    return outcome


@pytest.mark.parametrize("operation", ["combine", "dispatch"])
@pytest.mark.parametrize("name", EDITS)
def test_edited_handles_are_refused_everywhere(
    world_of: Any, buffer_of: Any, name: str, operation: str
) -> None:
    edit, kind = EDITS[name]
    outcomes = world_of(RANKS).run(edited, buffer_of, edit, operation)
    assert outcomes == [(kind.__name__, "handle", BAD)] * RANKS


def of_another_buffer(ctx: Any, buffer_of: Any) -> None:
    buffer = buffer_of(ctx)
    with deepep.Buffer(ctx.group, timeout=30.0) as other:
        _, (rows, *_, handle, _) = dispatched(other)
        with pytest.raises(deepep.HandleError, match="another buffer"):
            buffer.combine(rows, tuple(handle))


def of_another_decode_buffer(ctx: Any, buffer_of: Any) -> None:
    buffer = buffer_of(ctx)
    x, idx = torch.randn(4, 128).bfloat16(), torch.arange(8).view(4, 2) % EXPERTS
    other = deepep.Buffer(ctx.group, timeout=30.0, low_latency_mode=True)
    rows, _, handle, _, _ = other.low_latency_dispatch(x, idx, 8, EXPERTS, use_fp8=False)
    for alive in (True, False):
        with pytest.raises(deepep.HandleError, match="another buffer"):
            buffer.low_latency_combine(rows, idx, torch.ones(4, 2), tuple(handle))
        with pytest.raises(deepep.HandleError, match="another buffer"):
            buffer.get_next_low_latency_combine_buffer(tuple(handle))
        if alive:
            entries = tuple(handle)
            other.destroy()
            del other, handle
            gc.collect()
            handle = entries


def test_entries_of_another_buffers_handle(world_of: Any, buffer_of: Any) -> None:
    world_of(2).run(of_another_buffer, buffer_of)
    world_of(RANKS).run(of_another_decode_buffer, buffer_of)


def low_latency_parts(ctx: Any, buffer_of: Any, same_bits: Any) -> None:
    buffer = buffer_of(ctx)
    x, idx = torch.randn(4, 128).bfloat16(), torch.arange(8).view(4, 2) % EXPERTS
    weights = torch.ones(4, 2)
    outs = []
    for remade in (lambda h: h, tuple, lambda h: h._replace(hidden=h.hidden), list):
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, EXPERTS, use_fp8=False)
        outs.append(buffer.low_latency_combine(rows, idx, weights, remade(handle))[0])
    assert all(same_bits(out, outs[0]) for out in outs)


def test_low_latency_handles_put_together_again(world_of: Any, buffer_of: Any, same_bits: Any) -> None:
    world_of(RANKS).run(low_latency_parts, buffer_of, same_bits)


def edited_low_latency(ctx: Any, buffer_of: Any) -> list[Any]:
    buffer = buffer_of(ctx)
    x, idx = torch.randn(4, 128).bfloat16(), torch.arange(8).view(4, 2) % EXPERTS
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, EXPERTS, use_fp8=False)
    outcomes: list[Any] = []
    for index in (2, 3, 4):
        given = one(tuple(handle), index, 2 * handle[index]) if ctx.rank == BAD else tuple(handle)
        try:
            buffer.low_latency_combine(rows, idx, torch.ones(4, 2), given)
        except deepep.HandleError as error:
            outcomes.append((error.argument, error.rank))
    buffer.low_latency_combine(rows, idx, torch.ones(4, 2), list(handle))
    return outcomes


def test_other_numbers_than_the_dispatchs_are_refused(world_of: Any, buffer_of: Any) -> None:
    wanted = [(f"handle[{index}]", BAD) for index in (2, 3, 4)]
    assert world_of(RANKS).run(edited_low_latency, buffer_of) == [wanted] * RANKS


def forgotten(ctx: Any, buffer_of: Any) -> list[int]:
    """Number of facts kept, more than before: with three handles alive, and with none."""
    from deepep.api import rebuilt

    buffer = buffer_of(ctx)
    x, idx = torch.randn(4, 128).bfloat16(), torch.arange(8).view(4, 2) % EXPERTS
    gc.collect()
    before = len(rebuilt._kept)
    handles = [
        buffer.low_latency_dispatch(x, idx, 8, EXPERTS, use_fp8=False, return_recv_hook=hooked)[2:]
        for hooked in (False, False, True)
    ]
    handles[-1][-1]()
    entries = [tuple(handle) for handle, *_ in handles]
    del handles
    gc.collect()
    found = [len(rebuilt._kept) - before]
    del entries
    gc.collect()
    return [*found, len(rebuilt._kept) - before]


def test_what_is_kept_for_a_handle_ends_with_its_tensors(world_of: Any, buffer_of: Any) -> None:
    assert world_of(RANKS).run(forgotten, buffer_of) == [[3, 0]] * RANKS
