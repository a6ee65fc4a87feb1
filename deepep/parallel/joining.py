"""Joining: processes take ranks that are vacant, between two steps of a training that goes on.

A newcomer registers in the run's store (runtime/control/registration.py), and is refused there if what it
would train differs. The lowest member looks for such news before it commits, and its word of the commit says
so to all: before their next step they take the newcomer in, on a new link, and hand it the state over. That
is a step of its own, with a commit at its end: a rank that dies in it leaves the others going on as in any
other, all with the state, or all handing it over again to who is left.
"""

from __future__ import annotations

import contextlib
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

from deepep.collectives import Communicator
from deepep.collectives.communicator import digest_of
from deepep.errors import ArgumentError, ArgumentTypeError, FaultRecord, MismatchError, PeerTimeoutError
from deepep.parallel.exchanges import statement_of_layers
from deepep.parallel.handover import StateTransfer, TrainingState
from deepep.parallel.sampler import ElasticSampler
from deepep.parallel.state import PackedState, check_objects, states_of
from deepep.runtime.checks import MOST, check_int
from deepep.runtime.control import admission
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.control.meeting import ControlStore, StoreError
from deepep.runtime.control.registration import Newcomer, Registration, Registrations
from deepep.runtime.control.shrinking import Course
from deepep.runtime.control.stores import base_of
from deepep.runtime.control.transport import Connections, store_of, timedelta_of
from deepep.runtime.session import MeetingPlace, meets_at, run_prefix
from deepep.version import __version__

if TYPE_CHECKING:
    from deepep.parallel.attempts import Steps
    from deepep.parallel.ddp import DistributedDataParallel
    from deepep.parallel.hook import BucketReducer

_TOKEN_BITS = 62


class LoneGroup(dist.ProcessGroup):
    """The group of a newcomer's wrapper, until it has joined: itself alone."""

    def __init__(self) -> None:
        store = HashStore()
        super().__init__(0, 1)  # type: ignore[call-arg]
        gloo = dist.ProcessGroupGloo(store, 0, 1, timedelta_of(60.0))
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)


def newcomer_group(rank: int, num_ranks: int) -> dist.ProcessGroup:
    """A group for the Buffers of a process that is to join a training as `rank`: of as many ranks as the run
    has, all but this one vacant, until `DistributedDataParallel.join_run` brings the buffers to the others'.

        buffer = deepep.Buffer(deepep.parallel.newcomer_group(rank, num_ranks), device="cpu")

    It has no connections, and serves no collective of torch.distributed. Raises ArgumentTypeError or
    RangeError.
    """
    check_int("num_ranks", num_ranks, 1, MOST)
    check_int("rank", rank, 0, num_ranks - 1)
    store = HashStore()
    group = dist.ProcessGroup(store, rank, num_ranks)
    vacant = frozenset(range(num_ranks)) - {rank}
    meets_at(group, MeetingPlace(ControlStore(store, run_prefix()), Connections(store), vacant))
    return group


def statement_of(
    model: DistributedDataParallel,
    config: object,
    sampler: ElasticSampler | None,
    objects: Mapping[str, Any],
) -> dict[str, str]:
    """All that has to be the same on ranks that train one model, by name. objects: of `attempts`."""
    module = model.module
    modules = [(name, type(each).__qualname__) for name, each in module.named_modules()]
    parameters = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters()]
    count = sum(parameter.numel() for parameter in module.parameters())
    return {
        "version": __version__,
        "config": repr(config),
        "sampler": "" if sampler is None else sampler.statement(with_weights=not sampler.is_measured),
        "buckets": buckets_of(model),
        "modules": f"{len(modules)} modules, digest {digest_of(modules):x}",
        "parameters": f"{len(parameters)} tensors of {count} elements, digest {digest_of(parameters):x}",
        "experts": statement_of_layers(module),
        "state": ", ".join(f"{name}: {type(each).__name__}" for name, each in objects.items()) or "nothing",
    }


def buckets_of(model: torch.nn.parallel.DistributedDataParallel) -> str:
    """The sizes by which ranks cut buckets alike; one cap, or several (torch from 2.13 on)."""
    return repr((model.bucket_bytes_cap, getattr(model, "bucket_bytes_cap_list", [])))


