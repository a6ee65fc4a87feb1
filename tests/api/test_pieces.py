"""The engine's small parts on their own: errors on the wire, liveness of processes, the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from deepep import errors
from deepep.runtime.control import liveness
from deepep.runtime.control.agreement import agree, decode_error, dtype_code, encode_error
from deepep.runtime.control.comm_queue import ThreadQueue

pytestmark = pytest.mark.own_backend


@pytest.mark.parametrize("text", ["short", "é" * 5000, "'" + '"' * 2000, "\n" * 1000])
def test_errors_fit_into_their_message(text: str) -> None:
    error = errors.ShapeError("x", text, text, 3)
    raw = encode_error(error)
    assert len(raw) <= 1024
    back = decode_error(raw)
    assert type(back) is errors.ShapeError
    assert (back.argument, back.rank) == ("x", 3)
    assert text.startswith(back.got)
    assert back.got == text or len(back.got) > 100


def test_every_argument_error_travels_as_itself() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ArgumentError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert type(decode_error(encode_error(kind("a", "b", "c", 0)))) is kind


class Met:
    """A membership of rank 0, which meets the others' posts."""

    rank = 0

    def __init__(self, **posts: bytes) -> None:
        self.posts = {int(name[-1]): post for name, post in posts.items()}
        self.identities: dict[int, str] = {}

    def exchange(self, stage: str, mine: str, why: str) -> dict[int, bytes]:
        return {0: mine.encode(), **self.posts}

    def introduce(self, identities: dict[int, str]) -> None:
        self.identities = identities


def test_statements() -> None:
    def post(**stated: bool) -> bytes:
        return json.dumps([{"low_latency": True, "masks": False, **stated}, "process", {"able": 1}]).encode()

    mine = {"low_latency": True, "masks": False}
    met = Met(rank1=post(), rank2=post())
    assert agree(met, "engine", mine, None)[2] == {"able": 1}  # type: ignore[arg-type]
    assert met.identities == {0: liveness.identity(), 1: "process", 2: "process"}
    met = Met(rank1=post(masks=True), rank2=post())
    with pytest.raises(errors.MismatchError, match="rank 1: masks: got True; allowed: False, as on rank 0"):
        agree(met, "engine", mine, None)  # type: ignore[arg-type]
    refused = errors.RangeError("num_nvl_bytes", "1", "128", 2)
    met = Met(rank1=post(masks=True), rank2=encode_error(refused))
    with pytest.raises(errors.RangeError, match="rank 2: num_nvl_bytes"):
        agree(met, "engine", mine, None)  # type: ignore[arg-type]
    own = errors.RangeError("num_rdma_bytes", "1", "128")
    with pytest.raises(errors.RangeError, match="rank 0: num_rdma_bytes"):
        agree(met, "engine", mine, own)  # type: ignore[arg-type]


def test_dtypes_have_codes_of_their_own() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32, torch.int64, torch.uint8, None]
    assert len({dtype_code(dtype) for dtype in dtypes}) == len(dtypes)
    assert dtype_code(torch.complex64) == dtype_code(torch.complex128) == -2


@pytest.mark.skipif(not liveness.identity(), reason="needs /proc")
def test_the_dead_are_known_and_nobody_else() -> None:
    mine = liveness.identity()
    assert not liveness.is_dead(mine, mine)
    code = (
        "import sys; from deepep.runtime.control import liveness; "
        "print(liveness.identity(), flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    theirs = child.stdout.readline().strip()
    assert not liveness.is_dead(theirs, mine)
    # Somebody else's host, or nothing known: never dead.
    assert not liveness.is_dead("", mine)
    assert not liveness.is_dead(theirs, "")
    assert not liveness.is_dead("elsewhere " + theirs.split(" ", 1)[1], mine)
    # Their number, given to a later process, is not them.
    boot, namespace, pid, started = theirs.split()
    assert liveness.is_dead(f"{boot} {namespace} {pid} {int(started) - 1}", mine)
    child.kill()
    # Killed and not yet waited for: a zombie is dead as well.
    while liveness._start_time(child.pid) != -1:
        threading.Event().wait(0.001)
    assert liveness.is_dead(theirs, mine)
    while not liveness.is_gone(theirs, mine):  # once the last of its threads has ended
        threading.Event().wait(0.001)
    child.communicate()
    assert liveness.is_dead(theirs, mine)
    assert liveness.is_gone(theirs, mine)


@pytest.mark.skipif(not liveness.identity(), reason="needs /proc")
def test_a_process_is_not_gone_while_threads_of_it_run() -> None:
    mine = liveness.identity()
    code = (
        "import ctypes, sys, threading; from deepep.runtime.control import liveness; "
        "threading.Thread(target=sys.stdin.read).start(); print(liveness.identity(), flush=True); "
        "ctypes.CDLL(None).syscall(60, 0)  # the first thread ends, and no other"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the number of exit is another")
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    theirs = child.stdout.readline().strip()
    while not liveness.is_dead(theirs, mine):
        threading.Event().wait(0.001)
    assert not liveness.is_gone(theirs, mine)
    child.kill()
    while not liveness.is_gone(theirs, mine):
        threading.Event().wait(0.001)
    child.communicate()


def test_the_queue_runs_in_order_and_keeps_failures_apart() -> None:
    queue = ThreadQueue("test")
    gate, order = threading.Event(), []

    def fail() -> None:
        order.append("fails")
        raise KeyError("job")

    first = queue.submit(gate.wait)
    second = queue.submit(fail)
    third = queue.submit(lambda: order.append("runs"))
    assert order == []
    gate.set()
    third.host_wait()
    first.host_wait()
    for _ in range(2):
        with pytest.raises(KeyError):
            second.current_stream_wait()
    assert order == ["fails", "runs"]
    assert queue.close(10.0)
    assert queue.close(0.0)
    with pytest.raises(errors.DestroyedError):
        queue.submit(lambda: None)


def test_a_queue_that_is_busy_is_not_waited_for_indefinitely() -> None:
    queue, gate = ThreadQueue("test"), threading.Event()
    queue.submit(gate.wait)
    assert not queue.close(0.01)
    gate.set()
    assert queue.close(10.0)


def test_the_queue_drops_what_its_jobs_held() -> None:
    import weakref

    queue = ThreadQueue("test")
    tensor = torch.zeros(3)
    seen = weakref.ref(tensor)
    queue.submit(lambda tensor=tensor: tensor.add_(1)).host_wait()
    del tensor
    queue.submit(lambda: None).host_wait()
    assert seen() is None
    queue.close(10.0)
