"""Buffer between two processes, over NVLink if there are two GPUs: large shapes, disagreement and refusals.

Deaths, memory, graphs and what may change nothing have files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepep.sim import World

pytestmark = pytest.mark.gpu

HIDDEN, TOPK, EXPERTS = 7168, 8, 256


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def draw(rank: int, tokens: int, seed: int, fp8: bool = False) -> Any:
    """One rank's rows and routing, the same on whoever draws them."""
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    idx = torch.rand((tokens, EXPERTS), generator=generator).topk(TOPK, dim=1).indices
    idx[torch.rand(idx.shape, generator=generator) < 0.1] = -1
    x = torch.randn((tokens, HIDDEN), generator=generator).to(torch.bfloat16)
    weights = torch.rand((tokens, TOPK), generator=generator)
    scales = None
    if fp8:
        x = x.to(torch.float8_e4m3fn)
        scales = torch.rand((HIDDEN // 128, tokens), generator=generator).t()
    return x, scales, idx, weights


def expect(tokens: tuple[int, int], seed: int, fp8: bool = False) -> Any:
    from deepep.reference import high_throughput as oracle
    from deepep.reference.layout import dispatch_layout

    inputs = []
    for rank in range(2):
        x, scales, idx, weights = draw(rank, tokens[rank], seed, fp8)
        layout = dispatch_layout(idx, EXPERTS, 2)
        inputs.append(
            oracle.DispatchInput(
                x, layout.is_token_in_rank, scales, idx, weights, layout.num_tokens_per_expert
            )
        )
    return inputs, oracle.dispatch(inputs, EXPERTS), oracle


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(torch.uint8)


def buffer_of(ctx: Any) -> Any:
    import deepep

    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = deepep.Buffer(ctx.group, num_nvl_bytes=1 << 28, timeout=20.0)
    assert ctx.scratch["buffer"].runtime.info.backend == "cuda"
    return ctx.scratch["buffer"]


def dispatch(buffer: Any, given: Any, **options: Any) -> Any:
    x, scales, idx, weights = given
    rows = x.cuda() if scales is None else (x.cuda(), scales.cuda())
    idx, weights = idx.cuda(), weights.cuda()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    return buffer.dispatch(
        rows,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
        **options,
    )


def round_trip(ctx: Any, tokens: tuple[int, int], seed: int, fp8: bool, sms: int = 24) -> None:
    buffer = buffer_of(ctx)
    inputs, expected, oracle = expect(tokens, seed, fp8)
    want = expected[ctx.rank]
    given = draw(ctx.rank, tokens[ctx.rank], seed, fp8)
    recv, idx, weights, counts, handle, _ = dispatch(buffer, given)
    x, scales = recv if fp8 else (recv, None)
    assert torch.equal(bits(x), bits(want.recv_x))
    assert torch.equal(idx.cpu(), want.recv_topk_idx)
    assert torch.equal(weights.cpu(), want.recv_topk_weights)
    assert counts == want.num_recv_tokens_per_expert
    if scales is not None:
        assert torch.equal(bits(scales), bits(want.recv_scales))
        return
    sums = oracle.combine(
        [e.recv_x for e in expected],
        [i.is_token_in_rank for i in inputs],
        topk_weights=[e.recv_topk_weights for e in expected],
    )[ctx.rank]
    before = buffer.num_sms
    buffer.set_num_sms(sms)
    out, out_weights, _ = buffer.combine(x, handle, topk_weights=weights)
    buffer.set_num_sms(before)
    assert torch.equal(bits(out), bits(sums.x))
    assert torch.equal(out_weights.cpu(), sums.topk_weights)
    again, *_ = buffer.dispatch(given[0].cuda(), handle=handle)
    assert torch.equal(bits(again), bits(want.recv_x))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [(4096, 4096), (128, 128), (1, 0), (0, 0), (777, 4000)])
def test_round_trip(pair: World, tokens: tuple[int, int], fp8: bool) -> None:
    for seed in range(2):
        pair.run(round_trip, tokens, seed, fp8)


def test_few_sms_leave_rows_to_the_copy_engine(pair: World) -> None:
    def few(ctx: Any) -> int:
        from deepep import _cuda

        for seed in range(2):
            round_trip(ctx, (4096, 3000), seed, False, sms=8)
        return int(buffer_of(ctx).runtime.endpoint()._state.view(torch.int32)[_cuda.CE_COMPLETED])

    assert all(carried > 0 for carried in pair.run(few))


def test_disagreement_is_told_to_both(pair: World) -> None:
    from deepep.sim import WorldError

    def disagree(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        x, _, idx, weights = draw(ctx.rank, 64, 1)
        dispatch(buffer, (x[:, : 7168 - 128 * ctx.rank].contiguous(), None, idx, weights))

    with pytest.raises(WorldError) as caught:
        pair.run(disagree)
    assert set(caught.value.failures) == {0, 1}
    assert all("MismatchError" in repr(failure) for failure in caught.value.failures.values())


def test_a_refusal_reaches_the_other_and_work_goes_on() -> None:
    """Nobody waits in vain. The call after a refused combine is left out on all ranks."""

    def refuse(ctx: Any) -> list[str]:
        import deepep

        buffer = buffer_of(ctx)
        x, _, idx, weights = draw(ctx.rank, 64, 1)

        def step(bad: str) -> str:
            rows = x[:, :4].contiguous() if bad == "dispatch" else x  # rows of 8 bytes
            try:
                received, _, _, _, handle, _ = dispatch(buffer, (rows, None, idx, weights))
                buffer.combine(received.float() if bad == "combine" else received, handle)
                torch.cuda.synchronize()
            except deepep.errors.ArgumentError as error:
                return type(error).__name__
            return ""

        bad = ["dispatch", "", "combine", "", ""]
        seen = [step(what if ctx.rank == 1 else "") for what in bad]
        round_trip(ctx, (64, 64), 1, False)
        return seen

    with World(2, backend="nccl", timeout=120) as world:
        told, refused = world.run(refuse)
    assert told == ["MismatchError", "", "", "MismatchError", ""]
    assert refused == ["ShapeError", "", "ArgumentTypeError", "MismatchError", ""]