class Admissions:
    """A rank's part in joining: as a member, and as a newcomer once it is connected."""

    def __init__(self, model: DistributedDataParallel, reducer: BucketReducer, steps: Steps) -> None:
        self._model, self._reducer, self._steps = model, reducer, steps
        self._objects: dict[str, Any] | None = None
        self._registrations: Registrations | None = None
        self._name = ""
        self._called: list[Registration] = []  # of the invitation that this rank has posted
        self._posted = ""

    def configure(self, objects: Mapping[str, Any] | None, name: str) -> None:
        """Sets what newcomers are given from now on; None: nobody joins. name: the model's, among those of
        its run. Raises ArgumentTypeError.
        """
        if objects is None:
            self._objects = None
            return
        check_objects(objects)
        if self._objects is None or _ids(objects) != _ids(self._objects):
            self._objects = dict(objects)
            PackedState.of(states_of(self._objects))
        if self._registrations is None or name != self._name:
            self._registrations, self._name = self._reducer.comm.registrations(place_of(name)), name

    # as a member

    def news(self) -> int:
        """The token of an invitation, for the word of a commit, if a process may join; 0: none may."""
        comm, registrations = self._reducer.comm, self._registrations
        if self._posted:  # and a fault had all forget it
            self._settle(())
        if self._objects is None or registrations is None or comm.rank != 0 or not comm.vacant:
            return 0
        found = registrations.look(comm.vacant)
        if not found:
            return 0
        statement = self._statement()
        with contextlib.suppress(StoreError):  # it will be seen to be lost
            for registration in found:
                try:
                    registration.check(statement, comm.members[0])
                except MismatchError as problem:
                    registrations.refuse(registration, problem)
                else:
                    self._called.append(registration)
            if self._called:
                token = secrets.randbits(_TOKEN_BITS) | 1
                self._posted = str(token)
                registrations.post(self._invitation())
                return token
        return 0

    def _settle(self, gone: Collection[int]) -> None:
        """Removes what this rank has posted of an invitation; `gone`: ranks that do not wait for another."""
        if self._posted and self._registrations is not None:
            with contextlib.suppress(StoreError):
                self._registrations.settle(self._called, self._posted, gone)
        self._called, self._posted = [], ""

    def _statement(self) -> dict[str, str]:
        config = self._reducer.next_config or self._reducer.given
        return statement_of(self._model, config, self._reducer.sampler, self._objects or {})

    def _invitation(self) -> Invitation:
        comm = self._reducer.comm
        return Invitation(
            token=self._posted,
            ranks=tuple(registration.rank for registration in self._called),
            members=comm.members,
            num_ranks=len(comm.members) + len(comm.vacant),
            place="",
            backend="",
            options={},
            identities={registration.rank: registration.identity for registration in self._called},
        )

    def admit(self, token: int) -> None:
        """Before a step, on all members: takes in those whom the last commit's news is about. If they do not
        come, all is as before. Raises what `Steps.survive` does.
        """
        comm, registrations = self._reducer.comm, self._registrations
        if registrations is None or self._objects is None:
            return
        members, text = comm.members, str(token)
        gone: Collection[int] = [registration.rank for registration in self._called]
        try:
            with contextlib.suppress(StoreError):
                registrations.call(self._called, text)
            gone = comm.admit(lambda: registrations.invitation(text), token, self._statement()).ranks
        except ArgumentError as problem:  # members state different things
            warnings.warn(f"nobody has joined: {problem}", stacklevel=3)
        except PeerTimeoutError as fault:
            gone = fault.record.waited_on
            if not comm.is_connected:
                self._steps.survive(fault, self._least(members))
                self._steps.begin_anew()
        finally:
            self._settle(gone)
        # They may be there though this rank has met a fault: others had connected by then.
        if newcomers := set(comm.members) - set(members):
            self.hand_over(members, newcomers)

    def _least(self, members: Collection[int]) -> int:
        """So many go on without newcomers: newcomers do not count to those who were there before."""
        least = self._steps.min_members
        return len(members) // 2 + 1 if least is None else least

    # as both

    def hand_over(self, members: Collection[int], newcomers: Collection[int]) -> None:
        """Has the newcomers, as long as there are any, have the members' state, and all begin anew.

        Raises what `Steps.survive` does; on a newcomer MismatchError, or what its objects raise.
        """
        comm, reducer = self._reducer.comm, self._reducer
        is_member = comm.members[comm.rank] in members
        least = self._least(members) if is_member else 1
        adopt: Callable[[], None] | None = None
        while present := sorted(set(newcomers) & set(comm.members)):
            try:
                if is_member:
                    self._give(members, present)
                else:
                    self._take(members, present)
                adopt = self._steps.give_back_experts(members, present)
                reducer.restart()
                reducer.plan_for_members()
                comm.commit(reducer.step)
                break
            except PeerTimeoutError as fault:
                if self._steps.survive(fault, least) is Course.GO_ON:
                    break
                adopt = None
        if adopt is not None:
            adopt()
        reducer.end_step(False)  # the sampler shares the next one anew
        self._steps.begin_anew(True)

    def _give(self, members: Collection[int], newcomers: Collection[int]) -> None:
        state, comm = self._training_state(), self._reducer.comm
        try:
            try:
                transfer = StateTransfer(members, state.may_differ, state.pack())
            except ArgumentError as problem:
                comm.refuse(problem)
            comm.hand_over(transfer.run, digest_of(tuple(newcomers)))
        except ArgumentError as problem:  # as the newcomers raise it, too, who leave
            warnings.warn(f"nobody has joined: {problem}", stacklevel=4)

    def _take(self, members: Collection[int], newcomers: Collection[int]) -> None:
        state = self._training_state()
        transfer = StateTransfer(members, state.may_differ)
        self._reducer.comm.hand_over(transfer.run, digest_of(tuple(newcomers)))
        assert transfer.packed is not None
        state.load(transfer.packed, transfer.is_random_alike)
        transfer.check(state.pack())

    def _training_state(self) -> TrainingState:
        experts = self._steps.expert_return()
        return TrainingState(self._model.module, self._reducer, self._objects or {}, experts)


