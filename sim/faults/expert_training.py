"""A model with experts on all ranks, for training that ranks leave (training.py), and its oracle.

The oracle is one process: the same layers, rank after rank; tokens go from one to the other by indexing, and
are given the best of the columns of those experts that are left. A token goes to two experts, so no sum of
its parts has an order, and weights are the training's bit for bit, wherever experts are: those that are
restored after a death go on where they were, on a rank without tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepep.gate import WEIGHT_SUM_FLOOR
from deepep.nn import ExpertParallelMoE
from deepep.nn.logits import router_logits
from deepep.nn.moe import apply_experts
from deepep.placement import contiguous, with_spare
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
MAX_NORM = 0.01
"""Of gradients, where they are clipped: less than they have."""
SPARE = 2
"""Empty places on every rank, where ranks keep copies of each other's experts."""


class ExpertModel(nn.Module):
    """A layer of experts between two that every rank has."""

    def __init__(
        self, buffer: Any, num_ranks: int, dtype: torch.dtype = torch.float32, spare: int = 0
    ) -> None:
        """spare: empty places on every rank."""
        super().__init__()
        num_experts = EXPERTS_PER_RANK * num_ranks
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, _HIDDEN, device="cpu", dtype=dtype)
        self.last = nn.Linear(_HIDDEN, _OUT, device="cpu", dtype=dtype)
        self.moe = ExpertParallelMoE(
            buffer,
            hidden=_HIDDEN,
            expert_hidden=12,
            num_experts=num_experts,
            num_topk=TOPK,
            placement=with_spare(contiguous(num_experts, num_ranks), spare) if spare else None,
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


def backward(
    models: Mapping[int, ExpertModel],
    members: Sequence[int],
    inputs: Mapping[int, Tensor],
    hosts: Sequence[int] = (),
) -> None:
    """Gradients of the members' losses, each its own; of experts the sum over them, by their number. hosts:
    ranks whose experts there are; the members', if none are given.
    """
    hosts = hosts or members
    total = torch.zeros((), device="cpu")
    for rank, out in _outputs(models, members, inputs, hosts).items():
        total = total + models[rank].last(out).square().mean()
    total.backward()
    for rank in hosts:
        for parameter in models[rank].moe.expert_parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad * 1 / len(members)


def sent_to(members: Sequence[int], models: Mapping[int, ExpertModel]) -> Tensor:
    """The experts that the members hold, ascending: those that tokens may go to."""
    return torch.tensor([e for rank in members for e in models[rank].moe.expert_numbers], device="cpu")


def _outputs(
    models: Mapping[int, ExpertModel],
    members: Sequence[int],
    inputs: Mapping[int, Tensor],
    hosts: Sequence[int],
) -> dict[int, Tensor]:
    """The output of the layer of experts for each member's tokens, with the hosts' experts alone."""
    left = sent_to(hosts, models)
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
    for target in hosts:
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
    restored: Sequence[Mapping[int, int]] | None = None,
    clips: bool = False,
) -> dict[int, ExpertModel]:
    """The models of all ranks after as many steps, each over its members. buckets: of each step, the names of
    the parameters that were summed together. restored: before each step, the experts that are set back to
    what they were after so many steps; those of other dead ranks are lost, and all if it is None. clips: to
    MAX_NORM, by the norm over all parameters.
    """
    models = models_of(num_ranks)
    optimizers = {rank: optimizer_of(model) for rank, model in models.items()}
    history: list[dict[int, list[Tensor]]] = []
    kept: set[int] = set()
    for step, ranks in enumerate(members):
        if restored is not None:
            kept |= {expert // EXPERTS_PER_RANK for expert in restored[step]}
        for rank in set(ranks) - set(members[step - 1] if step else ranks):  # it has joined
            source = min(set(ranks) & set(members[step - 1]))
            _catch_up(models[rank], optimizers[rank], models[source], optimizers[source])
        hosts = sorted({*ranks, *kept})
        history.append(_copies(models, optimizers))
        for expert, version in ({} if restored is None else restored[step]).items():
            rows, values = _rows(models, optimizers, expert), history[version][expert]
            for place, row in enumerate(rows):  # what an optimizer did not keep yet is 0
                row.copy_(values[place]) if place < len(values) else row.zero_()
        history[step] = _copies(models, optimizers)  # those are made anew
        for rank in hosts:
            models[rank].zero_grad()
        backward(models, ranks, {rank: tokens_of(rank, step) for rank in ranks}, hosts)
        for names in buckets[step]:
            parameters = {rank: [models[rank].get_parameter(name) for name in names] for rank in ranks}
            inputs = [torch.cat([_gradient(p).flatten() for p in parameters[rank]]) for rank in ranks]
            mean = all_reduce(inputs, "direct", "fixed32", mean=True)
            for rank in ranks:
                parts = mean.split([p.numel() for p in parameters[rank]])
                for parameter, part in zip(parameters[rank], parts, strict=True):
                    parameter.grad = part.view_as(parameter).clone()
        if clips:
            _clip([models[rank] for rank in hosts])
        for rank in hosts:
            optimizers[rank].step()
    return models


def _catch_up(
    model: ExpertModel, optimizer: torch.optim.Optimizer, other: ExpertModel, others: torch.optim.Optimizer
) -> None:
    """Has a rank's model and optimizer have what another's have, but for experts."""
    own = {id(parameter) for parameter in model.moe.expert_parameters()}
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if id(mine) not in own:
            mine.data.copy_(theirs.data)
            if theirs in others.state:
                optimizer.state[mine] = {name: value.clone() for name, value in others.state[theirs].items()}


def _clip(models: Sequence[ExpertModel]) -> None:
    """Clips the gradients of ranks' models together: what all have counts once."""

    def norm(gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(g).double() for g in gradients]).norm()

    experts = [[_gradient(p) for p in model.moe.expert_parameters()] for model in models]
    own = {id(p) for p in models[0].moe.expert_parameters()}
    shared = [_gradient(p) for p in models[0].parameters() if id(p) not in own]
    total = torch.stack([norm(shared), *map(norm, experts)]).norm()
    coefficient = (MAX_NORM / (total + 1e-6)).clamp(max=1.0)
    for model in models:
        for parameter in model.parameters():
            _gradient(parameter).mul_(coefficient)


