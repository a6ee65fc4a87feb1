"""Ranks on one machine as if on several hosts: processes with a host name a domain, and a wire between."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepep.sim.links.loopverbs import MAX_PROCESSES, WireError, WireTraffic, library, session_file, traffic


@dataclass(frozen=True)
class WireOptions:
    """Ranks, their domains, and the wire's manners.

    ranks_per_domain: consecutive ranks that have one host name. delay_us: each work request waits a while, up
    to this many microseconds. weak: plain writes may land behind later ones. seed: of all that is random.
    silent: by rank, the number of work requests after which its NIC falls silent.
    roce: the port is Ethernet's, and peers have GIDs, not LIDs.
    deadline: seconds after which everything is ended. grace: seconds that ranks have when one has failed.
    """

    ranks: int
    ranks_per_domain: int
    delay_us: int = 0
    weak: bool = False
    seed: int = 1
    silent: Mapping[int, int] = field(default_factory=dict)
    roce: bool = False
    deadline: float = 300.0
    grace: float = 10.0


@dataclass(frozen=True)
class WireResult:
    """Exit statuses by rank (negative: a signal ended it; None: it was ended here), and the traffic."""

    statuses: list[int | None]
    traffic: dict[tuple[int, int], WireTraffic]

    @property
    def succeeded(self) -> bool:
        return all(status == 0 for status in self.statuses)


def run_on_wire(
    wire: WireOptions, command: Sequence[str], say: Callable[[int, str], None] | None = None
) -> WireResult:
    """Run `command` once a rank, and end whatever is left of it, also if this process is killed.

    Each process gets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK of its domain, MASTER_ADDR, ...), a
    preloaded wire and the host name of its domain. say: gets (rank, line) of what the processes print.
    Raises WireError if the wire cannot be built, ValueError for numbers that make no sense.
    """
    _check(wire)
    preload, session = library(), f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    port = _free_port()
    ranks: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    keeper = _keeper(session)
    try:
        for rank in range(wire.ranks):
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **_environment(wire, rank, str(preload), session, port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its children can be ended with it
            )
            ranks.append(process)
            thread = threading.Thread(target=_relay, args=(rank, process, say), daemon=True)
            thread.start()
            threads.append(thread)
        _wait(wire, ranks)
        statuses = [process.poll() for process in ranks]
        _end(ranks)
        for thread in threads:
            thread.join(5.0)
        passed = traffic(session) if session_file(session).exists() else {}
        return WireResult(statuses, passed)
    finally:
        _end(ranks)
        keeper.communicate(b".")  # ends what has left its rank's session, and the session's memory


def _keeper(session: str) -> subprocess.Popen[bytes]:
    """Starts what outlives this process, should it be killed, and then ends the ranks (keeper.py)."""
    program = Path(__file__).with_name("keeper.py")
    command = [sys.executable, "-I", "-S", str(program), session]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _check(wire: WireOptions) -> None:
    if not 1 <= wire.ranks <= MAX_PROCESSES:
        raise ValueError(f"ranks: got {wire.ranks}; allowed: 1 to {MAX_PROCESSES}")
    if wire.ranks_per_domain < 1:
        raise ValueError(f"ranks_per_domain: got {wire.ranks_per_domain}; allowed: at least 1")
    if not wire.delay_us >= 0:
        raise ValueError(f"delay_us: got {wire.delay_us}; allowed: at least 0")
    if not wire.deadline > 0:  # nor what is no number
        raise ValueError(f"deadline: got {wire.deadline:g}; allowed: above 0")
    if not wire.grace >= 0:
        raise ValueError(f"grace: got {wire.grace:g}; allowed: at least 0")
    for rank, requests in wire.silent.items():
        if not 0 <= rank < wire.ranks or requests < 1:
            raise ValueError(f"silent: got {rank}:{requests}; allowed: a rank and at least 1 work request")


def _environment(wire: WireOptions, rank: int, preload: str, session: str, port: int) -> dict[str, str]:
    domain, local = divmod(rank, wire.ranks_per_domain)
    size = min(wire.ranks_per_domain, wire.ranks - domain * wire.ranks_per_domain)
    before, queues = os.environ.get("LD_PRELOAD"), max(8, 64 // wire.ranks)
    return {
        "LD_PRELOAD": f"{preload}:{before}" if before else preload,
        "LOOPVERBS_SESSION": session,
        "LOOPVERBS_RANK": str(rank),
        "LOOPVERBS_HOSTNAME": f"domain-{domain}",
        "LOOPVERBS_DELAY_US": str(wire.delay_us),
        "LOOPVERBS_WEAK": str(int(wire.weak)),
        "LOOPVERBS_SEED": str(wire.seed),
        "LOOPVERBS_STOP_AFTER": str(wire.silent.get(rank, 0)),
        "LOOPVERBS_ROCE": str(int(wire.roce)),
        "RANK": str(rank),
        "WORLD_SIZE": str(wire.ranks),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": str(domain),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The wire copies by calls of CUDA's driver. A kernel that is loaded while another waits for the wire
        # would wait for that one, and keep the driver to itself; so would a stream in a queue with others.
        # MPS shares one GPU's queues among its processes.
        "CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "EAGER"),
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", str(queues)),
        "NVSHMEM_REMOTE_TRANSPORT": "ibrc",
        "NVSHMEM_DISABLE_MNNVL": "1",
        "NVSHMEM_HCA_PREFIX": "loop",
        "NVSHMEM_IB_ENABLE_RELAXED_ORDERING": "0",
        **({"NVSHMEM_IB_GID_INDEX": "0"} if wire.roce else {}),  # else it reads files of the device
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _relay(rank: int, process: subprocess.Popen[str], say: Callable[[int, str], None] | None) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if say is None:
            print(f"[{rank}] {line}", end="", file=sys.stdout, flush=True)
        else:
            say(rank, line.rstrip("\n"))


def _wait(wire: WireOptions, ranks: list[subprocess.Popen[str]]) -> None:
    """Until all have ended, or the deadline has passed, or one has failed and the others had their grace."""
    end = time.monotonic() + wire.deadline
    failed = False
    while time.monotonic() < end:
        statuses = [process.poll() for process in ranks]
        if None not in statuses:
            return
        if not failed and any(status not in (None, 0) for status in statuses):
            failed, end = True, min(end, time.monotonic() + wire.grace)
        time.sleep(0.02)


def _end(ranks: list[subprocess.Popen[str]]) -> None:
    """Ends what is left of each rank's session: the processes that this module has started, and theirs."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.wait()


__all__ = ["WireError", "WireOptions", "WireResult", "run_on_wire"]
