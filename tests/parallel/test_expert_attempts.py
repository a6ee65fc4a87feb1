"""Attempts of a model with experts: a rank that dies in an exchange, and what the others have without it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepep
from deepep.gate import Routing, group_limited_topk, sigmoid_topk, softmax_topk
from deepep.nn import ExpertParallelMoE
from deepep.placement import ExpertPlacement
from deepep.sim import World
from deepep.sim.faults.expert_training import BufferPlace
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.training import StepEnd, judge_steps
from deepep.sim.rules.checking import Violation

STEPS = 4
KILL = Effect.KILL


@pytest.mark.parametrize(
    "ends",
    [
        [StepEnd(KILL, 0, 0, "dispatch")],
        [StepEnd(KILL, 2, 1, "combine-backward"), StepEnd(KILL, 4, 1, "bucket")],
        [StepEnd(KILL, 1, 1, "combine", 0.0002), StepEnd(KILL, 3, 2, "dispatch-backward")],
    ],
    ids=["first-dispatch", "two-at-once", "one-after-the-other"],
)
def test_survivors_have_the_oracles_weights(ends: list[StepEnd], tmp_path: Path) -> None:
    with World(max(3, *(end.rank + 1 for end in ends)), timeout=120.0) as world:
        judge_steps(world, ends, STEPS, 20.0, str(tmp_path), has_experts=True)


def test_who_dies_as_gradients_are_clipped_has_the_others_clip_alike(tmp_path: Path) -> None:
    """Though some may have its norms: the step is made again without it, unless all had them. So it is where
    it has died between the sums and the clipping.
    """
    phases = ("clip-collective", "clip-commit", "after")
    ends = [StepEnd(KILL, 2 * step, step, phase) for step, phase in enumerate(phases)]
    with World(5, timeout=120.0) as world:
        accounts, _ = judge_steps(world, ends, 4, 20.0, str(tmp_path), has_experts=True, clips=True)
    members = accounts[0].members
    assert (members[0], members[2:]) == ((1, 2, 3, 4), [(1, 3), (1, 3)])


@pytest.mark.alone
def test_who_is_frozen_in_an_exchange_is_left_out_and_told(tmp_path: Path) -> None:
    with World(3, store="tcp", timeout=120.0) as world:
        judge_steps(world, [StepEnd(Effect.STALL, 1, 1, "dispatch")], STEPS, 4.0, str(tmp_path), True)


def test_experts_of_the_dead_in_the_oracle_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has teeth: as if one expert more had been masked."""
    from deepep.sim.faults import training

    real = training.expert_training.sent_to

    def less(members: Any, models: Any) -> Tensor:
        return real(members, models)[1:]

    monkeypatch.setattr(training.expert_training, "sent_to", less)
    with World(2, timeout=120.0) as world, pytest.raises(Violation, match="oracle"):
        judge_steps(world, [], 2, 20.0, str(tmp_path), has_experts=True)


HIDDEN, EXPERTS, TOPK, RANKS, DEAD = 16, 8, 3, 4, 1
GATES: tuple[Callable[..., Routing], ...] = (
    sigmoid_topk,
    partial(softmax_topk, normalize=True, scale=1.5),
    partial(group_limited_topk, num_groups=4, num_kept_groups=2),
)


PLACED = {
    "each on one rank": (),
    "replicas, some experts on the dead rank alone": (0, 1, 4, 2, 3, 0, 4, 5, 1, 6, 7, 5),
    "replicas of all that it had": (0, 1, 2, 2, 3, 0, 4, 5, 3, 6, 7, 1),
}


def placement_of(experts: tuple[int, ...]) -> ExpertPlacement:
    return ExpertPlacement(EXPERTS, RANKS, experts or tuple(range(EXPERTS)))


def layers_on(buffer: Any, **options: Any) -> nn.Sequential:
    """Three layers, each with another gate; in the last one the dead rank's experts are a group."""
    sizes: dict[str, Any] = {
        "hidden": HIDDEN,
        "expert_hidden": 8,
        "num_experts": EXPERTS,
        "dtype": torch.float64,
    }
    layers = nn.Sequential()
    for seed, gate in enumerate(GATES):
        topk = TOPK if seed < 2 else 2
        layers.append(
            ExpertParallelMoE(
                buffer, num_topk=topk, gate=gate, seed=seed, shared_hidden=4, **sizes, **options
            )
        )
        layers[-1].router.bias.copy_(torch.linspace(0.2, -0.2, EXPERTS).roll(seed))  # type: ignore[union-attr]
    return layers


