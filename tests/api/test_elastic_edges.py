"""Uses of ElasticBuffer on which DeepEP's V2 fails, or says nothing, and what clients do with its handles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from deepep.sim import World

HIDDEN = 64


def elastic_of(ctx: Any) -> Any:
    """This rank's buffer, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    if "elastic edges" not in ctx.scratch:
        ctx.scratch["elastic edges"] = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=30)
    return ctx.scratch["elastic edges"]


def rows(tokens: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((tokens, HIDDEN), value).bfloat16()


def test_no_tokens_and_a_host_that_waits(world_of: Callable[[int], World]) -> None:
    """V2's host waits for counts that no kernel posts."""

    def run(ctx: Any) -> None:
        buffer, none = elastic_of(ctx), torch.empty(0, 2, dtype=torch.int64)
        for tokens in (0, 3 * ctx.rank):
            idx = none if tokens == 0 else torch.zeros(tokens, 2, dtype=torch.int64)
            for expand in (False, True):
                got = buffer.dispatch(
                    rows(tokens),
                    idx,
                    num_experts=2,
                    num_max_tokens_per_rank=3,
                    do_cpu_sync=True,
                    do_expand=expand,
                )
                sums, _, _ = buffer.combine(got.recv_x, got.handle)
                assert sums.shape == (tokens, HIDDEN)
                assert torch.equal(sums, rows(tokens, 2.0 if expand else 1.0))

    world_of(2).run(run)


def test_an_expert_named_twice(world_of: Callable[[int], World]) -> None:
    """V2 asserts that a token's local experts differ. Here each entry has its row, and counts."""

    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        idx = torch.tensor([[1, 1, 1], [0, 1, 0]])
        loads = torch.zeros(1, dtype=torch.int32)
        got = buffer.dispatch(
            rows(2),
            idx,
            torch.tensor([[0.5, 0.25, 0.125], [4.0, 2.0, 1.0]]),
            cumulative_local_expert_recv_stats=loads,
            num_experts=2,
            num_max_tokens_per_rank=2,
            do_expand=True,
        )
        here = [[4.0, 1.0] * 2, [0.5, 0.25, 0.125, 2.0] * 2][ctx.rank]
        assert got.recv_topk_weights.tolist() == here
        assert loads.tolist() == got.handle.num_recv_tokens_per_expert_list == [len(here)]
        sums, weights, _ = buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights)
        assert torch.equal(sums, rows(2, 3.0))
        assert weights.tolist() == [[0.5, 0.25, 0.125], [4.0, 2.0, 1.0]]

    world_of(2).run(run)


def test_repeated_experts_find_no_room(fresh_world: Callable[[int], World]) -> None:
    """The worst case without host wait does not count an expert twice: more is a typed error, or a flag."""

    def run(ctx: Any) -> None:
        from deepep import CapacityError

        buffer = elastic_of(ctx)
        how = {"num_experts": 2, "num_max_tokens_per_rank": 4, "do_expand": True, "do_cpu_sync": False}
        twice, once = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([[0, 1]] * 4)
        if ctx.rank == 0:
            with pytest.raises(CapacityError, match="name experts twice, more than 8 rows"):
                buffer.dispatch(rows(4), twice, **how)
        else:
            buffer.dispatch(rows(4), twice, **how)
        got = buffer.dispatch(rows(4), once, **how)
        assert int(got.handle.overflow_flag) == 0
        assert torch.equal(buffer.combine(got.recv_x, got.handle).combined_x, rows(4, 2.0))
        got = buffer.dispatch(rows(4), once, **how, num_max_expanded_tokens=5)
        assert (got.recv_x.shape[0], got.handle.num_expanded_tokens) == (5, 5)
        assert int(got.handle.overflow_flag) == 1
        ends = got.handle.psum_num_recv_tokens_per_expert
        assert ends.tolist() == [5]  # a grouped GEMM that goes by them stays inside of the rows
        for weights in (None, torch.ones(4, 2)):
            again = buffer.dispatch(rows(4), topk_weights=weights, handle=got.handle, do_expand=True)
            assert torch.equal(again.recv_x, got.recv_x)
        # Each expert has rows for rank 0's tokens, and for the first of rank 1's.
        kept = [2.0] * 4 if ctx.rank == 0 else [2.0, 0.0, 0.0, 0.0]
        assert buffer.combine(got.recv_x, got.handle).combined_x[:, 0].tolist() == kept
        got = buffer.dispatch(rows(4), once, **how, num_max_expanded_tokens=8)
        assert int(got.handle.overflow_flag) == 0

    fresh_world(2).run(run)


