"""BucketReducer: what torch's DDP calls for every bucket of gradients, in place of its own all-reduce."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from deepep.collectives import Communicator, PendingReduction, ReductionPlan
from deepep.collectives.codecs import LOSSY, rounding_key
from deepep.collectives.plan_table import PlanTable
from deepep.errors import PeerTimeoutError
from deepep.parallel.attempts import HeldBucket, Steps
from deepep.parallel.balance import SpeedMeter
from deepep.parallel.config import ParallelConfig, config_among
from deepep.parallel.drift import DriftDetector
from deepep.parallel.planning import plan_of, table_of
from deepep.parallel.policy import BucketFormat, BucketNoise, measure, square_of
from deepep.parallel.sampler import ElasticSampler


class Bucket(Protocol):
    """A part of the gradients, as torch.distributed.GradBucket."""

    def index(self) -> int:
        """Its place in the order of the backward, from 0."""

    def buffer(self) -> Tensor:
        """The gradients, which are reduced in place."""

    def is_last(self) -> bool:
        """True of a backward's last."""


@dataclass
class BucketReducer:
    """Averages the buckets of one model's backwards over the ranks.

    table: measured or pinned plans; None: by the fixed rule. given: `config` as it was given, of all ranks;
    `config` is for the members. step: backwards so far, by which dice differ.
    plans: of the last backward, by bucket. members: the group's ranks that it sums over. next_config: options
    that hold from the next backward on. formats: of compression "auto", by bucket; noise: what they followed
    from, as of the backward before the last. sampler: by whose counts the average is one over samples, None:
    over ranks; meter: this rank's speed, for weights that follow it.
    """

    comm: Communicator
    config: ParallelConfig
    table: PlanTable | None = None
    step: int = 0
    plans: dict[int, ReductionPlan] = field(default_factory=dict)
    members: tuple[int, ...] = ()
    next_config: ParallelConfig | None = None
    formats: dict[int, BucketFormat] = field(default_factory=dict)
    noise: dict[int, BucketNoise] = field(default_factory=dict)
    steps: Steps | None = None  # of a model whose steps go on without ranks that died
    sampler: ElasticSampler | None = None
    meter: SpeedMeter | None = None
    speeds: dict[int, float] = field(default_factory=dict)  # by rank, as given beside the last sums
    _failure: BaseException | None = None
    _pending: list[Future[Tensor]] = field(default_factory=list)  # sums of buckets that an attempt holds
    _first: PendingReduction | None = None  # of the last backward's first bucket
    _measured: dict[int, list[float]] = field(default_factory=dict)  # in this backward, by bucket
    _given: dict[int, ReductionPlan] = field(default_factory=dict)  # buckets given aside, and how reduced
    _plans_before: dict[int, ReductionPlan] = field(default_factory=dict)
    _drift: DriftDetector = field(default_factory=DriftDetector)
    _sizes: dict[int, int] = field(default_factory=dict)
    _measured_at: tuple[float, float] = (0.0, 0.0)  # when plans were last measured again, and for how long

    def __post_init__(self) -> None:
        self.given = self.config
        self._planned, self._planned_for = self.table, self.comm.members

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Starts a bucket; its future is the bucket itself, reduced. Never raises inside autograd, which
        would leave torch's reducer half done: a bucket that fails is completed with what this rank has, and
        the failure raised once backward has come to its end.
        """
        index, tensor = bucket.index(), bucket.buffer()
        if index == 0:
            self._failure = None
        in_backward = torch._C._current_graph_task_id() >= 0
        steps = self.steps if self.steps is not None and self.steps.is_open else None
        step = self.step
        if bucket.is_last():
            if self.meter is not None:
                assert self.sampler is not None
                self.meter.end(self.sampler.counts().get(self.sampler.rank, 0))
            if steps is not None:
                at_the_end_of_backward(self._finish, before=self._settle)
            else:
                self.step += 1
                if in_backward:
                    at_the_end_of_backward(self._raise)
        held = None
        if steps is not None and steps.keep == "buckets":
            held = steps.hold(bucket)
            tensor = held.sums
        if self._failure is not None:
            return _completed(tensor) if held is None else held.done
        try:
            if index == 0:
                self._begin()
            pending = self._issue(index, step, tensor)
        except Exception as error:  # noted: inside autograd it would leave torch's reducer half done
            if not in_backward:
                raise
            self._failure = error
            return _completed(tensor) if held is None else held.done
        if not in_backward:  # a rank that has joined (`join`) waits for its buckets itself
            return pending
        if tensor.is_cuda:  # never fails: what was issued is waited for before the commit
            return pending if held is None else held.done
        done = self._noting_failures(pending, tensor)
        if steps is not None:
            self._pending.append(done)
        return done if held is None else held.done

    def _noting_failures(self, pending: Future[Tensor], tensor: Tensor) -> Future[Tensor]:
        """A future that does not fail: the backward's failure is noted, for its end."""
        done: Future[Tensor] = Future()

        def note(ended: Future[Tensor]) -> None:
            try:
                ended.value()
            except Exception as error:
                self._failure = self._failure or error
            done.set_result(tensor)

        pending.add_done_callback(note)
        return done

    def _begin(self) -> None:
        """Begins a backward: with the options, plans and formats that hold from now on, on every rank."""
        self._learn()
        if self.next_config is not None:
            before, self.given, self.next_config = self.given, self.next_config, None
            self.config = self._config_of_members()
            if _what_is_measured(before) != _what_is_measured(self.given):
                self.formats = {}
                self._measure(None)
        elif self._first is not None and self._first.callers:
            self._plan_again()
        self._plans_before, self.plans = self.plans, {}

    def _learn(self) -> None:
        """Chooses the formats by what all ranks have measured in the backward before the last."""
        if self._first is None or not self._given:
            return
        first, shape = int(self.meter is not None), (len(self._given), -1)  # after the speed
        rows = [values[first:].view(shape).tolist() for values in self._first.aside]
        for place, (index, plan) in enumerate(self._given.items()):
            num_groups = len(plan.groups) if plan.schedule == "hierarchical" else 1
            used = plan.codec if plan.codec in LOSSY else "off"
            noise = self.noise[index] = BucketNoise.of([row[place] for row in rows], used, num_groups)
            self.formats[index] = self.formats[index].after(noise, self.config.max_noise)

    def _plan_again(self) -> None:
        started = time.monotonic()
        self._measure(self.table)
        self._measured_at = (time.monotonic(), time.monotonic() - started)

    def _measure(self, current: PlanTable | None) -> None:
        self.table = self._planned = table_of(self.comm, self.config, current=current)
        self._planned_for = self.comm.members
        self._drift.restart()

    def _has_drifted(self) -> bool:
        """True if the first bucket's times are not as before, and measuring again is not too expensive."""
        if self.table is None or self.table is self.config.topology or self._first is None:
            return False
        if self.comm.device.type != "cpu":
            return False  # a sum there is on its way when the host goes on
        plan, size = self._plans_before[0], self._sizes[0]
        is_off = self._drift.observe(self._first.seconds, self.table.expected_seconds(plan.codec, size))
        when, took = self._measured_at
        return is_off and took <= self.config.probe_budget * (time.monotonic() - when)

    def _issue(self, index: int, step: int, tensor: Tensor) -> Future[Tensor]:
        config, size = self.config, tensor.numel() * tensor.element_size()
        if self._sizes.get(index) != tensor.numel() * 4:  # torch cuts buckets anew after the first backward
            self._sizes[index] = tensor.numel() * 4
            self.formats[index] = BucketFormat()
        adapts = config.compression == "auto" and tensor.is_cpu
        plan = plan_of(
            config,
            size,
            tensor.dtype,
            self.comm.hosts,
            tensor.device.type,
            table=self.table,
            chosen=self.formats[index].codec if adapts else "fp8",
        )
        self.plans[index] = plan
        is_by_dice = plan.codec in LOSSY and config.rounding == "stochastic"
        dice = (config.seed, step, index) if is_by_dice else None
        aside, statement, share = self._aside() if index == 0 else None, repr(config), 1.0
        if self.sampler is not None:
            # The mean over ranks of what each weighs: a step's samples count alike, whoever had them.
            share = self.comm.num_ranks * self.sampler.gradient_weight(self.comm.members)
            weigh(tensor, share)
            statement += repr(self.sampler.counts())
        is_large = size >= config.min_compressed_bytes and tensor.dtype != torch.float64
        inspect = None
        if adapts and is_large and self.comm.num_ranks > 1:
            key = rounding_key(config.seed, step, index, self.comm.rank)
            numbers = measure(tensor, key if config.rounding == "stochastic" else None)
            if self.sampler is not None:
                # The square of a mean has less of the variance in it, the more samples it is of.
                numbers[0] = numbers[0] / share if share else 0.0
            self._measured[index] = [*numbers, 0.0]
            inspect = partial(self._measure_mean, index)
        if index == 0:
            self.members = self.comm.members
            # The whole of the options: those that make no difference to this bucket may to the next.
            pending = self.comm.all_reduce(
                tensor,
                plan,
                mean=True,
                dice=dice,
                async_op=True,
                statement=statement,
                calls=self._has_drifted(),
                aside=aside,
                inspect=inspect,
            )
            assert not isinstance(pending, Tensor)
            self._first = pending
        else:
            # The buckets' sizes are the ranks' common knowledge; and after a failure there is nothing to do.
            pending = self.comm.continue_with(
                tensor,
                plan,
                mean=True,
                dice=dice,
                unless=lambda: self._failure is not None,
                inspect=inspect,
            )
        return pending.get_future()

    def _measure_mean(self, index: int, mean: Tensor) -> None:
        """In the reduction's thread, once it has its result; one rank's number counts for all."""
        if self.comm.rank == 0:
            self._measured[index][-1] = square_of(mean)

    def _aside(self) -> Tensor | None:
        """This rank's speed and measurements of the last backward, for all ranks; begins the next's."""
        measured, self._measured = self._measured, {}
        self._given = {index: self._plans_before[index] for index in measured}
        numbers = [] if self.meter is None else [self.meter.speed]
        for values in measured.values():
            numbers += values
        return torch.tensor(numbers, dtype=torch.float64, device="cpu") if numbers else None

    def _take_speeds(self) -> None:
        """Keeps what was given beside sums that all ranks have."""
        self.speeds = {}
        if self.meter is not None and self._first is not None:
            given = zip(self.members, self._first.aside, strict=True)
            self.speeds = {rank: float(values[0]) for rank, values in given}

    def end_step(self, is_over: bool) -> None:
        """Has the next step, or this one's next attempt, shared by those who are there; if it is over, by the
        speeds that all ranks were given beside its sums.
        """
        speeds, self.speeds = self.speeds, {}
        if self.sampler is not None and is_over and speeds:
            self.sampler.follow(speeds)
        self.share_steps()

    def share_steps(self) -> None:
        """Has steps shared by those who are there."""
        if self.sampler is not None and self.sampler.members != self.comm.members:
            self.sampler.set_members(self.comm.members)

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            self._forget()
            raise failure
        self._take_speeds()
        self.end_step(True)

    def _settle(self) -> None:
        """At the end of an attempt's backward: its sums count, or not, for all survivors alike."""
        assert self.steps is not None
        self.steps.settle(self._outcome())

    def _finish(self) -> None:
        assert self.steps is not None
        self.steps.finish()
        self.step += 1

    def _outcome(self) -> BaseException | None:
        """The failure of sums under way, once they have ended."""
        pending, self._pending = self._pending, []
        for done in pending:
            done.wait()
        failure, self._failure = self._failure, None
        if failure is None:
            self._take_speeds()
        return failure

    def _forget(self) -> None:
        self._first, self._measured, self._given = None, {}, {}  # of use only if all ranks have them

    def restart(self) -> None:
        """Forgets, after a change of the members, what was measured, and has plans be for those who are
        there; by the fixed rule if measured ones do not have them all.
        """
        self._forget()
        self._failure, self._pending = None, []  # of a backward that has failed on its way
        self._sizes.clear()
        self._drift.restart()
        self.config, members = self._config_of_members(), self.comm.members
        self.table = None
        if isinstance(self.config.topology, PlanTable):
            self.table = self.config.topology
        elif self._planned is not None and set(members) <= set(self._planned_for):
            self.table = self._planned.among([self._planned_for.index(rank) for rank in members])

    def plan_for_members(self) -> None:
        """Measures plans, if there are some that do not have all members. Collective then."""
        if self.table is None and self._planned is not None:
            self._measure(None)

    def _config_of_members(self) -> ParallelConfig:
        return config_among(self.given, self.comm.members)

    def plan_state(self) -> dict[str, Any]:
        """Plans that were measured, for a rank that joins."""
        return {"table": self._planned and self._planned.encode(), "ranks": list(self._planned_for)}

    def load_plan_state(self, state: Mapping[str, Any]) -> None:
        """Takes over plans from `plan_state`."""
        self._planned = PlanTable.decode(state["table"]) if state["table"] else None
        self._planned_for = tuple(state["ranks"])

    def sum_again(self, held: Mapping[int, HeldBucket]) -> BaseException | None:
        """Sums over the ranks that are left what this rank has of each bucket; the failure, if any."""
        self._failure, self._pending = None, []
        try:
            for index, bucket in sorted(held.items()):
                bucket.sums = bucket.own.clone()
                pending = self._issue(index, self.step, bucket.sums)
                if not bucket.sums.is_cuda:  # whose commit waits for it
                    self._pending.append(self._noting_failures(pending, bucket.sums))
        except PeerTimeoutError as fault:
            self._failure = fault
        return self._outcome()


