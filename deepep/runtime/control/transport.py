"""Links between ranks: private process groups, whose errors say that they are the transport's."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from deepep.errors import RangeError
from deepep.runtime.control.stores import base_of
from deepep.runtime.control.waits import WaitRecorder

_NOBODY_SENDS, _HEADERS = 0x0DEE, 0x0DEF  # message tags
_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read where a group is made, and nowhere else
_making = threading.Lock()
_MANY = 5
"""From so many members on, one round of messages is faster than gloo's ring."""


class LinkError(Exception):
    """The transport failed: a peer is gone, or did not answer in time.

    Internal; users see PeerTimeoutError.
    """


@contextlib.contextmanager
def transport() -> Iterator[None]:
    """Turns torch.distributed's errors into LinkError, and nothing else: arguments were checked before."""
    try:
        yield
    # ValueError: torch's own error logging raises it, over the real error, for groups outside its registry.
    except (RuntimeError, ValueError) as error:
        cause = error.__context__ if isinstance(error, ValueError) and error.__context__ else error
        raise LinkError(str(cause).partition(". This is typically")[0]) from None


@dataclass(frozen=True)
class Link:
    """A private group between the members of a buffer, ascending ranks; its errors are LinkErrors.

    waits: where to note how long rows of each peer are waited for, in an operation that measures it.
    """

    group: dist.ProcessGroup
    rank: int
    num_ranks: int
    members: tuple[int, ...]
    waits: WaitRecorder | None = None
    operation: str = ""

    def all_gather(self, t: torch.Tensor) -> dict[int, torch.Tensor]:
        """Every member's `t`, by rank. Shape and dtype must be the same on all members."""
        everyone = [torch.empty_like(t) for _ in self.members]
        with transport():
            if len(self.members) < _MANY or device_type_of(self.group) != "cpu":
                dist.all_gather(everyone, t, group=self.group)
            else:
                self._exchange(t, everyone)
        return dict(zip(self.members, everyone, strict=True))

    def _exchange(self, t: torch.Tensor, everyone: list[torch.Tensor]) -> None:
        """The same in one round, where gloo's would go round a ring, a delay for every rank."""
        mine, size = self.group.rank(), len(everyone)
        everyone[mine].copy_(t)
        others = [(mine + step) % size for step in range(1, size)]
        works = [self.group.recv([everyone[other]], other, _HEADERS) for other in others]
        works += [self.group.send([t], other, _HEADERS) for other in others]
        for work in works:
            work.wait()


def private_group(store: Store, rank: int, size: int, timeout: float, device_type: str) -> dist.ProcessGroup:
    """A process group of our own, known to its members alone: the user's collectives never meet ours.

    `dist.new_group` is not used: its names count the groups a process has made, and so differ between ranks
    that belong to different subgroups. Collective over the members, with a store prefix that nobody used
    before.
    """
    seconds = timedelta_of(timeout)
    group = dist.ProcessGroup(store, rank, size)
    with transport():
        if device_type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = seconds
            kind = dist.ProcessGroup.BackendType.NCCL
            with _errors_are_not_fatal():
                nccl = dist.ProcessGroupNCCL(store, rank, size, options)
            group._register_backend(torch.device("cuda"), kind, nccl)
        else:
            kind = dist.ProcessGroup.BackendType.GLOO
            gloo = dist.ProcessGroupGloo(store, rank, size, seconds)
            group._register_backend(torch.device("cpu"), kind, gloo)
    group._set_default_backend(kind)
    return group


@contextlib.contextmanager
def _errors_are_not_fatal() -> Iterator[None]:
    """Has torch's watchdog of a group made inside note errors and nothing more: by default it ends the
    process when a peer has died, before `hang_up` comes to abort what waits for it.
    """
    with _making:
        before = os.environ.get(_HANDLING)
        os.environ[_HANDLING] = "0"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_HANDLING]
            else:
                os.environ[_HANDLING] = before


def set_timeout(group: dist.ProcessGroup, timeout: float) -> None:
    """Gives a private group's operations another time-out than its construction had."""
    device = torch.device(device_type_of(group))
    group._get_backend(device)._set_default_timeout(timedelta_of(timeout))


