"""The two steps that are recorded: a layer trained, and a layer's decode with two micro-batches in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep.api.buffer import Buffer
from deepep.bench.layer.rank import made_layer
from deepep.bench.sweep import Shape
from deepep.bench.timeline.record import Marks, Step
from deepep.gate import sigmoid_topk


@dataclass(frozen=True)
class StepShape:
    """Sizes of both steps: tokens of a rank in training, of each micro-batch in decode; width: of experts."""

    tokens: int
    decode_tokens: int
    hidden: int
    width: int
    topk: int
    experts: int


class Given(NamedTuple):
    """A micro-batch behind its attention: x [T, H], topk_idx and topk_weights [T, K]."""

    x: Tensor
    idx: Tensor
    weights: Tensor


def training_step(buffer: Buffer, shape: StepShape, device: torch.device) -> Step:
    """Attention (a product in its place), an MoE layer, the loss, the way back, plain SGD."""
    sizes = Shape(shape.tokens, shape.hidden, shape.topk, shape.experts)
    moe = made_layer(buffer, sizes, shape.width, device, seed=0)
    x = torch.randn(shape.tokens, shape.hidden, device=device).bfloat16()
    attention = (torch.randn(shape.hidden, shape.hidden, device=device) / shape.hidden**0.5).bfloat16()
    attention.requires_grad_()
    parameters = [attention, *moe.parameters()]

    def step(mark: Marks) -> None:
        with mark("attention"):
            h = x @ attention
        with mark("MoE layer"):
            y = moe(h)
        with mark("backward"):
            y.float().square().mean().backward()
        with mark("optimizer"), torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None

    return step


def decode_step(buffer: Buffer, shape: StepShape, device: torch.device) -> Step:
    """Two micro-batches: one computes while the rows of the other travel, and no kernel waits for them."""
    most, local = shape.decode_tokens, shape.experts // buffer.group_size
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    weight = torch.randn(local, shape.hidden, shape.hidden, **kind) / shape.hidden**0.5
    attention = torch.randn(shape.hidden, shape.hidden, **kind) / shape.hidden**0.5
    router = torch.randn(shape.hidden, shape.experts, **kind) / shape.hidden**0.5
    xs = torch.randn(2, most, shape.hidden, **kind)

    def attend(mark: Marks, number: int) -> Given:
        with mark("attention"):
            x = xs[number] @ attention
            idx, weights = sigmoid_topk((x @ router).float(), shape.topk)[:2]
        return Given(x, idx, weights)

    def send(mark: Marks, given: Given) -> Any:
        with mark("dispatch"):
            how: Any = {"use_fp8": False, "return_recv_hook": True}
            return buffer.low_latency_dispatch(given.x, given.idx, most, shape.experts, **how)

    def receive(mark: Marks, sent: Any) -> None:
        with mark("hook"):
            sent.hook()

    def compute(mark: Marks, sent: Any) -> Tensor:
        with mark("experts"):
            return torch.bmm(sent.recv_x, weight)

    def send_back(mark: Marks, y: Tensor, given: Given, sent: Any) -> Any:
        with mark("combine"):
            return buffer.low_latency_combine(y, given.idx, given.weights, sent.handle, return_recv_hook=True)

    @torch.no_grad()
    def step(mark: Marks) -> None:
        first = attend(mark, 0)
        sent0 = send(mark, first)
        second = attend(mark, 1)  # while the first one's rows travel, and so on in turn
        receive(mark, sent0)
        sent1 = send(mark, second)
        y0 = compute(mark, sent0)
        receive(mark, sent1)
        back0 = send_back(mark, y0, first, sent0)
        y1 = compute(mark, sent1)
        receive(mark, back0)
        back1 = send_back(mark, y1, second, sent1)
        receive(mark, back1)

    return step
