"""Training with experts that ranks leave and join, judged as in training.py and expert_training.py.

What is promised beside what joining.py has: a rank that joins has its experts again, from who took them over,
with the weights of the oracle, which has never moved any, bit for bit; and so have all that are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from deepep.sim.faults import expert_training
from deepep.sim.faults.expert_training import EXPERTS_PER_RANK, SPARE, ExpertModel
from deepep.sim.faults.joining import (
    DEATHS,
    WAIT,
    Run,
    await_newcomers,
    await_turn,
    outcomes_of,
    publish_store,
    run_store,
)
from deepep.sim.faults.training import Striker, optimizer_of, record_buckets
from deepep.sim.rules.checking import Violation
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

EXPERT_DEATHS = (*DEATHS, "rows", "adopted")
"""Moments of a newcomer: joining's, when its experts come, and when all have theirs."""
HAND_OVERS = ("hand-over-copies", "hand-over-state", "hand-over-rows", "hand-over-commit", "hand-over-anew")
"""Moments of a member, at which a StepEnd may end it: when copies are made before a hand-over, state and rows
travel, all commit that they are there, and copies are made anew.
"""
_OBSERVED = {
    ("hand_over", 1): HAND_OVERS[0],
    ("hand_over", 2): HAND_OVERS[1],
    ("hand_over", 3): HAND_OVERS[2],
    ("commit", 2): HAND_OVERS[3],
    ("hand_over", 4): HAND_OVERS[4],
}