def _ids(objects: Mapping[str, Any]) -> dict[str, int]:
    return {name: id(each) for name, each in objects.items()}


def place_of(name: str) -> str:
    """The place in a run's store at which newcomers to a model register."""
    return f"{run_prefix()}/training/{name}"


def come_in(
    rank: int, statement: Mapping[str, str], store: Any, name: str, wait: float, timeout: float
) -> tuple[Communicator, Invitation]:
    """A newcomer's communicator with the members, and their invitation.

    store: the run's, or a group that met through it. wait: seconds to wait for an invitation. Raises
    MismatchError if the members refuse this process, RangeError if another has registered for the rank,
    PeerTimeoutError if they do not invite it.
    """
    if isinstance(store, dist.ProcessGroup):
        store = store_of(store)
    if not isinstance(store, Store):
        raise ArgumentTypeError("store", type(store).__name__, "a store of torch.distributed, or a group")
    base, started = base_of(store), time.monotonic()
    place = ControlStore(base, place_of(name))
    try:
        while True:
            newcomer = Newcomer(place, rank, statement, started + wait)
            try:
                invitation = newcomer.wait(started + wait)
                if invitation is None:
                    raise _not_invited(rank, started, f"a process has rank {rank}, or nobody takes steps")
                group = admission.enter(invitation, rank, base, timeout)
                with contextlib.suppress(PeerTimeoutError):  # somebody else's fault: they invite again
                    comm = Communicator(group, timeout=timeout, statement=dict(statement))
                    if admission.concludes(admission.meeting_store(base, invitation)):
                        return comm, invitation
                    comm.abandon()
            finally:
                newcomer.close()
    except StoreError as error:
        raise _not_invited(rank, started, f"the store failed: {error}") from None


def _not_invited(rank: int, started: float, why: str) -> PeerTimeoutError:
    record = FaultRecord("join", "invitation", rank, (), 1, 0, time.monotonic() - started)
    return PeerTimeoutError(record, f"nobody invites this process: {why}")