def tokens_of(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(5 + rank, HIDDEN, generator=generator, dtype=torch.float64)


def one_dies(context: Any, experts: tuple[int, ...], in_sum: bool = False) -> dict[str, Any]:
    """A step in which rank 1 dies as the second layer's rows travel, or in the sum of replicas' gradients;
    and what the survivors have then.
    """
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepep").addHandler(handler)
    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        layers = layers_on(buffer, placement=placement_of(experts) if experts else None)
        model = deepep.DistributedDataParallel(layers, process_group=context.group)
        combines = 0

        def observe(operation: str, phase: str) -> None:
            nonlocal combines
            combines += (operation, phase) == ("combine", "payload")
            if context.rank == DEAD and combines == 2 and not in_sum:
                os._exit(0)

        buffer.runtime.observe(observe)
        if context.rank == DEAD and in_sum:
            layers[1].sum_replica_gradients_by = lambda add_up: os._exit(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)  # refuses replicas that may part
        x, runs, y = tokens_of(context.rank).requires_grad_(), 0, torch.empty(0)
        for attempt in model.attempts():
            with attempt:
                runs += 1
                model.zero_grad()
                x.grad = None
                y = model(x)
                (y * torch.cos(y.detach())).sum().backward()
                for layer in layers:
                    layer.sum_replica_gradients()  # type: ignore[operator]  # the backward has done it
                norm = deepep.clip_grad_norm_(model, 1e9)
                optimizer.step()
        found = {"y": y.detach(), "x": x.grad, "runs": runs, "members": model.members, "said": seen}
        found["norm"] = norm
        found["grads"] = {name: p.grad for name, p in layers.named_parameters()}
        found["masked"] = buffer.info.masked_ranks
        found["load"] = [layer.router.load.clone() for layer in layers]  # type: ignore[union-attr]
        found["balanced"] = [layer.rebalance(0.5) for layer in layers]  # type: ignore[operator]
        found["bias"] = [layer.router.bias for layer in layers]  # type: ignore[union-attr]
        model.close()
    return found


def plain(layer: Any, x: Tensor, left: list[int]) -> Tensor:
    """A layer by definition, every token through its experts of those `left`; a whole group is gone."""
    router, gate = layer.router, layer.router.gate
    if isinstance(gate, partial) and gate.func is group_limited_topk and len(left) < EXPERTS:
        gate = partial(group_limited_topk, num_groups=3, num_kept_groups=2)
    routing = gate((x @ router.weight.t())[:, left], router.num_topk, bias=router.bias[left])
    weights = routing.topk_weights.float().double()  # as they travel
    rows = []
    for t, token in enumerate(x):
        g, u = (token @ layer.shared.gate_up).chunk(2)
        row = (nn.functional.silu(g) * u) @ layer.shared.down
        for k in range(router.num_topk):
            expert = left[int(routing.topk_idx[t, k])]
            g, u = (token @ layer.experts.gate_up[expert]).chunk(2)
            row = row + weights[t, k] * ((nn.functional.silu(g) * u) @ layer.experts.down[expert])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "in_sum"), [*((name, False) for name in PLACED), ("replicas of all that it had", True)]
)
def test_outputs_gradients_and_loads_are_those_without_the_dead_experts(name: str, in_sum: bool) -> None:
    """In float64, but where weights travel in float32, here and there: to 1e-12. No expert is lost that lives
    elsewhere, and its replicas have the same gradient.
    """
    with World(RANKS, timeout=120.0) as world:
        outcomes = world.try_run(one_dies, PLACED[name], in_sum)
    placed = placement_of(PLACED[name])
    left = sorted({e for rank in range(RANKS) if rank != DEAD for e in placed.of_rank(rank)})
    layers = layers_on(BufferPlace(0, 1))
    survivors = [rank for rank in range(RANKS) if rank != DEAD]
    xs = {rank: tokens_of(rank).requires_grad_() for rank in survivors}
    ys, counted = {}, [torch.zeros(EXPERTS, dtype=torch.int64) for _ in layers]
    for rank, x in xs.items():
        y: Tensor = x
        for layer in layers:
            y = plain(layer, y, left)
        ys[rank] = y
    loss = sum(((y * torch.cos(y.detach())).sum() for y in ys.values()), torch.zeros(()))
    loss.backward()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    gradients = [p.grad.flatten() for p in layers.parameters() if p.grad is not None]
    norm = torch.cat(gradients).norm() / len(survivors)
    for rank in survivors:
        assert outcomes[rank].ok, outcomes[rank].describe()
        got = outcomes[rank].value
        assert (got["runs"], got["members"], got["masked"]) == (2, (0, 2, 3), (DEAD,))
        assert len(got["said"]) == (rank == 0)
        mine = list(placed.of_rank(rank))
        close(got["norm"], norm)
        close(got["y"], ys[rank].detach())
        close(got["x"], xs[rank].grad)
        for name, parameter in layers.named_parameters():
            assert parameter.grad is not None
            mean = parameter.grad / len(survivors)
            wanted = mean[mine] if ".experts." in name else mean
            close(got["grads"][name], wanted, msg=lambda m, n=name: f"{n}: {m}")
        for number, load in enumerate(got["load"]):
            counted[number] += load
    for number, layer in enumerate(layers):
        tokens = sum(len(x) for x in xs.values())
        assert int(counted[number].sum()) == tokens * layer.num_topk  # each once, in spite of two runs
        moved = outcomes[0].value["bias"][number] - layer.router.bias  # type: ignore[union-attr, operator]
        mean = counted[number][left].double().mean()
        signs = torch.zeros(EXPERTS)
        signs[left] = torch.sign(mean - counted[number][left].double()).float()
        torch.testing.assert_close(moved, 0.5 * signs)
        for rank in survivors:
            assert torch.equal(outcomes[rank].value["balanced"][number], counted[number])


