"""Admission: new processes take ranks that are vacant, while the others stay, and ranks are dismissed.

The members settle on an invitation, which somebody takes to the new process. When they admit it, all meet
under the invitation's own name in the store, as if they constructed: what they construct is compared, and
they are connected. Only then do the members leave their old link, so one that does not come costs a time-out
and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from deepep.errors import ArgumentError, RangeError
from deepep.runtime.control import agreement, liveness
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.meeting import ControlStore, StoreError
from deepep.runtime.control.stores import base_of, open_store
from deepep.runtime.control.transport import Connections, Link, LinkError
from deepep.runtime.requests import Operation, Schedule
from deepep.runtime.session import MeetingPlace, meets_at

_MOST_BYTES = 1024
_ADMITTED, _GIVEN_UP = "admitted", "given up"
_Body = Callable[[Link, dict[int, int]], None]


def invite(control: ControlPlane, ranks: Sequence[int]) -> str:
    """An invitation of ranks that are vacant, the same on all members; collective. Raises RangeError."""
    membership = control.membership
    with _refusing(control, Operation.INVITE):
        _check_ranks(ranks, membership.masked, "a rank that is masked")
    proposal = _proposal(membership.place)
    agreed = bytearray()

    def body(link: Link, limits: dict[int, int]) -> None:
        mine = torch.zeros(_MOST_BYTES, dtype=torch.uint8, device="cpu")
        mine[: len(proposal)] = torch.frombuffer(bytearray(proposal), dtype=torch.uint8)
        words = membership.control().all_gather(mine)  # host memory: rows' link may be NCCL's
        agreed.extend(bytes(words[membership.members[0]].tolist()).rstrip(b"\0"))

    _perform(control, Operation.INVITE, body, {"ranks": _digest(tuple(ranks))})
    token, _, place = agreed.decode().partition(" ")
    invitation = Invitation(
        token=token,
        ranks=tuple(ranks),
        members=membership.members,
        num_ranks=membership.num_ranks,
        place=place,
        backend=str(control.statement["backend"]),
        options=control.statement,
    )
    return invitation.encode()


def admit(control: ControlPlane, text: str) -> tuple[int, ...]:
    """Goes on with those who are invited, once they have come; collective. The ranks that stayed.

    Raises RangeError for another text, PeerTimeoutError or MismatchError; the same on all members, and then
    all is as before.
    """
    here = control.membership.members
    with _refusing(control, Operation.ADMIT):
        invitation = Invitation.decode(text)
        if here != invitation.members:
            got = f"one by ranks {invitation.members}"
            raise RangeError("invitation", got, f"a new one, by ranks {here}")

    def body(link: Link, limits: dict[int, int]) -> None:
        take_in(control, invitation, {}, agreement.arrival(invitation.backend, [invitation.backend]))

    _perform(control, Operation.ADMIT, body, {"invitation": _digest(text)})
    return here


def take_in(
    control: ControlPlane,
    invitation: Invitation,
    statement: Mapping[str, int | str],
    facts: Mapping[str, Any],
    learn: Callable[[dict[int, dict[str, Any]]], None] = lambda met: None,
) -> None:
    """Meets those who are invited, and goes on with them on a link of its own. Inside the queue, on all
    members.

    statement: what all ranks have to pass alike. learn: is given everybody's facts, once they are there.
    Raises what keeps somebody from it, on all members, and then all is as before; but once one of them has
    the link, all go on with the new ones, and it is a fault there.
    """
    previous = control.membership
    store, connections = previous.rooted(_path(invitation.token))
    membership = previous.among(invitation.everybody, store, connections, invitation.identities)
    control.go_on_with(membership)
    try:
        membership.begin(Operation.ADMIT.label)
        learn(agreement.agree(membership, "arrived", statement, None, facts))
        control.meet(Operation.ADMIT.label)
        if not concludes(store, _ADMITTED):
            raise membership.fault(LinkError("a member did not get connected"))
    except BaseException:
        is_alone = True
        with contextlib.suppress(StoreError):
            is_alone = concludes(store, _GIVEN_UP)
        if is_alone:
            membership.disconnect()
            control.go_on_with(previous)
        else:
            previous.move()
        raise
    previous.move()


def concludes(store: ControlStore, outcome: str = _ADMITTED) -> bool:
    """Settles, for all, how an admission ends; whether so. store: of the invitation's meetings."""
    return store.settle("outcome", "", outcome) == outcome.encode()