def timedelta_of(seconds: float) -> timedelta:
    """A time-out as torch takes it: in whole milliseconds, and none is none at all."""
    return timedelta(milliseconds=max(1, round(1000 * seconds)))


def hang_up(group: dist.ProcessGroup) -> None:
    """Closes a private group's connections now, whoever still refers to it:
    peers that wait on them fail at once.
    """
    if device_type_of(group) == "cuda":
        with contextlib.suppress(RuntimeError):  # one that has failed may refuse; it is closed then
            group.abort()
        return
    # gloo closes when the last reference goes, work and tracebacks included, and has no other way.
    # But a wait that runs out of time closes all connections of its group.
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
                group.recv([nothing], peer, _NOBODY_SENDS).wait(timedelta(milliseconds=1))


def device_type_of(group: dist.ProcessGroup) -> str:
    """The device type of the tensors in which this group's ranks exchange words: "cpu" wherever it serves
    the CPU, whatever else it serves; "cuda" for NCCL alone.

    It says nothing about a Buffer's device (runtime/devices.py).
    """
    served = {device.type for device in group._device_types}
    return "cuda" if served == {"cuda"} else "cpu"


def serve_store(loopback: bool, timeout: float = 300.0) -> TCPStore:
    """A store that this process serves, for ranks on this host alone or on any."""
    listener = socket.socket()
    with listener:
        listener.bind(("127.0.0.1" if loopback else "0.0.0.0", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        return TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta_of(timeout),
            master_listen_fd=listener.detach(),
        )


def store_of(group: dist.ProcessGroup) -> Store:
    """The store a group met through, with its own prefix: on a connection of its own where it can have one.

    A store client serves one call at a time; waiting on a copy does not block the user's own calls. Stores
    written in Python have clone() and refuse it. Raises RangeError.
    """
    if hasattr(group, "get_group_store"):
        store = group.get_group_store()
    else:
        store = dist.distributed_c10d._get_process_group_store(group)  # torch 2.8
    store = _another(store)
    try:
        store.check(["deepep"])
    except RuntimeError as error:
        if "pure virtual" not in str(error):
            raise
        # torch keeps the C++ half of a store written in Python, and lets go of the half with its methods.
        got = "a process group whose store does not exist any more"
        raise RangeError(
            "group", got, "one whose store the caller keeps, if it is written in Python"
        ) from None
    return store


def _another(store: Store) -> Store:
    """Another connection to a store; the same where there is no other, and then it serves all in turn."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return store.clone()  # type: ignore[attr-defined, no-any-return, unused-ignore]
    return store


class Connections:
    """Connections to `store` for those who wait on it: a wait has its connection to itself until it ends.

    What is given back serves the next. A store in a file is a log of all that was ever set or removed, which
    every new connection reads from its beginning, under a lock: one for each construction of a job would take
    longer and longer, and the other ranks' calls with it. To a TCPStore it is a socket and a name's look-up.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._idle: list[Store] = []

    def rooted(self) -> Connections:
        """Connections to the store below all prefixes."""
        return Connections(base_of(self._store))

    def take(self) -> Store:
        """An idle connection, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return _another(self._store)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Store]:
        """The same, and has it back afterwards."""
        store = self.take()
        try:
            yield store
        finally:
            if store is not self._store:
                self._idle.append(store)


def gather_bytes(group: dist.ProcessGroup, mine: bytes) -> list[bytes]:
    """Every rank's bytes, by rank; of any length, which may differ. Collective over the group."""
    device = torch.device("cuda", torch.cuda.current_device()) if device_type_of(group) == "cuda" else "cpu"

    def gather(values: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(everyone, values, group=group)
        return [given.cpu() for given in everyone]

    lengths = [int(length) for length in gather(torch.tensor([len(mine)], device=device))]
    padded = bytearray(mine.ljust(max(max(lengths), 1), b"\0"))
    everyone = gather(torch.frombuffer(padded, dtype=torch.uint8).to(device))
    return [bytes(raw.tolist())[:length] for raw, length in zip(everyone, lengths, strict=True)]