def one_gives_up(context: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Rank 0 meets an error of its own, twice, where the others wait for it in the buffer: for its rows, and
    then for the buffer's connections, which are made again.
    """
    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        layer, runs = ExpertParallelMoE(buffer, hidden=16, expert_hidden=8, num_experts=3, num_topk=2), 0
        config = deepep.ParallelConfig(timeout=15.0)
        model = deepep.DistributedDataParallel(layer, process_group=context.group, config=config)

        def fail(*_: Any) -> None:
            if context.rank == 0 and runs < 3:
                record = deepep.errors.FaultRecord("something", "else", 0, (), 3, 0, 0.0)
                raise deepep.errors.PeerTimeoutError(record, "of another kind")

        layer.router.register_forward_hook(fail)
        for attempt in model.attempts():
            with attempt:
                runs += 1
                model(torch.ones(2, 16)).sum().backward()
        found = runs, model.members, buffer.info.masked_ranks
        model.close()
    return found


def test_who_waits_in_the_buffer_learns_of_a_fault_elsewhere(world_of: Callable[[int], Any]) -> None:
    """Before the buffer's time-out, which is longer than the others would wait for it."""
    assert world_of(3).run(one_gives_up, timeout=200.0) == [(3, (0, 1, 2), ())] * 3


def too_few_experts(context: Any) -> str:
    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        layer = ExpertParallelMoE(buffer, hidden=16, expert_hidden=8, num_experts=3, num_topk=3)
        model = deepep.DistributedDataParallel(layer, process_group=context.group)
        if context.rank == 2:
            layer.router.register_forward_hook(lambda *_: os._exit(0))
        try:
            for attempt in model.attempts():
                with attempt:
                    model(torch.ones(2, 16)).sum().backward()
        except deepep.errors.RangeError as error:
            return str(error)
    return ""


def test_fewer_experts_than_a_token_needs_end_the_training() -> None:
    with World(3, timeout=120.0) as world:
        outcomes = world.try_run(too_few_experts)
    for outcome in outcomes[:2]:
        assert outcome.value == "alive: got 2 experts; allowed: at least 3, the top k"


def misused(context: Any) -> list[str]:
    found = []
    mine = [torch.distributed.new_group([rank]) for rank in range(2)][context.rank]
    sizes: dict[str, Any] = {"hidden": 16, "expert_hidden": 8, "num_experts": 2, "num_topk": 1}
    with deepep.Buffer(context.group, device="cpu") as buffer, deepep.Buffer(mine, device="cpu") as other:
        for place, keep in ((buffer, "buckets"), (other, None)):
            layer = ExpertParallelMoE(place, **sizes)
            layer.num_expert_ranks = 2  # or the wrapper refuses it
            model = deepep.DistributedDataParallel(layer, process_group=context.group)
            try:
                next(model.attempts(keep=keep))
            except deepep.errors.ModeError as error:
                found.append(error.argument)
            model.close()
    return found


def test_misuse(world_of: Callable[[int], Any]) -> None:
    assert world_of(2).run(misused, timeout=120.0) == [["keep", "buffer"]] * 2
