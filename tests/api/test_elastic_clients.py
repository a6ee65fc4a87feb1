"""The call sequences of V2's real clients, written as they write them: against `deep_ep`, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deepep.sim import World

RANKS, LOCAL, TOPK, TOKENS, HIDDEN = 2, 2, 3, 7, 256
EXPERTS = RANKS * LOCAL


def token_inputs(
    rank: int, step: int, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H] bf16, topk_idx [T, K], topk_weights [T, K]: small integers and eighths, so that every order of
    summation gives the same bits and the expected values can be computed in one piece.
    """
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randint(-4, 5, (tokens, HIDDEN), generator=generator).bfloat16()
    idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK).indices
    weights = torch.randint(1, 9, (tokens, TOPK), generator=generator) / 8
    return x, idx, weights


def mixture(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The output of a layer whose expert e multiplies by e + 1, without any communication."""
    return (weights.unsqueeze(-1) * (idx + 1).unsqueeze(-1) * x.float().unsqueeze(1)).sum(1).bfloat16()


def grouped_gemm(rows: torch.Tensor, ends: torch.Tensor, alignment: int, rank: int) -> torch.Tensor:
    """[X, H]: each expert's rows, found by the ends of the expanded layout; poison everywhere else."""
    out, start = torch.full(rows.shape, torch.nan), 0
    for local, end in enumerate(ends.tolist()):
        out[start:end] = rows[start:end].float() * (rank * LOCAL + local + 1)
        start = -(-end // alignment) * alignment
    return out


def plain_experts(rows: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, rank: int) -> torch.Tensor:
    """[N, H]: each row's local experts, weighted and summed; other lanes are masked by their index."""
    number = torch.where(idx >= 0, idx + rank * LOCAL, -1)
    scale = (torch.where(idx >= 0, weights, 0.0) * (number + 1)).sum(1, keepdim=True)
    return (rows.float() * scale).bfloat16()


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as FP8 with scales of one half."""
    return (2 * x.float()).to(torch.float8_e4m3fn), torch.full((len(x), HIDDEN // 128), 0.5)


# vLLM: one buffer per shape, FP8; prefill expands and waits, decode is plain and waits for nothing.


def vllm(ctx: Any) -> None:
    import deepep

    deepep.install_as_deep_ep()
    import deep_ep

    buffer = deep_ep.ElasticBuffer(
        ctx.group,
        num_max_tokens_per_rank=16,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=True,
        allow_hybrid_mode=False,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        explicitly_destroy=True,
    )
    num_sms = buffer.get_theoretical_num_sms(EXPERTS, TOPK)
    for step, prefill in ((0, True), (1, False), (2, True), (3, False)):
        tokens = 0 if step == 3 and ctx.rank == 1 else TOKENS
        x, idx, weights = token_inputs(ctx.rank, step, tokens)
        (rows, scales), recv_idx, recv_weights, handle, event = buffer.dispatch(
            x=scaled(x),
            topk_idx=idx,
            topk_weights=weights,
            num_experts=EXPERTS,
            num_max_tokens_per_rank=None if prefill else 8,
            expert_alignment=128 if prefill else None,
            num_sms=num_sms,
            do_expand=prefill,
            do_cpu_sync=prefill,
            async_with_compute_stream=False,
            allocate_on_comm_stream=False,
        )
        assert event.event is None
        values = rows.float() * scales.repeat_interleave(128, 1)
        if prefill:
            assert recv_idx is None
            assert recv_weights.dim() == 1
            assert sum(handle.num_recv_tokens_per_expert_list) == len(rows)
            y = grouped_gemm(values, handle.psum_num_recv_tokens_per_expert, 128, ctx.rank)
            y = (y * recv_weights.unsqueeze(1)).bfloat16()
        else:
            assert handle.num_recv_tokens_per_expert_list == []
            assert len(rows) == RANKS * 8
            real = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
            assert bool((recv_idx[:real] >= 0).any(1).all())
            assert bool((recv_idx[real:] == -1).all())
            y = plain_experts(values, recv_idx, recv_weights, ctx.rank)
            y[real:] = torch.nan
        combined, _, event = buffer.combine(
            x=y,
            handle=handle,
            topk_weights=None,
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        if event.event is not None:
            event.current_stream_wait()
        assert torch.equal(combined, mixture(x, idx, weights))
    buffer.destroy()


def mxfp8(ctx: Any) -> None:
    """vLLM's MXFP8: four UE8M0 scales of 32 channels in an int32; bits that nobody looks into."""
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import ElasticBuffer

    x, idx, weights = token_inputs(ctx.rank, 5)
    packed = torch.randint(-(2**31), 2**31 - 1, (TOKENS, HIDDEN // 128), dtype=torch.int32)
    with ElasticBuffer(ctx.group, num_max_tokens_per_rank=8, hidden=HIDDEN) as buffer:
        (rows, scales), _, _, handle, _ = buffer.dispatch(
            (x.to(torch.float8_e4m3fn), packed), idx, weights, num_experts=EXPERTS
        )
        source = handle.recv_src_metadata[:, 0].long()
        own = source // 8 == ctx.rank
        assert scales.dtype == torch.int32
        assert torch.equal(scales[own], packed[source[own] % 8])
        assert torch.equal(rows[own].float(), x[source[own] % 8].float())


# SGLang: expands always, scales by columns; an idle rank sends one token of no weight.


def sglang(ctx: Any, prefill: bool) -> None:
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import ElasticBuffer

    buffer = ElasticBuffer(
        group=ctx.group,
        num_max_tokens_per_rank=16,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=True,
        allow_hybrid_mode=True,
        prefer_overlap_with_compute=False,
        sl_idx=0,
    )
    assert buffer.num_bytes > 0
    x, idx, weights = token_inputs(ctx.rank, 6)
    if ctx.rank == 1:
        x, idx, weights = x[:1], torch.zeros_like(idx[:1]) - 1, torch.zeros_like(weights[:1])
        idx[0, 0] = 0
    (rows, scales), _, row_weights, handle, _ = buffer.dispatch(
        scaled(x),
        topk_idx=idx,
        topk_weights=weights,
        num_experts=EXPERTS,
        num_max_tokens_per_rank=16,
        expert_alignment=128,
        num_sms=0,
        do_expand=True,
        do_cpu_sync=prefill,
        use_tma_aligned_col_major_sf=True,
    )
    assert scales.stride(0) == 1
    assert scales.stride(1) % 4 == 0
    assert (handle.num_recv_tokens_per_expert_list == []) is not prefill
    y = grouped_gemm(
        rows.float() * scales.repeat_interleave(128, 1), handle.psum_num_recv_tokens_per_expert, 128, ctx.rank
    )
    y = (y * row_weights.unsqueeze(1)).bfloat16()
    combined, returned, _ = buffer.combine(y, handle, topk_weights=row_weights, num_sms=0)
    assert torch.equal(returned, weights * (idx >= 0))
    expected = mixture(x, idx, weights) if ctx.rank == 0 else torch.zeros_like(x)
    assert torch.equal(combined, expected)


# Megatron's fused dispatcher, and torchtitan's: autograd functions that call each other's operation.


def training(ctx: Any, asynchronous: bool) -> None:
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import ElasticBuffer

    hint = ElasticBuffer.get_buffer_size_hint(ctx.group, 16, HIDDEN, num_topk=TOPK, use_fp8_dispatch=False)
    buffer = ElasticBuffer(
        ctx.group,
        num_bytes=hint,
        num_max_tokens_per_rank=16,
        hidden=HIDDEN,
        num_topk=TOPK,
        deterministic=True,
        num_gpu_timeout_secs=30,
        num_cpu_timeout_secs=60,
        num_allocated_qps=0,
        explicitly_destroy=True,
    )
    assert (buffer.num_bytes, buffer.num_max_tokens_per_rank, buffer.group) == (hint, 16, ctx.group)
    try:
        num_sms = buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=TOPK)
    except ZeroDivisionError:
        num_sms = 24
    early = {"async_with_compute_stream": asynchronous, "allocate_on_comm_stream": asynchronous}

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, idx: Any, weights: Any) -> Any:
            rows, recv_idx, recv_weights, handle, event = buffer.dispatch(
                x,
                topk_idx=idx,
                topk_weights=weights,
                num_experts=EXPERTS,
                num_max_tokens_per_rank=16,
                num_sms=num_sms,
                num_qps=0,
                do_cpu_sync=True,
                **early,
            )
            if event.event is not None:
                event.current_stream_wait()
            context.handle = handle
            return rows, recv_idx, recv_weights, handle

        @staticmethod
        def backward(context: Any, grad: Any, _idx: Any, grad_weights: Any, _handle: Any) -> Any:
            grad_x, grad_scores, event = buffer.combine(
                grad.contiguous(), context.handle, topk_weights=grad_weights.float(), **early
            )
            if event.event is not None:
                event.current_stream_wait()
            return grad_x, None, grad_scores

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, handle: Any) -> Any:
            combined, _, event = buffer.combine(x, handle, num_sms=handle.num_sms, **early)
            if event.event is not None:
                event.current_stream_wait()
            context.handle = handle
            return combined

        @staticmethod
        def backward(context: Any, grad: Any) -> Any:
            rows, _, _, _, event = buffer.dispatch(
                grad.contiguous(),
                handle=context.handle,
                do_cpu_sync=False,
                num_sms=context.handle.num_sms,
                **early,
            )
            if event.event is not None:
                event.current_stream_wait()
            return rows, None

    for step in range(2):
        x, idx, weights = token_inputs(ctx.rank, step, 0 if step and ctx.rank else TOKENS)
        x.requires_grad_()
        weights.requires_grad_()
        rows, recv_idx, recv_weights, handle = Dispatch.apply(x, idx, weights)
        counts = [int((recv_idx == expert).sum()) for expert in range(LOCAL)]
        assert handle.num_recv_tokens_per_expert_list == counts
        here = recv_idx >= 0
        number = torch.where(here, recv_idx + ctx.rank * LOCAL, 0)
        outputs = rows.float().unsqueeze(1) * (number + 1).unsqueeze(-1)
        local = (outputs * (recv_weights * here).unsqueeze(-1)).sum(1).bfloat16()
        combined = Combine.apply(local, handle)
        assert torch.equal(combined, mixture(x.detach(), idx, weights.detach()))
        combined.backward(torch.ones_like(combined))
        grad_x = (weights.detach() * (idx + 1)).sum(1, keepdim=True).expand(len(x), HIDDEN)
        assert torch.equal(x.grad, grad_x.bfloat16())
        assert torch.equal(weights.grad, (idx + 1) * x.detach().float().sum(1, keepdim=True))
    buffer.destroy()


# torchtitan's inference: expanded, no host wait; alignment of its grouped GEMM.


def torchtitan_inference(ctx: Any) -> None:
    import deepep

    deepep.install_as_deep_ep()
    from deep_ep import ElasticBuffer

    with ElasticBuffer(
        ctx.group, num_bytes=64 << 20, num_max_tokens_per_rank=8, hidden=HIDDEN, num_topk=TOPK
    ) as buffer:
        x, idx, weights = token_inputs(ctx.rank, 9)
        rows, _, row_weights, handle, _ = buffer.dispatch(
            x,
            idx,
            weights,
            num_experts=EXPERTS,
            expert_alignment=8,
            do_expand=True,
            do_cpu_sync=False,
        )
        y = grouped_gemm(rows, handle.psum_num_recv_tokens_per_expert, 8, ctx.rank)
        combined, _, _ = buffer.combine((y * row_weights.unsqueeze(1)).bfloat16(), handle)
        assert torch.equal(combined, mixture(x, idx, weights))


@pytest.fixture(scope="module")
def deep_ep_world() -> Iterator[World]:
    """Ranks in which this library is deep_ep, which it stays."""
    with World(RANKS) as world:
        yield world


@pytest.mark.parametrize("client", [vllm, mxfp8, torchtitan_inference])
def test_inference(deep_ep_world: World, client: Callable[[Any], None]) -> None:
    deep_ep_world.run(client)


@pytest.mark.parametrize("prefill", [True, False])
def test_sglang(deep_ep_world: World, prefill: bool) -> None:
    deep_ep_world.run(sglang, prefill)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_forward_and_backward(deep_ep_world: World, asynchronous: bool) -> None:
    deep_ep_world.run(training, asynchronous)