def digests(model: ExpertModel) -> dict[str, str]:
    """Hashes of the weights' bits: of all that every rank has, and of each expert that is here."""
    shared, experts = hashlib.sha256(), list(model.moe.expert_parameters())
    own = {id(parameter) for parameter in experts}
    for parameter in model.parameters():
        if id(parameter) not in own:
            shared.update(parameter.detach().numpy().tobytes())
    found = {"shared": shared.hexdigest()}
    for place, expert in enumerate(model.moe.expert_numbers):
        if expert >= 0:
            rows = b"".join(parameter[place].detach().numpy().tobytes() for parameter in experts)
            found[str(expert)] = hashlib.sha256(rows).hexdigest()
    return found


def _experts(models: Mapping[int, ExpertModel]) -> range:
    return range(EXPERTS_PER_RANK * len(models))


def _copies(
    models: Mapping[int, ExpertModel], optimizers: Mapping[int, torch.optim.Optimizer]
) -> dict[int, list[Tensor]]:
    return {e: [row.clone() for row in _rows(models, optimizers, e)] for e in _experts(models)}


def _rows(
    models: Mapping[int, ExpertModel], optimizers: Mapping[int, torch.optim.Optimizer], expert: int
) -> list[Tensor]:
    """An expert's weights, and then what the optimizer keeps of them, once it keeps something."""
    rank, place = divmod(expert, EXPERTS_PER_RANK)
    parameters = list(models[rank].moe.expert_parameters())
    states = [optimizers[rank].state[p] for p in parameters if p in optimizers[rank].state]
    kept = [state[name] for state in states for name in sorted(state) if state[name].ndim]
    return [tensor.detach()[place] for tensor in (*parameters, *kept)]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
