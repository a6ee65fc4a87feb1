"""A model with experts on all ranks, for training that ranks leave (training.py), and its oracle.

The oracle is one process: the same layers, rank after rank; tokens go from one to the other by indexing, and
are given the best of the columns of those experts that are left. A token goes to two experts, so no sum of
its parts has an order, and weights are the training's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepep.gate import WEIGHT_SUM_FLOOR
from deepep.nn import ExpertParallelMoE
from deepep.nn.logits import router_logits
from deepep.nn.moe import apply_experts
from deepep.reference.all_reduce import all_reduce

EXPERT_PHASES = ("dispatch", "combine", "combine-backward", "dispatch-backward")
"""Moments of a step: when rows of an exchange of the layer begin to travel, in the forward or backward."""
_EXCHANGES = {
    ("dispatch", 0): "dispatch",
    ("combine", 0): "combine",
    ("dispatch", 1): "combine-backward",
    ("combine", 1): "dispatch-backward",
}
WIDTH, _HIDDEN, _OUT, BATCH, TOPK = 24, 16, 8, 6, 2
EXPERTS_PER_RANK = 2


class ExpertModel(nn.Module):
    """A layer of experts between two that every rank has."""

    def __init__(self, buffer: Any, num_ranks: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, _HIDDEN, device="cpu", dtype=dtype)
        self.last = nn.Linear(_HIDDEN, _OUT, device="cpu", dtype=dtype)
        self.moe = ExpertParallelMoE(
            buffer,
            hidden=_HIDDEN,
            expert_hidden=12,
            num_experts=EXPERTS_PER_RANK * num_ranks,
            num_topk=TOPK,
            seed=1,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [T, WIDTH] -> [T, 8]."""
        out: Tensor = self.last(self.moe(torch.tanh(self.first(x))))
        return out


def tokens_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A rank's batch of a step, [T, WIDTH], of another size on each."""
    generator = torch.Generator(device="cpu").manual_seed(1000 * step + rank)
    return torch.randn(BATCH + rank % 3, WIDTH, generator=generator, device="cpu").to(dtype)


class ExchangeWatch:
    """Observer of a buffer's engine that knows the exchanges of a step, of which `begin` begins one."""

    def __init__(self, reached: Any) -> None:
        self._reached = reached
        self.begin()

    def begin(self) -> None:
        """The next exchanges are a step's first."""
        self._counts: dict[str, int] = {}

    def observed(self, operation: str, phase: str) -> None:
        """An operation begins a phase."""
        if phase == "payload":
            number = self._counts.get(operation, 0)
            self._counts[operation] = number + 1
            name = _EXCHANGES.get((operation, number))
            if name is not None:
                self._reached(name)


class BufferPlace:
    """Stands for the buffer of a rank, for a layer's weights alone."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.group_size, self.group = rank, num_ranks, None


def models_of(num_ranks: int, dtype: torch.dtype = torch.float32) -> dict[int, ExpertModel]:
    """The model of each rank, with that rank's experts."""
    places = [BufferPlace(rank, num_ranks) for rank in range(num_ranks)]
    return {rank: ExpertModel(place, num_ranks, dtype) for rank, place in enumerate(places)}


def backward(models: Mapping[int, ExpertModel], members: Sequence[int], inputs: Mapping[int, Tensor]) -> None:
    """Gradients of the members' losses, each its own; of experts the sum over them, by their number."""
    total = torch.zeros((), device="cpu")
    for rank, out in _outputs(models, members, inputs).items():
        total = total + models[rank].last(out).square().mean()
    total.backward()
    for rank in members:
        for parameter in models[rank].moe.expert_parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad * 1 / len(members)


def sent_to(members: Sequence[int], models: Mapping[int, ExpertModel]) -> Tensor:
    """The experts that the members hold, ascending: those that tokens may go to."""
    return torch.tensor([e for rank in members for e in models[rank].moe.expert_numbers], device="cpu")


def _outputs(
    models: Mapping[int, ExpertModel], members: Sequence[int], inputs: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """The output of the layer of experts for each member's tokens, with the members' experts alone."""
    left = sent_to(members, models)
    sent, chosen, weights = {}, {}, {}
    for rank in members:
        tokens = torch.tanh(models[rank].first(inputs[rank]))
        # Of all columns: what a sigmoid's bits are may depend on where in a vector an element stands.
        scores = torch.sigmoid(router_logits(tokens, models[rank].moe.router.weight))[:, left]
        best = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices[:, :TOPK]
        shares = scores.gather(1, best)
        sent[rank], chosen[rank] = tokens.view_as(tokens), left[best]
        weights[rank] = (shares / (shares.sum(-1, keepdim=True) + WEIGHT_SUM_FLOOR)).float()
    out = {rank: torch.zeros_like(sent[rank]) for rank in members}
    for target in members:
        is_here = {rank: chosen[rank] // EXPERTS_PER_RANK == target for rank in members}
        rows = {rank: here.any(1).nonzero().flatten() for rank, here in is_here.items()}
        local = {r: torch.where(is_here[r], chosen[r] - EXPERTS_PER_RANK * target, -1) for r in members}
        made = apply_experts(
            models[target].moe.experts,
            torch.cat([sent[rank][rows[rank]] for rank in members]),
            torch.cat([local[rank][rows[rank]] for rank in members]),
            torch.cat([torch.where(is_here[r], weights[r], 0)[rows[r]] for r in members]),
        )
        parts = made.split([len(rows[rank]) for rank in members])
        for rank, part in zip(members, parts, strict=True):
            out[rank] = out[rank].index_add(0, rows[rank], part)
    return out


def train_alone(
    num_ranks: int,
    members: Sequence[Sequence[int]],
    buckets: Sequence[Sequence[Sequence[str]]],
    optimizer_of: Any,
) -> dict[int, ExpertModel]:
    """The models of the last step's members, after as many steps, each over its members. buckets: of each
    step, the names of the parameters that were summed together.
    """
    models = models_of(num_ranks)
    optimizers = {rank: optimizer_of(model) for rank, model in models.items()}
    for step, ranks in enumerate(members):
        for rank in ranks:
            models[rank].zero_grad()
        backward(models, ranks, {rank: tokens_of(rank, step) for rank in ranks})
        for names in buckets[step]:
            parameters = {rank: [models[rank].get_parameter(name) for name in names] for rank in ranks}
            inputs = [torch.cat([_gradient(p).flatten() for p in parameters[rank]]) for rank in ranks]
            mean = all_reduce(inputs, "direct", "fixed32", mean=True)
            for rank in ranks:
                parts = mean.split([p.numel() for p in parameters[rank]])
                for parameter, part in zip(parameters[rank], parts, strict=True):
                    parameter.grad = part.view_as(parameter).clone()
        for rank in ranks:
            optimizers[rank].step()
    return {rank: models[rank] for rank in members[-1]}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
