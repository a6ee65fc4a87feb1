"""Training that a rank leaves: killed or frozen at a drawn moment of a step, while the others go on.

What is promised: the survivors go on with the step or make it again, all alike, within a few seconds; and the
weights in the end are, bit for bit, those of an oracle that sums over all ranks before some step and over the
survivors from it on. The oracle is one process: a backward for every rank, and reference/all_reduce.py. With
experts (expert_training.py), those of the ranks that are gone are as if there were none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepep.reference.all_reduce import all_reduce
from deepep.sim.cases.choices import Choices
from deepep.sim.faults import expert_training
from deepep.sim.faults.expert_training import EXPERT_PHASES, EXPERTS_PER_RANK, ExchangeWatch, ExpertModel
from deepep.sim.faults.fault import Effect
from deepep.sim.rules.checking import Violation
from deepep.sim.worlds.outcomes import Outcome, Status
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

PHASES = ("forward", "backward", "sum", "bucket", "commit", "after")
"""Moments of a step: in the forward; in the backward, before any bucket; when the first and when a later
bucket is summed; when sums are complete and the commit begins; when it is over. Where ranks keep copies of
each other's experts, those are made before the forward ("copies"), and end with the step's first commit.
"""
_OBSERVED = {
    "sum": ("all_reduce", "control"),
    "bucket": ("all_reduce", "bucket"),
    "commit": ("commit", "control"),
    "copies": ("hand_over", "control"),
}
MARGIN = 3.0
"""Seconds that survivors may take, beyond the time-out where a rank is frozen."""
_WIDTH, _BATCH = 24, 4


@dataclass(frozen=True)
class StepEnd:
    """A rank's end, `delay` seconds after it has come to a phase of step number `step`, from 0."""

    effect: Effect
    rank: int
    step: int
    phase: str
    delay: float = 0.0


