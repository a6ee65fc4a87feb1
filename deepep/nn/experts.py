"""Grouped SwiGLU experts over the rows a rank received, as operators that torch.compile traces through.

A received row may be wanted by several local experts. `expert_rows` lists the (row, top-k entry) pairs
sorted by expert, `expand_rows` makes one row per pair, `grouped_mm` multiplies each expert's rows by that
expert's matrix, and `reduce_rows` sums the pairs of a row again. expand and reduce are each other's
backward, as dispatch and combine are one level up. Sums run over top-k entries ascending, so results do not
depend on the device or on atomics.

Shapes: N received rows, K top-k, P pairs (entries that are not -1), L local experts, H hidden, F expert
hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.nn.operators import operator
from deepep.nn.precision import check_input, is_distributed, known_device, operands
from deepep.runtime.checks import INDEX_DTYPES, check_int

MAX_EXPERTS = 1 << 16
MAX_HIDDEN = 1 << 20
MAX_SEED = 1 << 42


@operator("expert_rows")
def expert_rows(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the entries of `topk_idx` [N, K] (local expert or -1) by expert, then row, then k.

    Returns pairs [P] int64: row * K + k of each valid entry; counts [L] int64 on the CPU: pairs of each
    expert; slots [N, K] int64: where in `pairs` an entry stands, -1 for entries that are -1. Raises
    RangeError for an entry that is no local expert.
    """
    flat = topk_idx.flatten()
    order = torch.sort(flat, stable=True).indices  # the -1 entries first
    outside = (flat < -1) | (flat >= num_local_experts)
    bins = torch.where(outside, num_local_experts + 1, flat + 1)
    counts = torch.bincount(bins, minlength=num_local_experts + 2).cpu()  # [-1, L experts, anything else]
    if counts[-1]:
        raise RangeError("topk_idx", f"{int(counts[-1])} others", f"-1 to {num_local_experts - 1}")
    pairs = order[int(counts[0]) :].clone()
    slots = torch.full_like(flat, -1, dtype=torch.int64)
    slots[pairs] = torch.arange(len(pairs), device=flat.device)
    return pairs, counts[1:-1].clone(), slots.view(topk_idx.shape)


@expert_rows.register_fake
def _(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        topk_idx.new_empty(num_pairs, dtype=torch.int64),
        torch.empty(num_local_experts, dtype=torch.int64, device="cpu"),
        torch.empty_like(topk_idx, dtype=torch.int64),
    )


