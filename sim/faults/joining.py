"""Training that ranks leave and join: processes in the place of those that died, judged as in training.py.

What is promised: in the end all ranks have, bit for bit, the weights of an oracle that sums over those who
were there in each step; after every step they have the same weights and optimizer states; and no sample
counts twice, nor is one left out but those of a rank in the step in which it died.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepep.collectives.plan import ReductionPlan
from deepep.parallel.balance import SpeedMeter
from deepep.runtime.control.stores import base_of, open_store, place_of
from deepep.runtime.control.transport import store_of
from deepep.sim.faults.training import (
    StepEnd,
    Striker,
    digest,
    model_of,
    optimizer_of,
    oracle,
    record_buckets,
)
from deepep.sim.rules.checking import Violation
from deepep.sim.worlds.outcomes import Status
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

DEATHS = ("called", "transfer", "load", "commit")
"""Moments of a newcomer: when it is called; when it gets the state, has it, and commits that it has."""
_SAMPLES, _BATCH, _WIDTH = 240, 24, 24
WAIT = 30.0
"""Seconds that newcomers and steps wait for each other."""


@dataclass(frozen=True)
class Join:
    """A process that asks for a rank once `step` steps have counted, and dies when it comes to `death`."""

    rank: int
    step: int
    death: str = ""


@dataclass
class Run:
    """A training: of so many ranks and steps, with ranks that end and processes that join. falters: a rank
    whose link to those who join fails when the others may have theirs, once; -1: none. is_measured: shares
    follow the ranks' speeds, of which rank 0's is half of the others'; one rank dies. plan: by which all
    reduce; None: by the fixed rule.
    """

    num_steps: int
    ends: Sequence[StepEnd]
    joins: Sequence[Join]
    timeout: float
    folder: str
    num_ranks: int
    falters: int = -1
    is_measured: bool = False
    plan: ReductionPlan | None = None


@dataclass
class JoinAccount:
    """A rank's account of its steps, by number: who took part, the parameters of each bucket, its samples, a
    hash of weights and optimizer states after it; the time at which it counted (time.monotonic). weights: a
    hash of those in the end.
    """

    rank: int
    members: dict[int, tuple[int, ...]] = field(default_factory=dict)
    buckets: dict[int, list[list[str]]] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    weights: str = ""


def sampler_of(rank: int, num_ranks: int, is_measured: bool = False) -> Any:
    """A sampler of a rank."""
    import deepep

    options: dict[str, Any] = {"weights": "measured", "rebalance_every": 1} if is_measured else {}
    return deepep.ElasticSampler(_SAMPLES, _BATCH, rank, num_ranks, seed=3, **options)


def loss_of_samples(model: nn.Module, indices: Sequence[int]) -> Tensor:
    """The loss of some samples of a data set, each drawn by its number."""
    rows = [torch.randn(_WIDTH, generator=torch.Generator(device="cpu").manual_seed(i)) for i in indices]
    loss: Tensor = model(torch.stack(rows)).square().mean()
    return loss


def digest_of_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A hash of weights and optimizer states."""
    found = hashlib.sha256(digest(model).encode())
    for states in optimizer.state_dict()["state"].values():
        for name in sorted(states):
            found.update(states[name].numpy().tobytes())
    return found.hexdigest()


class KnownSpeed(SpeedMeter):
    """A meter that finds a speed which does not depend on the machine, from the second step on."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speeds = [speed, 0.0]

    def end(self, num_samples: int) -> None:
        """A step's last gradient is there."""
        self.speed = self._speeds.pop() if len(self._speeds) > 1 else self._speeds[0]


class Trainee:
    """A rank of such a training: its model, optimizer and sampler, and its account."""

    def __init__(self, rank: int, run: Run) -> None:
        torch.set_num_threads(1)
        self.rank, self.run = rank, run
        self.model, self.account = model_of(), JoinAccount(rank)
        self.optimizer, self.sampler = (
            optimizer_of(self.model),
            sampler_of(rank, run.num_ranks, run.is_measured),
        )
        self.state = {"optimizer": self.optimizer}

    def options(self) -> dict[str, Any]:
        """Arguments of the wrapper."""
        import deepep

        topology = self.run.plan or "auto"
        config = deepep.ParallelConfig(timeout=self.run.timeout, probe_seconds=0, topology=topology)
        return {"config": config, "bucket_cap_mb": 0.003, "sampler": self.sampler}

    def train(self, ddp: Any, striker: Striker | None = None) -> JoinAccount:
        """Takes steps until the end."""
        run, account, sampler = self.run, self.account, self.sampler
        buckets = record_buckets(ddp._bucket_reducer, self.model)
        if run.is_measured:
            ddp._bucket_reducer.meter = KnownSpeed(1.0 if self.rank == 0 else 2.0)
        while sampler.step < run.num_steps:
            step = sampler.step
            await_newcomers(run, step)
            if striker is not None:
                striker.step = step
            for attempt in ddp.attempts(state=self.state):
                with attempt:
                    buckets.clear()
                    account.samples[step] = sampler.indices().tolist()
                    self.optimizer.zero_grad()
                    loss_of_samples(ddp, account.samples[step]).backward()
                    self.optimizer.step()
            account.times[step] = time.monotonic()
            account.members[step] = ddp.report()["members"]
            account.buckets[step] = [buckets[index] for index in sorted(buckets)]
            account.states[step] = digest_of_state(self.model, self.optimizer)
            sampler.commit()
        ddp.close()
        account.weights = digest(self.model)
        return account


