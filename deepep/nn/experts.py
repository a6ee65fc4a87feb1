"""SwiGLU experts: this rank's, over rows sorted by expert, and a dense one that every token visits.

Shapes: P rows, L local experts, H hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepep.errors import ArgumentTypeError, DeviceError, ShapeError
from deepep.nn.activation import gated
from deepep.nn.grouped import grouped_mm
from deepep.nn.precision import check_input, check_plain, is_distributed, known_device, operands
from deepep.placement.experts import EMPTY
from deepep.runtime.checks import INDEX_DTYPES, check_int, dtype_names

MAX_EXPERTS = 1 << 16
MAX_HIDDEN = 1 << 20
MAX_SEED = 1 << 42


def _check_counts(counts: object) -> None:
    """Raises ArgumentTypeError for what is no dense tensor of integers."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(counts, Tensor):
        raise ArgumentTypeError("counts", type(counts).__name__, "a tensor")
    if counts.layout != torch.strided or counts.dtype not in INDEX_DTYPES:
        got = f"{counts.dtype}, {counts.layout}".replace("torch.", "")
        raise ArgumentTypeError("counts", got, "a dense tensor of int64")


def _checked_numbers(numbers: object, num_local_experts: int) -> tuple[int, ...] | None:
    """Experts' numbers in the whole model. Raises ArgumentTypeError, ShapeError or RangeError."""
    if numbers is None:
        return None
    if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes):
        raise ArgumentTypeError("numbers", type(numbers).__name__, "a list of integers or None")
    if len(numbers) != num_local_experts:
        raise ShapeError("numbers", f"[{len(numbers)}]", f"[{num_local_experts}]")
    return tuple(check_int("numbers", number, EMPTY, MAX_EXPERTS) for number in numbers)


def _check_ends(ends: object, x: Tensor, num_local_experts: int) -> None:
    """Raises ArgumentTypeError, ShapeError or DeviceError for what is no [L] int32 on x's device."""
    if torch.compiler.is_compiling():
        return
    found = check_plain("ends", ends)
    if found.dtype != torch.int32:
        raise ArgumentTypeError("ends", dtype_names([found.dtype]), "int32")
    if found.shape != (num_local_experts,):
        raise ShapeError("ends", str(list(found.shape)), f"[{num_local_experts}]")
    if found.device != x.device:
        raise DeviceError("ends", str(found.device), f"{x.device}, where the rows are")


class GroupedSwiGLU(nn.Module):
    """L experts y = (silu(x W_gate) * (x W_up)) W_down over rows sorted by expert.

    gate_up: [L, H, 2F], the gate in the first F columns. down: [L, F, H]. Expert l is drawn from `seed` and
    its number in the whole model: first_expert + l, or the l-th of `numbers`; of -1, an empty place, all
    weights are 0. Under torch.autocast rows and
    weights are multiplied in its dtype; else rows must have the weights' dtype.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        expert_hidden: int,
        *,
        seed: int = 0,
        first_expert: int = 0,
        numbers: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_local_experts", num_local_experts, 1, MAX_EXPERTS)
        check_int("hidden", hidden, 1, MAX_HIDDEN)
        check_int("expert_hidden", expert_hidden, 1, MAX_HIDDEN)
        self.num_local_experts, self.seed, self.first_expert = num_local_experts, seed, first_expert
        self.numbers = _checked_numbers(numbers, num_local_experts)
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
        consecutive = range(self.first_expert, self.first_expert + self.num_local_experts)
        for local, number in enumerate(consecutive if self.numbers is None else self.numbers):
            generator = None if number == EMPTY else generator_of(self.seed * 1_000_003 + number)
            for target in targets:
                if generator is None:
                    target[local].zero_()
                    continue
                target[local].copy_(normal(target.shape[1:], target.shape[1], generator))
        if sharded:
            for weight, target in zip(weights, targets, strict=True):
                fill(weight, target)

    def forward(self, x: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
        """x [P, H] sorted by expert, counts [L] int64 on the CPU -> [P, H].

        ends [L] int32 on x's device: where each expert's rows end; made of counts, if not given. Raises
        ArgumentTypeError, ShapeError or DeviceError.
        """
        check_input(x, self.down, self.gate_up.shape[1], ndim=2)
        _check_counts(counts)
        if ends is not None:
            _check_ends(ends, x, self.num_local_experts)
        x, gate_up, down = operands(x, self.gate_up, self.down)
        return grouped_mm(gated(grouped_mm(x, gate_up, counts, ends)), down, counts, ends)


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
        return gated(x @ gate_up) @ down


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