@operator("expand_rows")
def expand_rows(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """x [N, H] -> [P, H]: row `pairs[p] // K` for every pair p."""
    return x.index_select(0, pairs // slots.shape[1])


@expand_rows.register_fake
def _(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(pairs.shape[0], x.shape[1])


@operator("reduce_rows")
def reduce_rows(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """y [P, H] -> [N, H]: the sum of a row's pairs, k ascending, in float32 at least, rounded once."""
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros(slots.shape[0], y.shape[1], dtype=wide)
    for k in range(slots.shape[1]):
        rows = (slots[:, k] >= 0).nonzero().squeeze(1)  # each row once: no two addends race for one sum
        total.index_add_(0, rows, y.index_select(0, slots[rows, k]).to(wide))
    return total.to(y.dtype)


@reduce_rows.register_fake
def _(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


def _save_rows(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


expand_rows.register_autograd(
    lambda ctx, grad: (reduce_rows(grad, *ctx.saved_tensors), None, None), setup_context=_save_rows
)
reduce_rows.register_autograd(
    lambda ctx, grad: (expand_rows(grad, *ctx.saved_tensors), None, None), setup_context=_save_rows
)


@operator("grouped_mm")
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [P, A], weight [L, A, B], counts [L] on the CPU -> [P, B]: each expert's rows times its matrix.

    counts add up to P. Raises ArgumentTypeError or ShapeError.
    """
    if x.dtype != weight.dtype:
        raise ArgumentTypeError("x", str(x.dtype), f"{weight.dtype}, the weights' dtype")
    if counts.shape != weight.shape[:1]:
        raise ShapeError("counts", str(list(counts.shape)), f"[{weight.shape[0]}]")
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, (rows, target) in enumerate(_split(counts, x, out)):
        torch.mm(rows, weight[expert], out=target)
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@operator("grouped_mm_weight_grad")
def grouped_mm_weight_grad(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """x [P, A], grad [P, B] -> [L, A, B]: the gradient of `grouped_mm` with respect to its weights."""
    out = x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])
    for expert, (rows, grads) in enumerate(_split(counts, x, grad)):
        torch.mm(rows.t(), grads, out=out[expert])
    return out


@grouped_mm_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])


def _check_counts(counts: object) -> None:
    """Raises ArgumentTypeError for what is no dense tensor of integers."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(counts, Tensor):
        raise ArgumentTypeError("counts", type(counts).__name__, "a tensor")
    if counts.layout != torch.strided or counts.dtype not in INDEX_DTYPES:
        got = f"{counts.dtype}, {counts.layout}".replace("torch.", "")
        raise ArgumentTypeError("counts", got, "a dense tensor of int64")


def _split(counts: Tensor, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    sizes = counts.tolist()
    if sum(sizes) != len(tensors[0]) or min(sizes, default=0) < 0:
        raise ShapeError("counts", str(sizes), f"counts from 0 of sum {len(tensors[0])}, the rows")
    return zip(*(t.split(sizes) for t in tensors), strict=True)


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_mm(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_mm_weight_grad(x, grad, counts) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


def _weight_grad_backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, grad, counts = ctx.saved_tensors
    by_x = grouped_mm(grad, grad_weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    by_grad = grouped_mm(x, grad_weight, counts) if ctx.needs_input_grad[1] else None
    return by_x, by_grad, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_grouped_mm)
grouped_mm_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_grouped_mm)


class GroupedSwiGLU(nn.Module):
    """L experts y = (silu(x W_gate) * (x W_up)) W_down over rows sorted by expert.

    gate_up: [L, H, 2F], the gate in the first F columns. down: [L, F, H]. Expert l is drawn from `seed` and
    its number in the whole model, first_expert + l. Under torch.autocast rows and weights are multiplied in
    its dtype; else rows must have the weights' dtype.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        expert_hidden: int,
        *,
        seed: int = 0,
        first_expert: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_local_experts", num_local_experts, 1, MAX_EXPERTS)
        check_int("hidden", hidden, 1, MAX_HIDDEN)
        check_int("expert_hidden", expert_hidden, 1, MAX_HIDDEN)
        self.num_local_experts, self.seed, self.first_expert = num_local_experts, seed, first_expert
        shapes = (num_local_experts, hidden, 2 * expert_hidden), (num_local_experts, expert_hidden, hidden)
        self.gate_up, self.down = (parameter(shape, device, dtype) for shape in shapes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None, first_expert: int | None = None) -> None:
        """Draws every expert from its own generator: a model is the same however many ranks share it.

        seed, first_expert: None for those of before.
        """
        self.seed = check_int("seed", self.seed if seed is None else seed, -MAX_SEED, MAX_SEED)
        first = self.first_expert if first_expert is None else first_expert
        self.first_expert = check_int("first_expert", first, 0, MAX_EXPERTS)
        weights = (self.gate_up, self.down)
        if any(weight.is_meta for weight in weights):
            return
        sharded = any(is_distributed(weight) for weight in weights)
        targets = [torch.empty(w.shape, dtype=w.dtype, device="cpu") if sharded else w for w in weights]
        for local in range(self.num_local_experts):
            generator = generator_of(self.seed * 1_000_003 + self.first_expert + local)
            for target in targets:
                target[local].copy_(normal(target.shape[1:], target.shape[1], generator))
        if sharded:
            for weight, target in zip(weights, targets, strict=True):
                fill(weight, target)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [P, H] sorted by expert, counts [L] int64 on the CPU -> [P, H].

        Raises ArgumentTypeError, ShapeError or DeviceError.
        """
        check_input(x, self.down, self.gate_up.shape[1], ndim=2)
        _check_counts(counts)
        x, gate_up, down = operands(x, self.gate_up, self.down)
        gate, up = grouped_mm(x, gate_up, counts).chunk(2, dim=1)
        return grouped_mm(nn.functional.silu(gate) * up, down, counts)


class SwiGLU(nn.Module):
    """One dense SwiGLU on [.., H]: the shared expert every token visits, kept on every rank."""

    def __init__(
        self,
        hidden: int,
        expert_hidden: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden", hidden, 1, MAX_HIDDEN)
        check_int("expert_hidden", expert_hidden, 1, MAX_HIDDEN)
        self.seed = seed
        self.gate_up = parameter((hidden, 2 * expert_hidden), device, dtype)
        self.down = parameter((expert_hidden, hidden), device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws both matrices from `seed`, or from that of before."""
        self.seed = check_int("seed", self.seed if seed is None else seed, -MAX_SEED, MAX_SEED)
        generator = generator_of(self.seed)
        for weight in (self.gate_up, self.down):
            if not weight.is_meta:
                fill(weight, normal(weight.shape, weight.shape[0], generator))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., H] -> [.., H]. Raises ArgumentTypeError, ShapeError or DeviceError."""
        check_input(x, self.down, self.gate_up.shape[0])
        x, gate_up, down = operands(x, self.gate_up, self.down)
        gate, up = (x @ gate_up).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ down


def parameter(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """A parameter without values, fit for training even if it is made in torch.inference_mode.

    Raises ArgumentTypeError or RangeError.
    """
    if device is not None:
        device = known_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        got = str(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise ArgumentTypeError("dtype", got, "a floating-point torch.dtype")
    with torch.inference_mode(False):
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU, whatever torch's default device is."""
    return torch.Generator("cpu").manual_seed(seed)


def normal(shape: Sequence[int], fan_in: int, generator: torch.Generator) -> Tensor:
    """Normal with variance 1 / fan-in, drawn in float32 on the CPU: the same on every device and dtype."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu") / fan_in**0.5


def fill(weight: Tensor, values: Tensor) -> None:
    """Writes values, which every rank has whole, into a tensor or into this rank's shards of a DTensor."""
    if is_distributed(weight):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(weight, DTensor)
        mesh, placements = weight.device_mesh, weight.placements
        values = distribute_tensor(values.to(weight.dtype), mesh, placements, src_data_rank=None)
    weight.copy_(values)
