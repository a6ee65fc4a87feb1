"""EmulatedNetwork: network namespaces on this machine, a rank each, with a cluster's links between them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from deepep.sim.links.clusters import EmulatedCluster
from deepep.sim.links.switch import INTERFACE, SUBNET

if TYPE_CHECKING:
    from typing_extensions import Self

HINT = "it needs Linux, /dev/net/tun, ip (iproute2) and the rights of root, as in: unshare -r COMMAND"
_CLONE_NEWNET = 0x40000000
_PROBE = EmulatedCluster("probe", ((0, 1),), (1e6, 1e6))


class NetworkError(RuntimeError):
    """Networks cannot be emulated here; says why and what it takes."""


class EmulatedNetwork:
    """A cluster's links, alive until `close`. Raises NetworkError where the system does not allow it.

        with EmulatedNetwork(cluster("racks")) as network, World(8, network=network) as world:
            world.run(...)

    namespaces: by rank, the path of its network namespace. addresses: by rank, as text.
    """

    def __init__(self, cluster: EmulatedCluster) -> None:
        if shutil.which("ip") is None or not os.path.exists("/dev/net/tun"):
            raise NetworkError(HINT)
        self.cluster = cluster
        self._switch = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("switch.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for its parent
        )
        assert self._switch.stdout is not None
        assert self._switch.stderr is not None
        self._write(cluster)
        line = self._switch.stdout.readline()
        if not line:
            last = self._switch.stderr.read().strip().splitlines()[-1:]
            self.close()
            raise NetworkError(f"{' '.join(last)}; {HINT}")
        self.namespaces = [f"/proc/{self._switch.pid}/fd/{fd}" for fd in json.loads(line)]
        self.addresses = [f"{SUBNET}.{rank + 1}" for rank in range(cluster.num_ranks)]

    def change(self, cluster: EmulatedCluster) -> None:
        """Other links between the same ranks, for what is sent from now on."""
        if cluster.num_ranks != self.cluster.num_ranks:
            raise ValueError(f"ranks: got {cluster.num_ranks}; allowed: {self.cluster.num_ranks}")
        self.cluster = cluster
        self._write(cluster)

    def close(self) -> None:
        """Ends the switch, and with it the namespaces that nobody is in. Idempotent."""
        for stream in (self._switch.stdin, self._switch.stdout, self._switch.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._switch.kill()
        self._switch.wait()

    def _write(self, cluster: EmulatedCluster) -> None:
        assert self._switch.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its last words say why
            self._switch.stdin.write(cluster.to_json() + "\n")
            self._switch.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def why_not() -> str:
    """The reason why networks cannot be emulated here; empty if they can."""
    try:
        EmulatedNetwork(_PROBE).close()
    except NetworkError as error:
        return str(error)
    return ""


def enter_namespace(path: str) -> None:
    """Moves this thread, and threads that it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")


__all__ = ["INTERFACE", "EmulatedNetwork", "NetworkError", "enter_namespace", "why_not"]