def test_entries_without_room_are_left_out_of_one_sum(world_of: Callable[[int], World]) -> None:
    """The owner of a token has to learn which of its rows there were."""

    def run(ctx: Any) -> None:
        from deepep import ElasticBuffer

        x = torch.arange(1.0, 5.0).unsqueeze(1).expand(4, HIDDEN).bfloat16().contiguous()
        idx, weights = torch.tensor([[1, 0]] * 4), torch.tensor([[0.25, 0.5]] * 4)
        how = {"num_experts": 2, "num_max_tokens_per_rank": 4, "do_expand": True, "do_cpu_sync": False}
        with ElasticBuffer(ctx.group, num_bytes=2 << 20, allow_multiple_reduction=False) as buffer:
            capacity = 3 if ctx.rank == 0 else 6
            got = buffer.dispatch(x, idx, weights, **how, num_max_expanded_tokens=capacity)
            given = {"topk_weights": got.recv_topk_weights, "async_with_compute_stream": ctx.rank == 0}
            sums, returned, event = buffer.combine(got.recv_x, got.handle, **given)
            if event.event is not None:
                event.current_stream_wait()
            # Rows there are: at expert 0 for rank 0's first three tokens, at expert 1 for all six first ones.
            there = [[1, 1, 1, 0], [1, 1, 1, 1]] if ctx.rank == 0 else [[0, 0, 0, 0], [1, 1, 0, 0]]
            there = torch.tensor(there)
            assert torch.equal(sums[:, 0].float(), x[:, 0].float() * there.sum(0))
            assert torch.equal(returned, weights * there.flip(0).t())

    world_of(2).run(run)


def test_indices_are_copied_behind_the_previous_event(world_of: Callable[[int], World]) -> None:
    """Whoever makes them may still be at it when the call returns."""

    def run(ctx: Any) -> None:
        from deepep import EventHandle
        from deepep.runtime.completion import HostCompletion

        idx, made = torch.full((3, 2), -1), Future()
        got = elastic_of(ctx).dispatch(
            rows(3),
            idx,
            num_experts=2,
            num_max_tokens_per_rank=4,
            do_cpu_sync=False,
            previous_event=EventHandle(HostCompletion(made)),
            async_with_compute_stream=True,
        )
        idx[:] = torch.tensor([0, 1])
        made.set_result(None)
        got.event.current_stream_wait()
        idx.fill_(-1)  # the handle's is a copy
        assert got.handle.topk_idx.tolist() == [[0, 1]] * 3
        assert got.handle.dst_buffer_slot_idx.tolist() == [[4 * ctx.rank + i] * 2 for i in range(3)]
        assert int(got.handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == 6

    world_of(2).run(run)


def test_a_handle_whose_tensors_were_taken_out_can_be_printed(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        got = elastic_of(ctx).dispatch(
            rows(3), torch.tensor([[0, 1]] * 3), num_experts=2, num_max_tokens_per_rank=4
        )
        got.handle.topk_idx = None
        assert repr(got.handle) == "EPHandle(plain, 3 tokens sent, 6 rows received)"

    world_of(2).run(run)


def test_a_cached_dispatch_with_the_default_sms(world_of: Callable[[int], World]) -> None:
    """V2 asks for the theoretical number of SMs with num_experts=None then."""

    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        got = buffer.dispatch(
            rows(4), torch.tensor([[0, 1]] * 4), num_experts=2, num_max_tokens_per_rank=4, num_sms=8
        )
        assert got.handle.num_sms == 8
        again = buffer.dispatch(rows(4, 3.0), handle=got.handle, num_sms=0)
        assert again.handle is got.handle
        assert torch.equal(again.recv_x, rows(8, 3.0))
        assert torch.equal(again.recv_topk_idx, got.recv_topk_idx)

    world_of(2).run(run)


def test_beside_a_group_that_is_made_lazily(fresh_world: Callable[[int], World]) -> None:
    """Nothing of the group's own communicator is used: it may not exist yet, nor ever."""

    def run(ctx: Any) -> None:
        import torch.distributed as dist

        from deepep import ElasticBuffer

        group = dist.new_group(list(range(2)))
        with ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=HIDDEN) as buffer:
            got = buffer.dispatch(rows(4), torch.tensor([[0], [1]] * 2), num_experts=2)
            assert torch.equal(buffer.combine(got.recv_x, got.handle).combined_x, rows(4))
        total = torch.ones(1)
        dist.all_reduce(total, group=group)  # and it works afterwards
        assert int(total) == 2

    fresh_world(2).run(run)


def test_thirty_buffers(fresh_world: Callable[[int], World]) -> None:
    def run(ctx: Any) -> int:
        import threading

        from deepep import ElasticBuffer

        made = [ElasticBuffer(ctx.group, num_bytes=2 << 20) for _ in range(30)]
        for number, buffer in enumerate(made):
            got = buffer.dispatch(
                rows(2, number), torch.tensor([[0], [1]]), num_experts=2, num_max_tokens_per_rank=2
            )
            assert torch.equal(got.recv_x, rows(2, number))
        for buffer in made:
            buffer.destroy()
        return sum(thread.name.startswith("deepep-rank") for thread in threading.enumerate())

    assert fresh_world(2).run(run) == [0, 0]


def test_import_without_cuda() -> None:
    code = """
import sys
for name in ("deepep._core", "deepep._cuda", "deepep._emulator"):
    sys.modules[name] = None
import deepep, torch
assert not torch.cuda.is_initialized()
print(deepep.ElasticBuffer.capture())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "EventHandle" in done.stdout, done.stderr


def test_m_is_free_in_every_call(world_of: Callable[[int], World]) -> None:
    """And may differ between ranks; source tokens are numbered by each receiver's own."""

    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        for most in (2, 3, 64, 1 << 20):
            mine = most + ctx.rank
            got = buffer.dispatch(
                rows(2), torch.tensor([[0], [1]]), num_experts=2, num_max_tokens_per_rank=mine
            )
            assert got.handle.recv_src_metadata[:, 0].tolist() == [ctx.rank, mine + ctx.rank]

    world_of(2).run(run)


# Handles, as clients keep them


def test_a_handles_tensors_are_saved_and_set_back(world_of: Callable[[int], World]) -> None:
    """Megatron's way: fields that are tensors go through an autograd context, and are set again."""

    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        names = (
            *("psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "topk_idx"),
            *("recv_src_metadata", "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list"),
            "num_unaligned_recv_tokens_per_expert",
        )

        class Combine(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, x: Any, handle: Any) -> Any:
                context.handle = handle
                context.save_for_backward(*(getattr(handle, name) for name in names))
                for name in names:
                    setattr(handle, name, None)
                return buffer.combine(x, handle).combined_x

            @staticmethod
            def backward(context: Any, grad: Any) -> Any:
                for name, value in zip(names, context.saved_tensors, strict=True):
                    setattr(context.handle, name, value)
                assert context.handle.topk_idx.tolist() == idx.tolist()
                return buffer.dispatch(grad.contiguous(), handle=context.handle).recv_x, None

        idx = torch.tensor([[0, -1], [1, 0]])
        with torch.inference_mode():
            got = buffer.dispatch(rows(2), idx, num_experts=2, num_max_tokens_per_rank=2)
        x = got.recv_x.clone().requires_grad_()
        Combine.apply(x, got.handle).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))

    world_of(2).run(run)