def await_newcomers(run: Run, step: int) -> None:
    """Holds a step until who is to join then has registered, however long its process took to start."""
    waited = [join for join in run.joins if join.step == step]
    Path(run.folder, f"reached-{step}").touch()
    until = time.monotonic() + WAIT
    while not all(_registered(run, join).exists() for join in waited):
        if time.monotonic() > until:
            raise TimeoutError(f"{waited} have not registered")
        time.sleep(0.005)


def await_turn(run: Run, join: Join) -> None:
    """Waits until a newcomer's step has come; has it note that it has registered, and die when it is to."""
    from deepep.runtime.control.registration import Newcomer

    while not Path(run.folder, f"reached-{join.step}").exists():
        time.sleep(0.005)
    wait = Newcomer.wait

    def noting(newcomer: Newcomer, deadline: float) -> Any:
        _registered(run, join).touch()
        return wait(newcomer, deadline)

    Newcomer.wait = noting  # type: ignore[assignment, method-assign]
    _die_at(join.death)


def publish_store(ctx: RankContext, run: Run) -> None:
    """Has newcomers find the run's store."""
    Path(run.folder, "store").write_text(place_of(base_of(store_of(ctx.group))))


def run_store(run: Run) -> Any:
    """A connection to the run's store."""
    return open_store(Path(run.folder, "store").read_text(), run.timeout)


def _registered(run: Run, join: Join) -> Path:
    return Path(run.folder, f"registered-{join.rank}-{join.step}")


def train(ctx: RankContext, run: Run) -> JoinAccount:
    """The part of a rank that is there from the beginning."""
    import deepep

    trainee, striker = Trainee(ctx.rank, run), Striker(ctx.rank, run.ends, run.folder)
    if ctx.rank == 0:
        publish_store(ctx, run)
    ddp: Any = deepep.DistributedDataParallel(trainee.model, process_group=ctx.group, **trainee.options())
    ddp._bucket_reducer.comm.observe(striker.observed)
    trainee.model[0].register_forward_hook(lambda *_: striker.reached("forward"))
    if ctx.rank == run.falters:
        _falter()
    return trainee.train(ddp, striker)


def _falter() -> None:
    """Has this process lose its next link to newcomers at the last moment."""
    from deepep.runtime.control.issue import ControlPlane
    from deepep.runtime.control.transport import LinkError

    meet = ControlPlane.meet

    def losing(control: ControlPlane, operation: str) -> None:
        meet(control, operation)
        ControlPlane.meet = meet  # type: ignore[method-assign]
        raise control.membership.fault(LinkError("it is lost"))

    ControlPlane.meet = losing  # type: ignore[assignment, method-assign]


def join_and_train(ctx: RankContext, run: Run) -> JoinAccount:
    """The part of a process that joins: the one of `run.joins` at this process's place."""
    import deepep

    join = run.joins[ctx.rank]
    await_turn(run, join)
    trainee = Trainee(join.rank, run)
    ddp = deepep.DistributedDataParallel.join_run(
        trainee.model, join.rank, trainee.state, store=run_store(run), timeout=WAIT, **trainee.options()
    )
    return trainee.train(ddp)


