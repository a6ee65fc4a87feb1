"""Wait statistics of a buffer: how long this rank waited for each of the others; all ranks' as matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deepep.errors import ArgumentError, ModeError
from deepep.runtime.checks import check_flag
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.engine import Engine
from deepep.runtime.labels import with_label
from deepep.runtime.requests import Operation, Schedule

Phase = tuple[str, str]
"""An operation ("dispatch", "combine", "low_latency_dispatch", ...), and what was waited for: "arrive",
"rows", "metadata", "digest" or "kernels"."""


@dataclass(frozen=True)
class WaitStatistics:
    """Sums since waits were first measured, or last cleared.

    nanoseconds: by operation and phase, [R] int64, how long this rank waited for each; or, gathered,
        [R, R] int64, row i what rank i waited for. "arrive": until the other called the operation at all;
        several late ranks are charged with the same time. "rows": until the other's rows had come, counted
        from when those waited for before had. By kernels, on CUDA, and on the emulator in its machine's
        time: "metadata" of a dispatch and "digest" of a combine, until the other's launch had posted it;
        "rows", beyond that, until their flags were seen, of a combine those of one warp's sums; "kernels",
        of low latency, until the other's launch had posted its words.
    calls: by operation and phase, in how many calls it was measured here; 0 where that is not counted.
    """

    nanoseconds: Mapping[Phase, torch.Tensor]
    calls: Mapping[Phase, int]

    def of(self, phase: str) -> torch.Tensor | None:
        """The sum over all operations of one phase; None if it was never measured."""
        found = [waited for (_, name), waited in self.nanoseconds.items() if name == phase]
        return torch.stack(found).sum(0) if found else None


class WaitCalls:
    """Calls about waits, of whoever has an engine."""

    _engine: Engine

    def measure_waits(self, on: bool = True) -> None:
        """Measure from now on, or no longer, how long this rank waits for each of the others.

        Not collective; ranks may differ. While any rank measures, rows of the reference travel from peer to
        peer, on all of them, so that each peer's are timed by themselves; the bits are the same. It costs two
        words in each control exchange, which are there in any case, and a few readings of the clock.

        On CUDA kernels add up their own waits: of low latency in calls without statistics of the caller's.
        A host that waits for counts waits for the same metadata as its kernel. Graphs measure if they were
        captured meanwhile. Between domains nothing is measured yet.

        Raises ModeError on a backend that cannot, and ArgumentTypeError.
        """
        recorder = self._recorder()
        recorder.ask(check_flag("on", on))

    def wait_statistics(self, clear: bool = False) -> WaitStatistics:
        """This rank's waits, by operation, phase and peer: see `WaitStatistics`. clear: begin anew.

        Raises ModeError and ArgumentTypeError as `measure_waits` does.
        """
        return _statistics(self._recorder().read(check_flag("clear", clear)))

    @with_label
    def gather_wait_statistics(self, clear: bool = False) -> WaitStatistics:
        """All ranks' waits as matrices [R, R]. Collective over the ranks that take part, those that joined
        among them; the rows of masked ranks are zero. Waits for this call itself are not measured.

        Raises, on all ranks, ModeError and ArgumentTypeError as `measure_waits` does, and PeerTimeoutError.
        """
        recorder = self._recorder()
        try:
            found = recorder.read(check_flag("clear", clear))
        except ArgumentError as problem:
            self._engine.refuse(Operation.GATHER, problem, Schedule())
        mine = json.dumps([[*key, *waits] for key, waits in found.items()]).encode()
        asked, recorder.asks = recorder.asks, False
        try:
            everyone = _gather(self._engine, mine)
        finally:
            recorder.asks = asked
        size = self._engine.info.num_ranks
        sums: dict[Phase, torch.Tensor] = {}
        for rank, raw in everyone.items():
            for operation, phase, waited, _ in json.loads(raw):
                empty = torch.zeros(size, size, dtype=torch.int64, device="cpu")
                sums.setdefault((operation, phase), empty)[rank] = torch.tensor(waited, device="cpu")
        calls = {key: count for key, (_, count) in found.items()}
        return WaitStatistics(sums, calls)

    def _recorder(self) -> WaitRecorder:
        recorder = self._engine.waits()
        if recorder is None:
            backend = self._engine.info.backend
            raise ModeError("backend", backend, "one that measures waits: cuda, reference or emulator")
        return recorder


def _gather(engine: Engine, mine: bytes) -> dict[int, bytes]:
    """Every member's bytes, by rank; of any length. Collective."""
    lengths = engine.gather(torch.tensor([len(mine)], device="cpu"), {"length": 1})
    most = max(int(length) for length in lengths.values())
    padded = torch.zeros(max(most, 1), dtype=torch.uint8, device="cpu")
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    everyone = engine.gather(padded, {"bytes": most})
    return {rank: bytes(raw.tolist())[: int(lengths[rank])] for rank, raw in everyone.items()}


def _statistics(found: Mapping[Phase, tuple[list[int], int]]) -> WaitStatistics:
    waits = {key: torch.tensor(sums, dtype=torch.int64, device="cpu") for key, (sums, _) in found.items()}
    return WaitStatistics(waits, {key: calls for key, (_, calls) in found.items()})