def reduce_bucket(state: BucketReducer, bucket: GradBucket) -> Future[Tensor]:
    """The communication hook, in the form that torch's register_comm_hook takes."""
    return state.reduce(bucket)


# torch reads the hook's annotations, and takes no text for them.
reduce_bucket.__annotations__.update({"bucket": GradBucket, "return": Future[Tensor]})


def _what_is_measured(config: ParallelConfig) -> tuple[object, ...]:
    """Options by which the plans follow from measurements."""
    return config.topology, config.compression, config.reproducible, config.groups, config.probe_seconds


@torch.no_grad()
def weigh(gradient: Tensor, share: float) -> None:
    """Multiplies in place by a rank's share, in proportion to an even one. Without samples a loss may be
    anything, a mean over none is NaN: it does not count.
    """
    if share == 0:
        gradient.zero_()
    elif share != 1:
        gradient.mul_(share)


def _completed(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[tensor.device] if tensor.is_cuda else None)
    future.set_result(tensor)
    return future


def at_the_end_of_backward(after: Callable[[], None], before: Callable[[], None] | None = None) -> None:
    """Calls `before` and `after` torch's reducer has waited for the buckets, which it does in a callback."""
    engine = torch.autograd.Variable._execution_engine

    def first() -> None:
        if before is not None:
            before()
        engine.queue_callback(after)

    engine.queue_callback(first)