def _die_at(moment: str) -> None:
    """Has this process be killed when it comes to a moment."""
    from deepep.collectives import Communicator
    from deepep.parallel import handover
    from deepep.parallel.exchanges import Exchanges
    from deepep.parallel.expert_backup import ExpertBackup
    from deepep.runtime.control import admission

    def die(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    places: dict[str, tuple[Any, str]] = {
        "called": (admission, "enter"),
        "transfer": (handover, "hand_over"),
        "load": (handover.TrainingState, "load"),
        "commit": (Communicator, "commit"),
        "rows": (ExpertBackup, "bring"),
        "adopted": (Exchanges, "admit"),
    }
    if moment:
        setattr(*places[moment], die)


def judge_joins(world: World, newcomers: World, run: Run) -> list[JoinAccount]:
    """Trains to the end; the accounts of those who are there then.

    Raises:
        Violation: a promise was not kept.
    """
    accounts: list[JoinAccount] = outcomes_of(world, newcomers, run, train, join_and_train)
    judge_accounts(run, accounts)
    return accounts


def outcomes_of(world: World, newcomers: World, run: Run, train: Any, join_and_train: Any) -> list[Any]:
    """The values of the ranks that are there in the end. Raises Violation where others ended otherwise."""
    joined = newcomers.submit(join_and_train, run, timeout=20 * run.timeout + 120)
    stayed = world.submit(train, run, timeout=20 * run.timeout + 120)
    outcomes, new = stayed.outcomes(), joined.outcomes()
    lost = {end.rank for end in run.ends}
    for outcome, join in zip(new, run.joins, strict=True):
        if outcome.status is not (Status.DIED if join.death else Status.RETURNED):
            raise Violation(f"{join}: {outcome.describe()}", join.rank)
    for outcome in outcomes:
        if outcome.ok == (outcome.rank in lost):
            raise Violation(f"{run}: {outcome.describe()}", outcome.rank)
    return [outcome.value for outcome in (*outcomes, *new) if outcome.ok]


def judge_accounts(run: Run, accounts: Sequence[JoinAccount]) -> None:
    """Raises Violation if ranks' accounts differ, or are not the oracle's, or samples count twice."""
    first = max(accounts, key=lambda account: len(account.members))
    for account in accounts:
        for name in ("members", "buckets", "states"):
            for step, value in getattr(account, name).items():
                if getattr(first, name)[step] != value:
                    raise Violation(f"{run}: ranks differ in {name} of step {step}", 0)
        if account.weights != first.weights:
            raise Violation(f"{run}: ranks differ in their weights", 0)
    steps = range(run.num_steps)
    members = [first.members[step] for step in steps]
    shares = [_shares(run, accounts, members, step) for step in steps]

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return loss_of_samples(model, shares[step][rank])

    def share(rank: int, step: int) -> float:
        counts = [len(shares[step][other]) for other in members[step]]
        return len(counts) * (len(shares[step][rank]) / sum(counts))

    if oracle(members, [first.buckets[step] for step in steps], loss, share) != first.weights:
        raise Violation(f"{run}: weights are not the oracle's; members by step: {members}", 0)
    _count_samples(run, members, shares)


def _shares(
    run: Run, accounts: Sequence[JoinAccount], members: Sequence[tuple[int, ...]], step: int
) -> dict[int, list[int]]:
    """Each rank's samples of a step, by which ranks' accounts are: of those whose gradients are in its sums,
    or of those who died in it as well, and whose share is left out.
    """
    there = set(members[step])
    before = set(members[step - 1]) if step else set(range(run.num_ranks))
    if run.is_measured:  # what is in nobody's account is that of one which dies
        whole = sampler_of(0, run.num_ranks).indices(step, range(_BATCH)).tolist()
        found = {a.rank: a.samples[step] for a in accounts if step in a.samples}
        held = {i for share in found.values() for i in share}
        for rank in (there | ({end.rank for end in run.ends} & before)) - set(found):
            found[rank] = [i for i in whole if i not in held]
        return found
    for began in (there, there | ({end.rank for end in run.ends} & before)):
        found = {}
        for rank in sorted(began):
            sampler = sampler_of(rank, run.num_ranks)
            sampler.set_members(sorted(began))
            found[rank] = sampler.indices(step).tolist()
        if all(a.samples[step] == found[a.rank] for a in accounts if step in a.samples):
            return found
    taken = {account.rank: account.samples.get(step) for account in accounts}
    raise Violation(f"{run}: samples of nobody's in step {step}: {taken}", 0)


def _count_samples(
    run: Run, members: Sequence[tuple[int, ...]], shares: Sequence[dict[int, list[int]]]
) -> None:
    """A pass over the data has each sample once, but for those of ranks in the step in which they died."""
    for step, share in enumerate(shares):
        whole = sampler_of(0, run.num_ranks).indices(step, range(_BATCH)).tolist()
        counted = sorted(i for rank in members[step] for i in share[rank])
        dropped = sorted(i for rank in set(share) - set(members[step]) for i in share[rank])
        if sorted([*counted, *dropped]) != sorted(whole):
            raise Violation(f"{run}: in step {step} samples were {counted}, dropped {dropped}", 0)