def test_a_handle_keeps_its_own_indices(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        for copies in (True, False):
            idx = torch.tensor([[0], [1]])
            got = buffer.dispatch(
                rows(2), idx, num_experts=2, num_max_tokens_per_rank=2, do_handle_copy=copies
            )
            assert (got.handle.topk_idx is idx) is not copies
            assert got.handle.topk_idx.tolist() == [[0], [1]]
            assert got.handle.dst_buffer_slot_idx.tolist() == [[2 * ctx.rank]] * 2
            if copies:
                idx.zero_()
                again = buffer.dispatch(rows(2), handle=got.handle, topk_weights=torch.ones(2, 1))
                assert again.recv_topk_weights.tolist() == [[1.0], [1.0]]
            assert "2 tokens sent, 2 rows received" in repr(got.handle)

    world_of(2).run(run)


def test_the_same_bits_every_time(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        generator = torch.Generator().manual_seed(ctx.rank)
        idx = torch.rand(40, 6, generator=generator).topk(3).indices
        x = torch.randn(40, HIDDEN, generator=generator).bfloat16()
        seen = set()
        for _ in range(5):
            got = buffer.dispatch(x, idx, num_experts=6, num_max_tokens_per_rank=40, do_expand=True)
            sums = buffer.combine(got.recv_x * 1.1, got.handle).combined_x
            both = torch.cat([got.recv_x, sums]).view(torch.int16)
            seen.add(both.numpy().tobytes())
        assert len(seen) == 1

    world_of(2).run(run)


def test_what_the_caller_has_set_changes_nothing(world_of: Callable[[int], World]) -> None:
    """A default device and dtype, inference mode, autocast, rows that require gradients."""

    def run(ctx: Any) -> None:
        from deepep import ElasticBuffer

        x, idx = rows(2, 3.0), torch.tensor([[0, 1], [1, -1]])
        how = {"num_experts": 2, "num_max_tokens_per_rank": 2, "expert_alignment": 4, "do_zero_padding": True}

        def trip(buffer: Any, x: torch.Tensor) -> list[torch.Tensor]:
            got = buffer.dispatch(x, idx, do_expand=True, **how)
            handle = got.handle
            made = [got.recv_x, handle.recv_src_metadata, handle.dst_buffer_slot_idx]
            made += [handle.psum_num_recv_tokens_per_expert, handle.psum_num_recv_tokens_per_scaleup_rank]
            return [*made, buffer.combine(got.recv_x, handle).combined_x]

        for options in ({}, {"allow_multiple_reduction": False}):
            with ElasticBuffer(ctx.group, num_bytes=2 << 20, **options) as buffer:
                plain = trip(buffer, x)
                torch.set_default_device("meta")
                torch.set_default_dtype(torch.float64)
                try:
                    with torch.autocast("cpu"):
                        odd = trip(buffer, x.clone().requires_grad_())
                    with torch.inference_mode():
                        odd += trip(buffer, x)
                finally:
                    torch.set_default_device(None)
                    torch.set_default_dtype(torch.float32)
                assert not any(tensor.is_inference() or tensor.requires_grad for tensor in odd)
                for before, after in zip(plain + plain, odd, strict=True):
                    assert before.dtype == after.dtype
                    assert torch.equal(before, after)

    world_of(2).run(run)