@dataclass
class ExpertAccount:
    """A rank's account of its steps, by number: who took part, the parameters of each bucket, experts that
    were restored before it, by number, to what they were after so many steps, a hash of the weights that all
    ranks have. digests: of parts of the weights in the end; experts: those that the rank has then.
    """

    rank: int
    members: dict[int, tuple[int, ...]] = field(default_factory=dict)
    buckets: dict[int, list[list[str]]] = field(default_factory=dict)
    restored: dict[int, dict[int, int]] = field(default_factory=dict)
    shared: dict[int, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    experts: tuple[int, ...] = ()


class HandOverWatch:
    """Observer of a communicator that knows the moments of a hand-over, before a step that `begin` begins."""

    def __init__(self, striker: Striker) -> None:
        self._striker = striker
        self.begin(0)

    def begin(self, step: int) -> None:
        """A step begins."""
        self._striker.step, self._counts = step, dict.fromkeys(("hand_over", "commit"), 0)

    def observed(self, operation: str, phase: str) -> None:
        """An operation begins a phase."""
        if phase == "control" and operation in self._counts:
            self._counts[operation] += 1
            if name := _OBSERVED.get((operation, self._counts[operation])):
                self._striker.reached(name)
        self._striker.observed(operation, phase)


def train(ctx: RankContext, run: Run) -> ExpertAccount:
    """The part of a rank that is there from the beginning."""
    import deepep

    torch.set_num_threads(1)
    if ctx.rank == 0:
        publish_store(ctx, run)
    with deepep.Buffer(ctx.group, device="cpu", timeout=run.timeout) as buffer:
        model = ExpertModel(buffer, ctx.num_ranks, spare=SPARE)
        ddp: Any = deepep.DistributedDataParallel(model, process_group=ctx.group, **_options(run))
        return _train(ddp, model, optimizer_of(model), run, ctx.rank)


def join_and_train(ctx: RankContext, run: Run) -> ExpertAccount:
    """The part of a process that joins: the one of `run.joins` at this process's place."""
    import deepep
    from deepep.parallel import newcomer_group

    torch.set_num_threads(1)
    join = run.joins[ctx.rank]
    await_turn(run, join)
    group = newcomer_group(join.rank, run.num_ranks)
    with deepep.Buffer(group, device="cpu", timeout=run.timeout) as buffer:
        model = ExpertModel(buffer, run.num_ranks, spare=SPARE)
        with torch.no_grad():  # nothing of it may be left
            for parameter in model.parameters():
                parameter.fill_(7.0)
        optimizer = optimizer_of(model)
        ddp = deepep.DistributedDataParallel.join_run(
            *(model, join.rank, {"optimizer": optimizer}),
            **{"store": run_store(run), "timeout": WAIT, **_options(run)},
        )
        return _train(ddp, model, optimizer, run, join.rank)


def _options(run: Run) -> dict[str, Any]:
    import deepep

    config = deepep.ParallelConfig(timeout=run.timeout, probe_seconds=0)
    return {"config": config, "bucket_cap_mb": 0.0005}


def _train(ddp: Any, model: ExpertModel, optimizer: Any, run: Run, rank: int) -> ExpertAccount:
    account, striker = ExpertAccount(rank), Striker(rank, run.ends, run.folder)
    watch = HandOverWatch(striker)
    buckets = record_buckets(ddp._bucket_reducer, model)
    ddp._bucket_reducer.comm.observe(watch.observed)
    model.first.register_forward_hook(lambda *_: striker.reached("forward"))
    before = ddp.report()["restored"]
    while (step := ddp.report()["steps"]) < run.num_steps:
        await_newcomers(run, step)
        watch.begin(step)
        for attempt in ddp.attempts(state={"optimizer": optimizer}, expert_backup=1):
            with attempt:
                buckets.clear()
                optimizer.zero_grad()
                ddp(expert_training.tokens_of(rank, step)).square().mean().backward()
                optimizer.step()
        account.members[step] = ddp.report()["members"]
        account.buckets[step] = [buckets[index] for index in sorted(buckets)]
        now = ddp.report()["restored"]
        account.restored[step] = {e: n for (layer, e), n in now.items() if before.get((layer, e)) != n}
        account.shared[step] = expert_training.digests(model)["shared"]
        before = now
    if model.moe.left_out != frozenset(range(run.num_ranks)) - set(ddp.members):
        raise Violation(f"{run}: gates leave out {sorted(model.moe.left_out)}", rank)
    ddp.close()
    account.digests, account.experts = expert_training.digests(model), model.moe.expert_numbers
    return account


def judge_expert_joins(world: World, newcomers: World, run: Run) -> list[ExpertAccount]:
    """Trains to the end; the accounts of those who are there then.

    Raises:
        Violation: a promise was not kept.
    """
    accounts: list[ExpertAccount] = outcomes_of(world, newcomers, run, train, join_and_train)
    judge_expert_accounts(run, accounts)
    return accounts


def judge_expert_accounts(run: Run, accounts: list[ExpertAccount]) -> None:
    """Raises Violation if ranks' accounts differ, or their weights are not the oracle's."""
    first = max(accounts, key=lambda account: len(account.members))
    for account in accounts:
        for name in ("members", "buckets", "restored", "shared"):
            for step, value in getattr(account, name).items():
                if getattr(first, name)[step] != value:
                    raise Violation(f"{run}: ranks differ in {name} of step {step}", account.rank)
    torch.set_num_threads(1)
    steps = range(run.num_steps)
    members = [first.members[step] for step in steps]
    restored = [first.restored[step] for step in steps]
    buckets = [first.buckets[step] for step in steps]
    models = expert_training.train_alone(run.num_ranks, members, buckets, optimizer_of, restored)
    wanted = {e: expert_training.digests(models[e // EXPERTS_PER_RANK])[str(e)] for e in _experts(run)}
    shared = expert_training.digests(models[members[-1][0]])["shared"]
    found: set[int] = set()
    for account in accounts:
        if account.digests["shared"] != shared:
            raise Violation(f"{run}: weights are not the oracle's; members by step: {members}", account.rank)
        for name, digest in account.digests.items():
            if name != "shared" and digest != wanted[int(name)]:
                raise Violation(f"{run}: expert {name} is not the oracle's", account.rank)
        found |= set(account.experts) - {-1}
    if found != set(_experts(run)):
        raise Violation(f"{run}: experts {set(_experts(run)) - found} are nowhere", 0)


def _experts(run: Run) -> range:
    return range(EXPERTS_PER_RANK * run.num_ranks)
