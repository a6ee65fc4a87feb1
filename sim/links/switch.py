"""The switch of an emulated network: a program that moves packets between namespaces, as slowly as asked.

Run as a script, with nothing but the standard library. Standard input: a line of JSON, the cluster
(clusters.py, `to_json`); each further line replaces it. Standard output: one line, the file descriptors of
the ranks' network namespaces, once they can be entered. Ends with its input, and the namespaces with it.

Each rank has a namespace of its own with one interface, a TUN device whose other end is read here. A packet
waits for each link of its path in turn: a link sends one packet at a time at its rate, whoever it is for, so
ranks that share a link share its rate. Then the path's delay passes. Nothing is dropped: senders are held by
their TCP windows.
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

INTERFACE, SUBNET, MTU = "deepep0", "10.77.0", 16000
WINDOW = 1 << 20  # bytes a connection may have under way
_CLONE_NEWNET, _TUNSETIFF, _TUN_NO_PI = 0x40000000, 0x400454CA, 0x1001


class Network:
    """Links, and the packets that wait for them. Pure but for what `deliver` does."""

    def __init__(self, cluster: dict[str, Any], deliver: Callable[[int, bytes], object]) -> None:
        self.rates, self.paths, self.deliver = cluster["rates"], cluster["paths"], deliver
        self.free = [0.0] * len(self.rates)  # by link: when it has sent what it holds
        # (time, number, links still to cross, delay, target, packet)
        self.events: list[tuple[float, int, list[int], float, int, bytes]] = []
        self.number = 0

    def change(self, cluster: dict[str, Any]) -> None:
        """Other rates and paths for what is sent from now on."""
        self.rates, self.paths = cluster["rates"], cluster["paths"]
        self.free += [0.0] * (len(self.rates) - len(self.free))

    def send(self, now: float, source: int, target: int, packet: bytes) -> None:
        """A packet has arrived from a rank."""
        links, delay = self.paths[source][target]
        self._at(now, links, delay, target, packet)

    def advance(self, now: float) -> float | None:
        """Does what is due; returns when the next thing is, or None.

        Times are those at which things were due, not those at which this was called: a switch that was kept
        waiting for a processor catches up.
        """
        events = self.events
        while events and events[0][0] <= now:
            due, _, links, delay, target, packet = heapq.heappop(events)
            if links:
                link = links[0]
                sent = self.free[link] = max(due, self.free[link]) + len(packet) / self.rates[link]
                self._at(sent if links[1:] else sent + delay, links[1:], delay, target, packet)
            else:
                self.deliver(target, packet)
        return events[0][0] if events else None

    def _at(self, when: float, links: list[int], delay: float, target: int, packet: bytes) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, links, delay, target, packet))


def make_namespace(rank: int) -> tuple[int, int]:
    """A namespace with the rank's interface: its file descriptor, and that of the interface's other end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare of the network namespace")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _TUN_NO_PI))
    for line in (
        "link set lo up",
        f"addr add {SUBNET}.{rank + 1}/24 dev {INTERFACE}",
        f"link set {INTERFACE} mtu {MTU} up",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    for name in ("tcp_wmem", "tcp_rmem"):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write(f"4096 131072 {WINDOW}")
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


def _line() -> bytes:
    """A line of the input, read byte by byte: what is buffered, select would not show."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            return b""
        line += byte
    return line


def main() -> None:
    """Serves until the input ends."""
    cluster = json.loads(_line())
    made = [make_namespace(rank) for rank in range(len(cluster["paths"]))]
    tuns = [tun for _, tun in made]
    rank_of = {tun: rank for rank, tun in enumerate(tuns)}

    def deliver(target: int, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the interface's queue is full, or its rank is gone
            os.write(tuns[target], packet)

    network = Network(cluster, deliver)
    # Its lateness is everybody's delay, and beyond 0.2 s a loss to TCP. It sleeps most of the time.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print(json.dumps([namespace for namespace, _ in made]), flush=True)
    commands = sys.stdin.fileno()
    inputs = [commands, *tuns]
    due: float | None = None
    while True:
        wait = None if due is None else max(0.0, due - time.monotonic())
        for ready in select.select(inputs, [], [], wait)[0]:
            if ready == commands:
                line = _line()
                if not line:
                    return
                network.change(json.loads(line))
                continue
            with contextlib.suppress(BlockingIOError):
                for _ in range(16):
                    packet = os.read(ready, 65536)
                    target = packet[19] - 1 if packet[0] >> 4 == 4 and len(packet) >= 20 else -1
                    if 0 <= target < len(tuns) and packet[16:19] == bytes((10, 77, 0)):
                        network.send(time.monotonic(), rank_of[ready], target, packet)
        due = network.advance(time.monotonic())


if __name__ == "__main__":
    main()