@dataclass
class Account:
    """A rank's account of its steps: who took part, the parameters of each bucket, the time at which each
    counted (time.monotonic, one clock for the ranks of a host); a hash of its weights in the end. restored:
    by step, experts that are as they were after so many steps; digests: of parts of the weights in the end.
    """

    members: list[tuple[int, ...]] = field(default_factory=list)
    buckets: list[list[list[str]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    weights: str = ""
    restored: list[dict[int, int]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def draw_step_end(choices: Choices, num_ranks: int, num_steps: int, phase: str = "") -> StepEnd:
    """A death at a drawn moment, but for the last step. A model's first backward has one bucket alone."""
    phase = phase or choices.pick((*PHASES, *EXPERT_PHASES))
    return StepEnd(
        effect=Effect.KILL,
        rank=choices.integer(0, num_ranks - 1),
        step=choices.integer(1 if phase == "bucket" else 0, num_steps - 2),
        phase=phase,
        delay=choices.pick((0.0, 0.0, 0.0002, 0.001, 0.003)),
    )


def model_of() -> nn.Sequential:
    """Three layers in three buckets, one of them with buffers, the same on all ranks."""
    torch.manual_seed(0)
    layers = (nn.Linear(_WIDTH, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH))
    return nn.Sequential(*layers, nn.Linear(_WIDTH, 8))


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """The loss of a rank's batch of a step."""
    generator = torch.Generator(device="cpu").manual_seed(1000 * step + rank)
    x = torch.randn(_BATCH, _WIDTH, generator=generator, device="cpu")
    loss: Tensor = model(x).square().mean()
    return loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, whose states depend on all gradients so far."""
    return torch.optim.AdamW(model.parameters(), 0.01)


def digest(model: nn.Module) -> str:
    """A hash of the weights' bits."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def train(
    ctx: RankContext,
    ends: Sequence[StepEnd],
    num_steps: int,
    timeout: float,
    folder: str,
    has_experts: bool = False,
    backup: int = 0,
    clips: bool = False,
) -> Account:
    """One rank's part. backup: steps after which copies of experts are made; 0: never. clips: gradients."""
    import deepep

    torch.set_num_threads(1)
    if not has_experts:
        return _train(ctx, model_of(), ends, num_steps, timeout, folder, contextlib.nullcontext())
    with deepep.Buffer(ctx.group, device="cpu", timeout=timeout) as buffer:
        model = ExpertModel(buffer, ctx.num_ranks, spare=expert_training.SPARE if backup else 0)
        return _train(ctx, model, ends, num_steps, timeout, folder, buffer, backup, clips)


def _train(
    ctx: RankContext,
    model: nn.Sequential | ExpertModel,
    ends: Sequence[StepEnd],
    num_steps: int,
    timeout: float,
    folder: str,
    buffer: Any,
    backup: int = 0,
    clips: bool = False,
) -> Account:
    import deepep

    account = Account()
    config = deepep.ParallelConfig(timeout=timeout, probe_seconds=0)
    is_dense = isinstance(model, nn.Sequential)
    ddp: Any = deepep.DistributedDataParallel(
        model, process_group=ctx.group, config=config, bucket_cap_mb=0.003 if is_dense else 0.0005
    )
    optimizer = optimizer_of(ddp)
    reducer, striker = ddp._bucket_reducer, Striker(ctx.rank, ends, folder)
    watch = ExchangeWatch(striker.reached)
    buckets = record_buckets(reducer, model)
    reducer.comm.observe(striker.observed)
    if isinstance(model, nn.Sequential):
        first, last = model[0], model[4]
    else:
        first, last = model.first, model.last
        buffer.runtime.observe(watch.observed)
    first.register_forward_hook(lambda *_: striker.reached("forward"))
    last.register_full_backward_hook(lambda *_: striker.reached("backward"))
    options = {"state": {"optimizer": optimizer}, "expert_backup": backup} if backup else {}
    before: dict[tuple[int, int], int] = {}
    for step in range(num_steps):
        striker.step = step
        for attempt in ddp.attempts(**options):
            with attempt:
                buckets.clear()
                watch.begin()
                optimizer.zero_grad()
                (loss_of if is_dense else _loss_with_experts)(ddp, ctx.rank, step).backward()
                striker.reached("after")
                if clips:
                    with striker.clipping():
                        deepep.clip_grad_norm_(ddp, expert_training.MAX_NORM)
                optimizer.step()
        account.times.append(time.monotonic())
        account.members.append(ddp.report()["members"])
        account.buckets.append([buckets[index] for index in sorted(buckets)])
        now = ddp.report()["restored"]
        account.restored.append({e: n for (layer, e), n in now.items() if before.get((layer, e)) != n})
        before = now
    Path(folder, f"done-{ctx.rank}").touch()
    ddp.close()
    account.weights = digest(model)
    if isinstance(model, ExpertModel):
        account.digests = expert_training.digests(model)
    return account


def _loss_with_experts(model: nn.Module, rank: int, step: int) -> Tensor:
    loss: Tensor = model(expert_training.tokens_of(rank, step)).square().mean()
    return loss


def record_buckets(reducer: Any, model: nn.Module) -> dict[int, list[str]]:
    """The names of the parameters in each bucket that a reducer sums, from now on, by its number."""
    buckets: dict[int, list[str]] = {}
    reduce = reducer.reduce

    def recording(bucket: Any) -> Any:
        buckets[bucket.index()] = [_name_of(gradient, model) for gradient in bucket.gradients()]
        return reduce(bucket)

    reducer.reduce = recording
    return buckets


def _name_of(gradient: Tensor, model: nn.Module) -> str:
    """The parameter that a part of a bucket is of, by its bits: torch names those that it had first."""
    return next(
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and torch.equal(parameter.grad, gradient)
    )


class Striker:
    """Ends this process where one of the ends says so, and notes in a file when that was."""

    def __init__(self, rank: int, ends: Sequence[StepEnd], folder: str) -> None:
        self._ends = {(end.step, end.phase): end for end in ends if end.rank == rank}
        self._file = Path(folder, f"end-{rank}")
        self.step, self._is_clipping = 0, False

    @contextlib.contextmanager
    def clipping(self) -> Iterator[None]:
        """A block in which gradients are clipped."""
        self._is_clipping = True
        yield
        self._is_clipping = False

    def reached(self, phase: str) -> None:
        """Notes that the step has come to a phase."""
        end = self._ends.pop((self.step, phase), None)
        if end is None:
            return
        number = signal.SIGKILL if end.effect is Effect.KILL else signal.SIGSTOP
        if end.delay:
            threading.Timer(end.delay, self._strike, (number,)).start()
        else:
            self._strike(number)

    def _strike(self, number: int) -> None:
        self._file.write_text(repr(time.monotonic()))
        os.kill(os.getpid(), number)

    def observed(self, operation: str, phase: str) -> None:
        """A communicator's operation begins a phase."""
        if self._is_clipping and phase == "control":
            self.reached(f"clip-{operation}")
        for name, place in _OBSERVED.items():
            if place == (operation, phase):
                self.reached(name)


def oracle(
    members: Sequence[tuple[int, ...]],
    buckets: Sequence[Sequence[Sequence[str]]],
    loss: Callable[[nn.Module, int, int], Tensor] = loss_of,
    share: Callable[[int, int], float] = lambda rank, step: 1.0,
) -> str:
    """The hash of the weights after as many steps, each of which sums over its members. share: what a rank
    weighs in a step, in proportion to an even share.
    """
    torch.set_num_threads(1)
    model = model_of()
    optimizer = optimizer_of(model)
    parameters = dict(model.named_parameters())
    norm = model[1]
    for step, ranks in enumerate(members):
        of_rank = []
        for rank in ranks:
            before = [buffer.clone() for buffer in norm.buffers()]
            model.zero_grad()
            loss(model, rank, step).backward()
            of_rank.append({name: p.grad.flatten() for name, p in parameters.items() if p.grad is not None})
            if share(rank, step) != 1:
                for gradient in of_rank[-1].values():
                    gradient.mul_(share(rank, step))
            for buffer, values in zip(norm.buffers(), before, strict=True):
                buffer.copy_(values)  # weights do not depend on them
        for names in buckets[step]:
            inputs = [torch.cat([gradients[name] for name in names]) for gradients in of_rank]
            total = all_reduce(inputs, "direct", "fixed32", mean=True)
            for name, part in zip(names, total.split([parameters[n].numel() for n in names]), strict=True):
                parameters[name].grad = part.view_as(parameters[name]).clone()
        optimizer.step()
    return digest(model)


def oracle_of_experts(
    num_ranks: int,
    members: Sequence[tuple[int, ...]],
    buckets: Sequence[Sequence[Sequence[str]]],
    clips: bool = False,
) -> dict[int, str]:
    """The same of a model with experts, by rank: each has experts of its own."""
    torch.set_num_threads(1)
    models = expert_training.train_alone(num_ranks, members, buckets, optimizer_of, clips=clips)
    return {rank: digest(models[rank]) for rank in members[-1]}


def judge_steps(
    world: World,
    ends: Sequence[StepEnd],
    num_steps: int,
    timeout: float,
    folder: str,
    has_experts: bool = False,
    backup: int = 0,
    clips: bool = False,
) -> tuple[list[Account], float]:
    """Trains until all survivors are done; their accounts, and the longest gap in seconds from an end to the
    next step that counts.

    has_experts: a model with a layer of experts, which the phases of one need. backup: ranks keep copies of
    each other's, made anew after so many steps; 0: they do not. clips: gradients are, with the phases
    "clip-collective" and "clip-commit".

    Raises:
        Violation: a promise was not kept.
    """
    lost = {end.rank: end for end in ends}
    arguments = ends, num_steps, timeout, folder, has_experts, backup, clips
    pending = world.submit(train, *arguments, timeout=20 * timeout + 60)
    frozen = [end.rank for end in ends if end.effect is Effect.STALL]
    others = set(range(world.num_ranks)) - set(lost)
    waker = threading.Thread(target=_wake, args=(world, frozen, others, folder))
    if frozen:
        waker.start()
    outcomes = pending.outcomes()
    accounts = [_account_of(outcome, lost.get(outcome.rank)) for outcome in outcomes]
    survivors = [account for account in accounts if account is not None]
    first = survivors[0]
    for account in survivors:
        for name in ("members", "buckets", "restored"):
            if getattr(account, name) != getattr(first, name):
                raise Violation(f"{ends}: survivors differ in {name}", outcomes[0].rank)
    _demand_plausible(ends, first.members, world.num_ranks)
    if backup:
        _demand_restored(ends, world.num_ranks, survivors, backup)
        wanted = {rank: a.weights for rank, a in enumerate(accounts) if a is not None}
    elif has_experts:
        wanted = oracle_of_experts(world.num_ranks, first.members, first.buckets, clips)
    else:
        wanted = dict.fromkeys(sorted(others), oracle(first.members, first.buckets))
    found = {rank: account.weights for rank, account in enumerate(accounts) if account is not None}
    if found != wanted:
        raise Violation(f"{ends}: weights are not the oracle's; members by step: {first.members}", 0)
    gaps = []
    for rank in lost:
        struck = float(Path(folder, f"end-{rank}").read_text())
        gaps.append(max(min(t for t in a.times if t > struck) - struck for a in survivors))
    return survivors, max(gaps, default=0.0)


def _demand_restored(
    ends: Sequence[StepEnd], num_ranks: int, survivors: Sequence[Account], backup: int
) -> None:
    """All experts are there, with the oracle's weights, and none was set back by more than it may be."""
    first = survivors[0]
    torch.set_num_threads(1)
    arguments = num_ranks, first.members, first.buckets, optimizer_of, first.restored
    models = expert_training.train_alone(*arguments)
    kept = {*first.members[-1], *(e // EXPERTS_PER_RANK for experts in first.restored for e in experts)}
    wanted = {(key, text) for rank in kept for key, text in expert_training.digests(models[rank]).items()}
    # A dead rank's own copy of what all have is as it was when it died.
    there = {("shared", expert_training.digests(models[rank])["shared"]) for rank in first.members[-1]}
    wanted = {(key, text) for key, text in wanted if key != "shared"} | there
    for step, experts in enumerate(first.restored):
        if any(step - version > backup for version in experts.values()):
            raise Violation(f"{ends}: restored in step {step}, as they were after {experts}", 0)
    found = {(key, text) for account in survivors for key, text in account.digests.items()}
    if found != wanted:
        raise Violation(f"{ends}: weights are not the oracle's; members by step: {first.members}", 0)


def _wake(world: World, frozen: list[int], others: set[int], folder: str) -> None:
    """Lets frozen ranks go on once the others are done."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not all(Path(folder, f"done-{rank}").exists() for rank in others):
        time.sleep(0.05)
    for rank in frozen:
        world.resume(rank)


def _account_of(outcome: Outcome, end: StepEnd | None) -> Account | None:
    if end is None:
        if not outcome.ok:
            raise Violation(outcome.describe(), outcome.rank)
        account: Account = outcome.value
        return account
    died = end.effect is Effect.KILL and outcome.status is Status.DIED
    evicted = end.effect is Effect.STALL and type(outcome.error).__name__ == "EvictedError"
    if not died and not evicted:
        raise Violation(f"{end}: {outcome.describe()}", outcome.rank)
    return None


def _demand_plausible(ends: Sequence[StepEnd], members: Sequence[tuple[int, ...]], num_ranks: int) -> None:
    """Every rank counts until the step of its end, or the one before it, and never from the step after on."""
    for end in ends:
        counts = [end.rank in ranks for ranks in members]
        last = sum(counts)  # steps that it took part in
        latest = len(counts) if end.delay else end.step + 1
        if counts != [True] * last + [False] * (len(counts) - last) or not end.step <= last <= latest:
            raise Violation(f"{end}: it took part in {last} steps of {len(counts)}", end.rank)
    lost = {end.rank for end in ends}
    if any(set(range(num_ranks)) - lost - set(ranks) for ranks in members):
        raise Violation(f"{ends}: a survivor was left out: {members}", 0)
