"""The program of one rank process of a World."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from deepep.sim.links.emulated import INTERFACE, enter_namespace
from deepep.sim.worlds.gpus import take_gpu
from deepep.sim.worlds.travel import pack, unpack


@dataclass(frozen=True)
class RankSpec:
    """Facts that a rank process needs to join its world. store: "file:<path>" or "tcp:<port>".

    namespace: the network namespace to be in, "" for the parent's.
    """

    rank: int
    num_ranks: int
    backend: str
    store: str
    timeout: float
    environment: dict[str, str]
    stack_file: str
    namespace: str = ""


@dataclass
class RankContext:
    """The first argument of a function that a world runs.

    Attributes:
        rank, num_ranks: this rank, and R.
        group: the process group of all ranks.
        device: where this rank's tensors live.
        scratch: a dictionary that is kept from run to run, until the world is rebuilt.
    """

    rank: int
    num_ranks: int
    group: Any
    device: torch.device
    scratch: dict[str, Any] = field(default_factory=dict)


class RemoteError(RuntimeError):
    """Stands for an exception, or a result, of a rank that could not be sent to the parent."""


@dataclass(frozen=True)
class BareException:
    """An exception's parts, for types whose constructor cannot be called with what `args` holds."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]

    def rebuild(self) -> BaseException:
        error = self.kind.__new__(self.kind)
        error.args = self.args
        error.__dict__.update(self.state)
        return error


def main(connection: Connection, lifeline: Connection, spec: RankSpec) -> None:
    """Joins the world, then runs what arrives until the parent says stop or is gone."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _end_even_if_stopped()
    # Ctrl-C is for the parent, which ends its ranks. A stack is written on request, even inside a
    # blocked collective, and by a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with open(spec.stack_file, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        faulthandler.enable(file=stack_file, all_threads=True)
        context = _guarded(connection, lambda: _join(spec))
        if context is not None:
            _serve(connection, context)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread left behind by a failed run, or a library's exit handler that waits for a
    # dead peer, must not keep a rank alive.
    os._exit(0)


def _end_with_parent(lifeline: Connection) -> None:
    """A rank inside a run, perhaps blocked for good, does not read its connection."""
    with suppress(OSError):
        lifeline.poll(None)
    os._exit(1)


def _join(spec: RankSpec) -> RankContext:
    os.environ.update(spec.environment)
    if spec.namespace:
        enter_namespace(spec.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if spec.backend == "nccl":
        device = take_gpu(spec.rank, spec.num_ranks)
    os.environ["DEEPEP_DEVICE"] = device.type  # on a GPU host as well: this world's tensors lie there
    timeout = timedelta(seconds=spec.timeout)
    kind, _, place = spec.store.partition(":")
    store: Store
    if kind == "file":
        store = FileStore(place, spec.num_ranks)
        store.set_timeout(timeout)
    else:
        store = TCPStore("127.0.0.1", int(place), is_master=False, timeout=timeout)
    dist.init_process_group(
        spec.backend, store=store, rank=spec.rank, world_size=spec.num_ranks, timeout=timeout
    )
    return RankContext(spec.rank, spec.num_ranks, dist.group.WORLD, device)


def _end_even_if_stopped() -> None:
    """Has Linux kill this process when the one that forked it ends: a stopped rank cannot end itself."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve(connection: Connection, context: RankContext) -> None:
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return  # the parent is gone
        if not message:
            dist.destroy_process_group()
            return

        def call(message: bytes = message) -> Any:
            length = int.from_bytes(message[:8], "little")
            fn, args, kwargs = unpack(message[8 : 8 + length])
            own = unpack(message[8 + length :]) if len(message) > 8 + length else ()
            return fn(context, *args, *own, **kwargs)

        _guarded(connection, call, keep_value=True)


def _guarded(connection: Connection, call: Any, *, keep_value: bool = False) -> Any:
    """Sends what `call` returns or raises to the parent. None if it raised."""
    value = None
    try:
        value = call()
        reply = _packed("returned", value if keep_value else None, "")
    except BaseException as error:  # whatever it is, the parent has to learn of it
        reply = _packed("raised", error, _trace(error))
    try:
        connection.send_bytes(reply)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the parent is gone
    return value


def _trace(error: BaseException) -> str:
    """The traceback as text, from the caller's own function on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__ and trace.tb_next is not None:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _packed(kind: str, value: Any, trace: str) -> bytes:
    try:
        message = pack((kind, value, trace))
        if kind == "raised":
            try:
                unpack(message)
            except TypeError:  # its constructor takes something else than its message
                message = pack((kind, BareException(type(value), value.args, vars(value)), trace))
        return message
    except Exception as error:  # pickling calls the value's own code, which may raise anything
        substitute = RemoteError(f"{type(value).__name__} could not be sent: {error}\n{value!r}")
        return pack(("raised", substitute, trace))
