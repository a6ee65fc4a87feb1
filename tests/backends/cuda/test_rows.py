"""The kernels around the local experts: the bits of plain torch, and torch's grouped product in the layer."""

from __future__ import annotations

import pytest
import torch

from deepep.gate import stable_topk
from deepep.nn import GroupedSwiGLU, apply_experts, kernels
from deepep.nn.activation import swiglu, swiglu_backward
from deepep.nn.balance import count_load
from deepep.nn.grouped import grouped_mm, grouped_mm_weight_grad
from deepep.nn.logits import router_logits
from deepep.nn.rows import expand_rows, reduce_rows, sort_pairs, sum_weighted_rows, sum_weighted_rows_backward
from deepep.nn.scaled import cast_rows, expand_scaled_rows
from deepep.sim.rules.local_experts import gate_gradients, gated

pytestmark = pytest.mark.gpu

SHAPES = [(0, 4, 3, 64), (1, 1, 1, 8), (37, 4, 5, 136), (300, 8, 32, 7168), (50, 32, 7, 256)]


def drawn(rows: int, topk: int, local: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_idx [N, K], some of it absent, and counts [L]."""
    idx = torch.randint(-1, local, (rows, topk), generator=torch.Generator().manual_seed(rows))
    return idx, torch.bincount(idx[idx >= 0], minlength=local)


def equal(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(ours.cpu(), wanted.cpu())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_sorted_spread_and_summed(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, topk, local, hidden = shape
    idx, counts = drawn(rows, topk, local)
    on_cpu = sort_pairs(idx.to(dtype), counts)
    pairs, slots, ends = sort_pairs(idx.to(dtype).cuda(), counts)
    for ours, wanted in zip((pairs, slots, ends), on_cpu, strict=True):
        assert ours.dtype == wanted.dtype
        assert equal(ours, wanted)
    x = torch.randn(rows, hidden).bfloat16()
    y = torch.randn(len(pairs), hidden).bfloat16()
    weights = torch.randn(rows, topk)
    assert kernels.serve_rows(topk, x.cuda())
    cpu, gpu = on_cpu[:2], (pairs, slots)
    assert equal(expand_rows(x.cuda(), *gpu), expand_rows(x, *cpu))
    assert equal(reduce_rows(y.cuda(), *gpu), reduce_rows(y, *cpu))
    wanted = sum_weighted_rows(y, weights, *cpu)
    assert equal(sum_weighted_rows(y.cuda(), weights.cuda(), *gpu), wanted)
    whole, small = (torch.randint(-8, 9, t.shape).bfloat16() for t in (x, y))  # products add up exactly
    ours = sum_weighted_rows_backward(whole.cuda(), small.cuda(), weights.cuda(), *gpu)
    for mine, theirs in zip(ours, sum_weighted_rows_backward(whole, small, weights, *cpu), strict=True):
        assert equal(mine, theirs)


@pytest.mark.parametrize(("rows", "hidden"), [(0, 128), (1, 128), (37, 1280), (300, 7168)])
def test_rows_are_cast_and_restored(rows: int, hidden: int) -> None:
    """Every magnitude, NaN and infinity; restored NaNs have no bits of their own."""
    topk = 4
    x = torch.randn(rows, hidden) * torch.logspace(-20, 20, hidden)
    x[rows // 2 :: 7, ::191] = float("nan")
    x[rows // 3 :: 5, ::301] = float("-inf")
    x = x.bfloat16()
    values, scales = cast_rows(x)
    on_gpu = cast_rows(x.cuda())
    assert equal(on_gpu[0].view(torch.uint8), values.view(torch.uint8))
    assert equal(on_gpu[1], scales)
    idx, counts = drawn(rows, topk, 5)
    pairs, slots, _ = sort_pairs(idx.cuda(), counts)
    assert kernels.serve_rows(topk, on_gpu[0])
    assert kernels.serve(*on_gpu)
    stand_in = torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda")
    ours = expand_scaled_rows(stand_in, *on_gpu, pairs, slots).cpu()
    wanted = expand_scaled_rows(stand_in.cpu(), values, scales, *sort_pairs(idx, counts)[:2])
    assert torch.equal(ours.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(ours[known].view(torch.int16), wanted[known].view(torch.int16))


def test_what_kernels_do_not_take_goes_through_torch() -> None:
    idx, counts = drawn(20, 4, 3)
    pairs, slots, _ = sort_pairs(idx.cuda(), counts)
    cpu = sort_pairs(idx, counts)[:2]
    for x in (torch.randn(20, 5).bfloat16(), torch.randn(20, 8, dtype=torch.float64)):
        assert equal(expand_rows(x.cuda(), pairs, slots), expand_rows(x, *cpu))
    y = torch.randn(len(pairs), 16)
    assert equal(reduce_rows(y.cuda(), pairs, slots), reduce_rows(y, *cpu))
    tilted = torch.randn(16, len(pairs)).bfloat16().cuda().t()
    assert equal(reduce_rows(tilted, pairs, slots), reduce_rows(tilted.cpu(), *cpu))


@pytest.mark.parametrize("width", [8, 24, 2048])
def test_swiglu_and_its_gradient(width: int) -> None:
    h = (4 * torch.randn(33, 2 * width)).bfloat16().cuda()
    grad = torch.randn(33, width).bfloat16().cuda()
    assert torch.equal(swiglu(h), gated(h))
    assert torch.equal(swiglu_backward(h, grad), gate_gradients(h, grad))


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 7, 0, 9], [130, 1, 0, 77]])
def test_grouped_products(counts: list[int]) -> None:
    """Against float64: terms of order 1, sums of up to 130 in float32, one rounding to bfloat16, 2^-9."""
    sizes = torch.tensor(counts)
    x, w = torch.randn(sum(counts), 64).bfloat16().cuda(), torch.randn(4, 64, 96).bfloat16().cuda()
    grad = torch.randn(sum(counts), 96).bfloat16().cuda()
    mine, by_weight = grouped_mm(x, w, sizes), grouped_mm_weight_grad(x, grad, sizes)
    wide = x.double(), w.double(), grad.double()
    for ours, wanted in (
        (mine, grouped_mm(wide[0], wide[1], sizes)),
        (grouped_mm(grad, w.transpose(1, 2), sizes), grouped_mm(wide[2], wide[1].transpose(1, 2), sizes)),
        (by_weight, grouped_mm_weight_grad(wide[0], wide[2], sizes)),
    ):
        torch.testing.assert_close(ours.double(), wanted, rtol=2.0**-8, atol=2.0**-12)


def test_the_experts_on_the_device_are_those_of_the_cpu() -> None:
    """Outputs and gradients, by norm. In bfloat16 every product, activation and weighted row is rounded, on
    both sides at other places: 2^-9 each, a dozen of them: 2^-5.
    """
    torch.manual_seed(0)
    idx, counts = drawn(60, 4, 5)
    experts = GroupedSwiGLU(5, 64, 32, dtype=torch.bfloat16)
    x, weights = torch.randn(60, 64).bfloat16(), torch.rand(60, 4)
    found = []
    for device in ("cpu", "cuda"):
        module = GroupedSwiGLU(5, 64, 32, dtype=torch.bfloat16, device=device)
        module.load_state_dict(experts.state_dict())
        rows, scale = (t.detach().to(device).clone().requires_grad_() for t in (x, weights))
        y = apply_experts(module, rows, idx.to(device), scale, counts)
        y.backward(torch.ones_like(y))
        found.append(
            [t.float().cpu() for t in (y, rows.grad, scale.grad, *(p.grad for p in module.parameters()))]
        )
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert (ours - wanted).norm() < 2.0**-5 * wanted.norm()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (300, 64, 8), (5000, 256, 8), (9, 1000, 32)])
def test_experts_are_chosen_as_by_a_stable_sort(tokens: int, experts: int, k: int) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), float("nan")])
    for scores in (torch.randn(tokens, experts), values[torch.randint(8, (tokens, experts))]):
        assert equal(stable_topk(scores.cuda(), k), stable_topk(scores, k))


def test_a_load_is_counted() -> None:
    idx = torch.randint(-1, 300, (5000, 8)).cuda()
    load = torch.arange(300).cuda()
    count_load(load, idx)
    wanted = torch.arange(300) + torch.bincount(idx[idx >= 0].cpu(), minlength=300)
    assert equal(load, wanted)
    many = torch.zeros(10_000, dtype=torch.int64).cuda()  # more than a kernel counts
    count_load(many, idx)
    assert equal(many[:300], wanted - torch.arange(300))


def test_logits_are_float32_products() -> None:
    """Against float64: 512 terms of order 2^-4, exact, added in float32: 2^-24 * 2^9 * 2^-2."""
    x, weight = torch.randn(70, 512).bfloat16().cuda(), (torch.randn(24, 512) / 16).bfloat16().cuda()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=0, atol=2.0**-17)
    grad = torch.randn(70, 24).cuda()
    by_x, by_weight = torch.autograd.grad(logits, (x, weight), grad)
    for ours, wanted in (
        (by_x, grad.double() @ weight.double()),
        (by_weight, grad.double().t() @ x.double()),
    ):
        torch.testing.assert_close(ours.double(), wanted, rtol=2.0**-8, atol=2.0**-12)


def test_second_derivatives_on_the_device() -> None:
    idx, counts = drawn(6, 3, 3)
    experts = GroupedSwiGLU(3, 16, 16, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(6, 16).bfloat16().cuda().requires_grad_()
    y = apply_experts(experts, x, idx.cuda(), torch.rand(6, 3).cuda(), counts)
    (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), x)
    assert second.isfinite().all()
    assert second.abs().sum() > 0
