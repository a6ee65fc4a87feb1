"""Checks before NVSHMEM is started or joined: what each rank found, and what follows from it on all ranks.

Reasons: docs/operations.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from deepep.errors import ArgumentError, MismatchError, ModeError, RangeError
from deepep.runtime.traffic_lanes import VARIABLES, TrafficLanes

LEAST_VERSION = (3, 4, 5)
OWNER_ORDERING = 100
RELAXED, CONNECTIONS, TRANSPORT = (
    "NVSHMEM_IB_ENABLE_RELAXED_ORDERING",
    "NVSHMEM_IB_NUM_RC_PER_DEVICE",
    "NVSHMEM_REMOTE_TRANSPORT",
)
DEFAULTS = {RELAXED: "0"}
"""Variables that are set before NVSHMEM is started here."""
TRANSPORTS = ("ibrc", "ibdevx")
_WATCHED = (RELAXED, CONNECTIONS, TRANSPORT, *VARIABLES.values())

Plan = Literal["start", "join", "share"]
"""What all ranks do: start NVSHMEM, join the one that runs, or use what was opened here before."""


@dataclass(frozen=True)
class ProcessFacts:
    """One rank's findings.

    state: "missing" (problem says why), "stopped", "running" or "foreign" (nvshmem4py.py: State), "ours", or
    "ended" by us. pe, pes: of NVSHMEM where it runs. num_bytes: of the slab. lanes: asked for, -1 for none.
    settings: variables of NVSHMEM that are set and matter here.
    """

    state: str
    problem: str
    pe: int
    pes: int
    num_bytes: int
    version: str
    write_ordering: int
    lanes: Mapping[str, int]
    settings: Mapping[str, str]

    @classmethod
    def of(
        cls,
        state: str,
        *,
        num_bytes: int,
        lanes: TrafficLanes,
        problem: str = "",
        pe: int = -1,
        pes: int = 0,
        version: str = "",
        write_ordering: int = 0,
    ) -> ProcessFacts:
        """Findings, with the environment's."""
        return cls(
            state=state,
            problem=problem,
            pe=pe,
            pes=pes,
            num_bytes=num_bytes,
            version=version,
            write_ordering=write_ordering,
            lanes=lanes.statement(),
            settings={name: os.environ[name] for name in _WATCHED if name in os.environ},
        )

    def encode(self) -> bytes:
        """The findings as text."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes) -> ProcessFacts:
        """Findings that `encode` made a text of. Raises ValueError for anything else."""
        values: dict[str, Any] = json.loads(raw)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"findings of a rank: got {raw[:200]!r}")
        return cls(**values)


def is_on(text: str) -> bool:
    """A switch as NVSHMEM reads it: off by its first letter, on with anything else."""
    return text[:1] not in ("0", "n", "N", "f", "F")


def plan(found: Sequence[ProcessFacts]) -> Plan:
    """Plan for all ranks, from their findings by rank; raises the same on all of them.

    Raises RangeError, MismatchError or ModeError, for the lowest rank that something is wrong with.
    """
    for rank, facts in enumerate(found):
        problem = next(_problems(rank, facts, found[0]), None)
        if problem is not None:
            raise problem
    if found[0].state == "ours":
        return "share"
    return "start" if found[0].state == "stopped" else "join"


def _kind(state: str) -> str:
    return "running" if state in ("running", "foreign") else state


def _problems(rank: int, facts: ProcessFacts, first: ProcessFacts) -> Iterator[ArgumentError]:
    if facts.state == "missing":
        yield RangeError("NVSHMEM", facts.problem, "an installation that can be loaded", rank)
    if facts.state == "ended":
        yield ModeError("NVSHMEM", "ended", "one start a process: it keeps its first bootstrap", rank)
    if _kind(facts.state) != _kind(first.state):
        yield MismatchError("NVSHMEM", _kind(facts.state), f"{_kind(first.state)}, as on rank 0", rank)
    for name, value in facts.lanes.items():
        if value != first.lanes[name]:
            yield MismatchError(name, str(value), f"{first.lanes[name]}, as on rank 0", rank)
    if facts.state != "stopped":
        yield from _late_lanes(rank, facts)
    if facts.pes != first.pes:
        yield MismatchError("NVSHMEM", f"{facts.pes} PEs", f"{first.pes}, as on rank 0", rank)
    if facts.state == "ours":
        return  # checked when it was opened
    if facts.num_bytes != first.num_bytes:
        yield MismatchError("num_bytes", str(facts.num_bytes), f"{first.num_bytes}, as on rank 0", rank)
    yield from _machine(rank, facts, first)
    yield from _settings(rank, facts)


def _late_lanes(rank: int, facts: ProcessFacts) -> Iterator[ArgumentError]:
    """Lanes that NVSHMEM, which runs, cannot take any more."""
    for name, value in facts.lanes.items():
        has = facts.settings.get(VARIABLES[name], "0")
        if value >= 0 and str(value) != has:
            why = (
                f"None or {has}: NVSHMEM runs in this process already, with that; it is set before the start"
            )
            yield RangeError(name, str(value), why, rank)


def _machine(rank: int, facts: ProcessFacts, first: ProcessFacts) -> Iterator[ArgumentError]:
    least = ".".join(map(str, LEAST_VERSION))
    parts = tuple(int(part) for part in facts.version.split(".") if part.isdecimal())
    if parts[:1] != LEAST_VERSION[:1] or parts < LEAST_VERSION:
        yield RangeError("NVSHMEM", facts.version, f"{least} or later, of {LEAST_VERSION[0]}", rank)
    if facts.version != first.version:
        yield MismatchError("NVSHMEM", facts.version, f"{first.version}, as on rank 0", rank)
    if facts.write_ordering < OWNER_ORDERING:
        allowed = f"at least {OWNER_ORDERING}: else a GPU may see a NIC's word before the rows behind it"
        yield RangeError("GPUDirect RDMA write ordering", str(facts.write_ordering), allowed, rank)


def _settings(rank: int, facts: ProcessFacts) -> Iterator[ArgumentError]:
    runs = _kind(facts.state) == "running"
    relaxed = facts.settings.get(RELAXED)
    if is_on(relaxed) if relaxed is not None else runs:
        got = "not set, which is on" if relaxed is None else repr(relaxed)
        yield RangeError(RELAXED, got, "0 before NVSHMEM starts: rows might land behind their signal", rank)
    connections = facts.settings.get(CONNECTIONS, "1")
    if connections != "1":
        yield RangeError(CONNECTIONS, repr(connections), "1: with more, a fence waits for every peer", rank)
    transport = facts.settings.get(TRANSPORT, TRANSPORTS[0])
    if transport.lower() not in TRANSPORTS:
        allowed = (
            f"{' or '.join(TRANSPORTS)}: of others it is not known that an added signal carries its rows"
        )
        yield RangeError(TRANSPORT, repr(transport), allowed, rank)
