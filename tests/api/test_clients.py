"""The call sequences of real clients, written as they write them: against `deep_ep`, on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

RANKS, LOCAL, TOPK, TOKENS, HIDDEN = 3, 2, 3, 7, 128
EXPERTS = RANKS * LOCAL


def token_inputs(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H] bf16, topk_idx [T, K], topk_weights [T, K]: small integers and eighths, so that every order of
    summation gives the same bits and the expected values can be computed in one piece.
    """
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randint(-4, 5, (TOKENS, HIDDEN), generator=generator).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK).indices
    weights = torch.randint(1, 9, (TOKENS, TOPK), generator=generator) / 8
    return x, idx, weights


def expert(rows: torch.Tensor, number: torch.Tensor | int) -> torch.Tensor:
    """A stand-in that tells experts apart: row * (number + 1)."""
    factor = number + 1
    return rows.float() * (factor.unsqueeze(-1) if isinstance(factor, torch.Tensor) else factor)


def mixture(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The output of a layer of these experts, without any communication."""
    return (weights.unsqueeze(-1) * (idx + 1).unsqueeze(-1) * x.float().unsqueeze(1)).sum(1).bfloat16()


# Training, as frameworks do it: a module-wide buffer, autograd functions that call each other's operation.


def training(ctx: Any) -> None:
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import Buffer
    from deep_ep.utils import EventHandle, EventOverlap

    Buffer.set_num_sms(24)
    hidden_bytes = HIDDEN * 2
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (Buffer.get_dispatch_config(ctx.group.size()), Buffer.get_combine_config(ctx.group.size())):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, ctx.group.size()), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, ctx.group.size()), num_rdma_bytes)
    buffer = Buffer(ctx.group, num_nvl_bytes, num_rdma_bytes, timeout=30.0)

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, idx: Any, weights: Any) -> Any:
            previous_event = EventOverlap(EventHandle())
            per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
                idx, EXPERTS, previous_event=previous_event, async_finish=True, allocate_on_comm_stream=True
            )
            received, indices, received_weights, counts, handle, event = buffer.dispatch(
                x,
                topk_idx=idx,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                previous_event=event,
                async_finish=True,
                allocate_on_comm_stream=True,
            )
            event.current_stream_wait()
            context.handle = handle
            return received, indices, received_weights, counts, handle

        @staticmethod
        def backward(context: Any, grad: Any, _idx: Any, grad_weights: Any, *_: Any) -> Any:
            grad_x, grad_topk_weights, event = buffer.combine(
                grad.contiguous(),
                context.handle,
                topk_weights=grad_weights.float(),
                previous_event=EventOverlap(EventHandle()),
                async_finish=True,
                allocate_on_comm_stream=True,
            )
            event.current_stream_wait()
            return grad_x, None, grad_topk_weights

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, handle: Any) -> Any:
            combined, _, event = buffer.combine(x, handle, async_finish=True)
            event.current_stream_wait()
            context.handle = handle
            return combined

        @staticmethod
        def backward(context: Any, grad: Any) -> Any:
            grad_x, _, _, _, _, event = buffer.dispatch(
                grad.contiguous(), handle=context.handle, async_finish=True
            )
            event.current_stream_wait()
            return grad_x, None

    for step in range(2):
        x, idx, weights = token_inputs(ctx.rank, step)
        x.requires_grad_()
        weights.requires_grad_()
        received, indices, received_weights, counts, handle = Dispatch.apply(x, idx, weights)
        here = indices >= 0
        assert counts == [int((indices == e).sum()) for e in range(LOCAL)]
        number = torch.where(here, indices + ctx.rank * LOCAL, 0)
        outputs = received.float().unsqueeze(1) * (number + 1).unsqueeze(-1)
        local = (outputs * (received_weights * here).unsqueeze(-1)).sum(1).bfloat16()
        combined = Combine.apply(local, handle)
        assert torch.equal(combined, mixture(x.detach(), idx, weights.detach()))
        combined.backward(torch.ones_like(combined))
        # d(sum of outputs)/dx = sum_k w_k (e_k + 1); d/dw_k = (e_k + 1) * sum of x.
        grad_x = (weights.detach() * (idx + 1)).sum(1, keepdim=True).expand(TOKENS, HIDDEN)
        assert torch.equal(x.grad, grad_x.bfloat16())
        grad_weights = (idx + 1) * x.detach().float().sum(1, keepdim=True)
        assert torch.equal(weights.grad, grad_weights)
        assert int(weights.grad.count_nonzero()) > 0
    Buffer.set_num_sms(24)


def test_training_forward_and_backward(fresh_world: Any) -> None:
    fresh_world(RANKS).run(training)


# Prefill without host waits: worst-case rows, the GEMM masks what is not real.


def prefill(ctx: Any) -> None:
    import deepep

    deepep.install_as_deep_ep()
    import deep_ep

    buffer = deep_ep.Buffer(
        group=ctx.group, num_nvl_bytes=1280, num_rdma_bytes=0, explicitly_destroy=True, timeout=30.0
    )
    for step in range(2):
        x, idx, weights = token_inputs(ctx.rank, step)
        scale = torch.full((TOKENS, HIDDEN // 128), 0.5)
        idx = idx.to(deep_ep.topk_idx_t)
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx=idx, num_experts=EXPERTS, previous_event=None, async_finish=True
        )
        (rows, scales), indices, received_weights, counts, handle, event = buffer.dispatch(
            x=(x.to(torch.float8_e4m3fn), scale),
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
            expert_alignment=128,
            num_worst_tokens=RANKS * TOKENS,
            config=deep_ep.Buffer.get_dispatch_config(buffer.group_size),
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        assert counts == []
        assert rows.shape[0] == RANKS * TOKENS
        real = (indices >= 0).any(1)
        number = indices + ctx.rank * LOCAL
        values = rows.float() * scales
        outputs = (values.unsqueeze(1) * (number + 1).unsqueeze(-1) * received_weights.unsqueeze(-1)).sum(1)
        outputs = torch.where(real.unsqueeze(-1), outputs, torch.nan).bfloat16()
        combined, _, event = buffer.combine(
            x=outputs,
            handle=handle,
            topk_weights=None,
            config=deep_ep.Buffer.get_combine_config(buffer.group_size),
            previous_event=None,
            async_finish=True,
            allocate_on_comm_stream=False,
        )
        event.current_stream_wait()
        assert torch.equal(combined, mixture(x / 2, idx, weights))
    buffer.destroy()


def test_prefill_with_worst_case_rows(fresh_world: Any) -> None:
    fresh_world(RANKS).run(prefill)


# Decode with two batches in turn: at most one operation is issued and not received.


def masked_gemm(rows: torch.Tensor, count: torch.Tensor, rank: int) -> torch.Tensor:
    """[L, R*M, H]: each expert on its real rows; what lies past them is poison."""
    output = torch.full(rows.shape, torch.nan).bfloat16()
    for local, n in enumerate(count.tolist()):
        output[local, :n] = expert(rows[local, :n], rank * LOCAL + local).bfloat16()
    return output


def decode(ctx: Any, zero_copy: bool) -> None:
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import Buffer

    most = 8
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(most, HIDDEN, ctx.group.size(), EXPERTS)
    buffer = Buffer(
        ctx.group,
        0,
        num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=EXPERTS // ctx.group.size(),
        timeout=30.0,
    )
    buffer.clean_low_latency_buffer(most, HIDDEN, EXPERTS)

    def dispatch(batch: Any) -> Any:
        rows, count, handle, event, hook = buffer.low_latency_dispatch(
            batch[0], batch[1], most, EXPERTS, use_fp8=False, async_finish=False, return_recv_hook=True
        )
        assert event.event is None
        return rows, count, handle, hook

    def combine(output: torch.Tensor, batch: Any, handle: Any) -> Any:
        if zero_copy:
            slots = buffer.get_next_low_latency_combine_buffer(handle)
            slots.copy_(output)
            output = slots
        combined, _, hook = buffer.low_latency_combine(
            output,
            batch[1],
            batch[2],
            handle,
            zero_copy=zero_copy,
            async_finish=False,
            return_recv_hook=True,
        )
        return combined, hook

    for layer in range(3):
        batches = [token_inputs(ctx.rank, 2 * layer + i) for i in range(2)]
        rows0, count0, handle0, hook = dispatch(batches[0])
        # ... attention of batch 1 here ...
        hook()
        rows1, count1, handle1, hook = dispatch(batches[1])
        output0 = masked_gemm(rows0, count0, ctx.rank)
        hook()
        combined0, hook = combine(output0, batches[0], handle0)
        output1 = masked_gemm(rows1, count1, ctx.rank)
        hook()
        combined1, hook = combine(output1, batches[1], handle1)
        # ... attention of batch 0 here ...
        hook()
        assert torch.equal(combined0, mixture(*batches[0]))
        assert torch.equal(combined1, mixture(*batches[1]))


@pytest.mark.parametrize("zero_copy", [False, True])
def test_decode_with_two_batches_and_hooks(fresh_world: Any, zero_copy: bool) -> None:
    fresh_world(RANKS).run(decode, zero_copy)


def plain_decode(ctx: Any) -> None:
    import deepep

    buffer = deepep.Buffer(ctx.group, 0, 1280, low_latency_mode=True, timeout=30.0)
    total = torch.zeros(LOCAL, dtype=torch.int32)
    for step in range(3):
        x, idx, weights = token_inputs(ctx.rank, step)
        (rows, scales), count, handle, event, hook = buffer.low_latency_dispatch(
            x,
            idx,
            TOKENS,
            EXPERTS,
            cumulative_local_expert_recv_stats=total,
            use_fp8=True,
            round_scale=True,
            async_finish=True,
        )
        assert hook is None
        event.current_stream_wait()
        values = rows.float() * scales.repeat_interleave(128, dim=-1)  # integers up to 4 survive e4m3 exactly
        output = masked_gemm(values.bfloat16(), count, ctx.rank)
        out = torch.empty_like(x)
        combined, event, _ = buffer.low_latency_combine(
            output, idx, weights, handle, out=out, async_finish=True
        )
        with event:
            pass
        assert combined is out
        assert torch.equal(out, mixture(x, idx, weights))
    everyone = [torch.empty_like(total) for _ in range(RANKS)]
    torch.distributed.all_gather(everyone, total, group=ctx.group)
    assert int(torch.stack(everyone).sum()) == 3 * RANKS * TOKENS * TOPK


def test_decode_without_overlap(world_of: Any) -> None:
    world_of(RANKS).run(plain_decode)