def dismiss(control: ControlPlane, ranks: Sequence[int]) -> None:
    """Leaves out ranks for good, this one among them perhaps: it lets the others go first. Collective.

    Raises RangeError.
    """
    membership = control.membership
    with _refusing(control, Operation.DISMISS):
        _check_ranks(ranks, membership.members, "a rank that is not masked")
        if set(ranks) >= set(membership.members):
            raise RangeError("ranks", f"{tuple(ranks)}", "not all ranks that are left")
    stay = [rank for rank in membership.members if rank not in ranks]
    control.barrier(Schedule(), {"ranks": _digest(tuple(ranks))}, Operation.DISMISS)

    def leave() -> None:
        if membership.rank in ranks:
            with contextlib.suppress(StoreError):
                membership.await_leaving(stay, time.monotonic() + membership.timeout)
        else:
            membership.vacate(ranks)

    with control.issuing:
        control.locally(leave, Schedule()).host_wait()


def enter(invitation: Invitation, rank: int, store: Store | None, timeout: float) -> dist.ProcessGroup:
    """A group for a newcomer to construct on: it has no connections, for nothing but its facts is used.

    Raises RangeError for a rank that is not invited, or that another process of this host is joining as.
    """
    if rank not in invitation.ranks:
        wanted = ", ".join(map(str, invitation.ranks))
        raise RangeError("rank", f"{rank}", f"one that is invited: {wanted}")
    base = base_of(store) if store is not None else open_store(invitation.place, timeout)
    with contextlib.suppress(StoreError):  # whoever meets through it next says so
        _claim(meeting_store(base, invitation), rank)
    group = dist.ProcessGroup(base, rank, invitation.num_ranks)
    vacant = frozenset(range(invitation.num_ranks)) - set(invitation.everybody)
    meets_at(group, MeetingPlace(meeting_store(base, invitation), Connections(base), vacant))
    return group


def _claim(store: ControlStore, rank: int) -> None:
    """Posts that this process comes as `rank`, instead of one that is gone. Between hosts nobody sees
    that: the last one counts.
    """
    mine, expected = json.dumps([liveness.identity(), liveness.process_name()]), ""
    while (held := store.settle(f"claim/{rank}", expected, mine).decode()) not in (mine, expected):
        identity, process = json.loads(held)
        if liveness.is_at_work_here(identity):
            allowed = f"one that no other process asks for: {process} is joining as it"
            raise RangeError("rank", f"{rank} for {liveness.process_name()}", allowed, rank)
        expected = held


def meeting_store(base: Store, invitation: Invitation) -> ControlStore:
    """The place in a run's store where members and those whom they invite meet."""
    return ControlStore(base, _path(invitation.token))


@contextlib.contextmanager
def _refusing(control: ControlPlane, operation: Operation) -> Iterator[None]:
    """Refuses on all ranks what is found wrong inside."""
    with control.issuing:
        try:
            yield
        except ArgumentError as problem:
            control.refuse(operation, problem, Schedule())


def _check_ranks(ranks: Sequence[int], among: Collection[int], allowed: str) -> None:
    for rank in ranks:
        if rank not in among:
            raise RangeError("ranks", f"{rank}", allowed)
    if not ranks or len(set(ranks)) < len(ranks):
        raise RangeError("ranks", f"{tuple(ranks)}", "at least one, and each once")


def _proposal(place: str) -> bytes:
    """A token and the store's place; without it if it takes too many bytes: newcomers are given the store."""
    token = uuid.uuid4().hex
    whole = f"{token} {place}".encode()
    return whole if len(whole) <= _MOST_BYTES else f"{token} ".encode()


def _path(token: str) -> str:
    return f"deepep/join/{token}"


def _digest(value: object) -> int:
    """A value as a header's word: compared alone."""
    return zlib.crc32(repr(value).encode())


def _perform(control: ControlPlane, operation: Operation, body: _Body, agreed: dict[str, int]) -> None:
    with control.issuing:
        control.perform(operation, Schedule(), body, agreed=agreed).host_wait()
