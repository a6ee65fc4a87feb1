"""A run of `bench --mode layer`, as one rank sees it. All ranks make the same calls in the same order."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from deepep.api.buffer import Buffer
from deepep.bench.clock import Call, Clock, CudaClock, Stage
from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.layer.plain import PlainLayer, Products
from deepep.bench.low_latency.graph import capture
from deepep.bench.rank import FUNCTIONAL, TIMEOUT, Bench, Progress, WrongResultError
from deepep.bench.sweep import SCALE_GROUP, Shape, Sweep
from deepep.nn import ExpertParallelMoE
from deepep.nn.exchange import dispatch

FORWARD, TRAINED = "forward", "forward + backward"
PLAIN, PRODUCTS = "plain torch", "products alone"
#: The layer with fp8_dispatch: other results, three digits of mantissa, that are not compared.
SCALED = f"{OURS}, FP8 rows"
#: The layer with num_max_tokens, in CUDA graphs where there is CUDA.
FIXED = f"{OURS}, fixed shapes"
#: The Frobenius norm of the difference between two layers' results, over the norm. Both round weights,
#: weighted rows, sums of a rank and of all to bfloat16, in another order: 2^-9 each at most, and in the
#: backward as much again. With every row astray it is above 1.
TOLERANCE = 2.0**-6

Layer = Callable[[Tensor], Tensor]


def run_layer_rank(
    group: Any, device: torch.device, sweep: Sweep, say: Progress = lambda line: None
) -> BenchReport:
    """Measures the layer for all shapes of `sweep` on this rank, as `deepep.bench.rank.run_rank` does."""
    buffer = Buffer(group, backend=sweep.backend, device=device, timeout=TIMEOUT)
    bench = LayerBench(group, device, sweep, buffer, say)
    try:
        bench.measure_layers()
    except WrongResultError as wrong:
        bench.report.problems.append(str(wrong))
    buffer.destroy()
    return bench.report


class LayerBench(Bench):
    """See `run_layer_rank`."""

    def measure_layers(self) -> None:
        """Fills the report. Raises WrongResultError, on every rank."""
        sweep, report = self._sweep, self.report
        report.environment |= {"mode": sweep.mode, "width": sweep.width}
        if self._device.type == "cpu":
            report.notes.append(FUNCTIONAL)
        if not sweep.check:
            report.notes.append("Results were not compared with plain torch's (--no-check).")
        for shape in sweep.shapes:
            self._measure_layer(shape)

    def _make_clock(self) -> Clock:
        clock = super()._make_clock()
        if isinstance(clock, CudaClock):
            clock.host_calls = 1  # a call takes as long as a thousand of what others measure
        return clock

    def _measure_layer(self, shape: Shape) -> None:
        sweep = self._sweep
        moe = made_layer(self._buffer, shape, sweep.width, self._device, sweep.seed)
        generator = torch.Generator(self._device).manual_seed(sweep.seed * 1_000 + self._rank)
        x, grad = (
            torch.randn(shape.tokens, shape.hidden, generator=generator, device=self._device).bfloat16()
            for _ in range(2)
        )
        plain = PlainLayer(self._group, moe)
        if sweep.check:
            self._compare(shape, moe, plain, x, grad)
        products = Products(moe, received_counts(self._buffer, moe, x))
        layers: list[tuple[str, Layer]] = [(OURS, moe), (PLAIN, plain)]
        if shape.hidden % SCALE_GROUP == 0:
            layers.insert(1, (SCALED, with_scaled_rows(moe)))
        for by, layer in layers:
            self._time(shape, FORWARD, by, _inference(layer, x))
        forward, step = self._in_fixed_shapes(shape, moe, x, grad)
        self._time(shape, FORWARD, FIXED, forward)
        self._time(shape, FORWARD, PRODUCTS, products.forward)
        for by, layer in layers:
            self._time(shape, TRAINED, by, _step(moe, layer, x, grad))
        self._time(shape, TRAINED, FIXED, step)
        self._time(shape, TRAINED, PRODUCTS, products.forward_backward)

    def _in_fixed_shapes(
        self, shape: Shape, moe: ExpertParallelMoE, x: Tensor, grad: Tensor
    ) -> tuple[Call, Call]:
        """A forward and a step in fixed shapes, in CUDA graphs on CUDA. Raises WrongResultError."""
        fixed, held = copy(moe), x.clone().requires_grad_()
        fixed.num_max_tokens = shape.tokens

        def step() -> Tensor:
            held.grad = None
            fixed.zero_grad()
            fixed(held).backward(grad)
            assert held.grad is not None
            return held.grad

        forward, output = self._captured(_inference(fixed, x))
        step_again, gradient = self._captured(step)
        moe.zero_grad()
        if self._sweep.check:
            usual = trained(moe, moe, x, grad)
            for name, made in (("output", output), ("gradient of x", gradient)):
                off = difference(made, usual[name])
                mine = "" if off <= TOLERANCE else f"{name}: off by {off:.2e} of its norm"
                self._agree(f"{shape} {FIXED} {name}", mine, ours=True)
        return forward, step_again

    def _captured(self, call: Callable[[], Tensor]) -> tuple[Call, Tensor]:
        """Capture a call, on CUDA: what repeats it, and the tensor that it gives."""
        if self._device.type == "cpu":
            return call, call()
        outputs: list[Tensor] = []
        again = capture(lambda: outputs.append(call()), 1, self._device).replay
        again()
        return again, outputs[-1]

    def _time(self, shape: Shape, operation: str, by: str, call: Call | Stage) -> None:
        self._say(f"{shape} {by} {operation}")
        timing = self._clock.measure(call)
        figure = Figure(
            shape,
            operation,
            by,
            "fp8" if by == SCALED else "bf16",
            None,
            timing.median,
            timing.p99,
            timing.host,
        )
        self.report.figures.append(figure)

    def _compare(self, shape: Shape, moe: ExpertParallelMoE, plain: Layer, x: Tensor, grad: Tensor) -> None:
        """Compares outputs and gradients. Raises WrongResultError, on every rank."""
        ours, theirs = (trained(moe, layer, x, grad) for layer in (moe, plain))
        for name, wanted in theirs.items():
            off = difference(ours[name], wanted)
            mine = "" if off <= TOLERANCE else f"{name}: off by {off:.2e} of its norm"
            self._agree(f"{shape} {name}, by {PLAIN}", mine, ours=True)


def made_layer(buffer: Any, shape: Shape, width: int, device: torch.device, seed: int) -> ExpertParallelMoE:
    """A layer whose weights are drawn on the device: those of a large one would take minutes on the CPU."""
    moe = ExpertParallelMoE(
        buffer,
        hidden=shape.hidden,
        expert_hidden=width,
        num_experts=shape.experts,
        num_topk=shape.topk,
        device="meta",
        dtype=torch.bfloat16,
    ).to_empty(device=device)
    alike = torch.Generator(device).manual_seed(seed)
    own = torch.Generator(device).manual_seed(seed * 1_000 + 1 + buffer.rank)
    moe.router.bias.zero_()
    moe.router.load.zero_()
    with torch.no_grad():
        moe.router.weight.normal_(0.0, shape.hidden**-0.5, generator=alike)
        for weight in (moe.experts.gate_up, moe.experts.down):
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=own)
    return moe


def with_scaled_rows(moe: ExpertParallelMoE) -> ExpertParallelMoE:
    """The same layer, of the same parameters, with fp8_dispatch."""
    scaled = copy(moe)
    scaled.fp8_dispatch = True
    return scaled


def received_counts(buffer: Any, moe: ExpertParallelMoE, x: Tensor) -> Tensor:
    """(Row, expert) pairs of each local expert [L] int64, on the CPU. Collective."""
    with torch.no_grad():
        routing = moe.router(x)
        found = dispatch(buffer, x, routing.topk_idx, routing.topk_weights, moe.num_experts).topk_idx
    return torch.bincount(found[found >= 0].flatten().cpu(), minlength=moe.num_local_experts)


def trained(moe: ExpertParallelMoE, layer: Layer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of one step, by name."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    found = {"output": y.detach(), "gradient of x": x.grad}
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over the norm, in float32; not finite where a value is not."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _inference(layer: Layer, x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    return call


def _step(moe: ExpertParallelMoE, layer: Layer, x: Tensor, grad: Tensor) -> Stage:
    """A forward and its backward; gradients are fresh every time, as after `zero_grad`."""
    x = x.clone().requires_grad_()

    def call() -> None:
        layer(x).backward(grad)

    def forget(result: object) -> None:
        x.grad = None
        moe.zero_grad()

    return Stage(lambda: call, forget)
