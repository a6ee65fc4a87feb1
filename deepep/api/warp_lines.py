"""Time lines of warps of a buffer's calls: recorded on request, saved as a trace."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deepep.errors import ModeError
from deepep.runtime.checks import check_int
from deepep.runtime.control.lines import CallLines, LineRecorder, WarpLine, WarpSpan
from deepep.runtime.engine import Engine

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_CALLS = 64
"""Of one recording: on a GPU of 132 SMs each sets 2 MB aside, in either mode."""


class WarpTimeline:
    """Steps of the warps of one rank in the calls of a `with` block.

    calls: there behind the block, of each mode in their order; see `CallLines`.
    """

    def __init__(self, recorder: LineRecorder, num_calls: int) -> None:
        self.calls: list[CallLines] = []
        self._recorder, self._num_calls = recorder, num_calls

    def __enter__(self) -> Self:
        """Raises ModeError if the buffer is recording already."""
        if self._recorder.asks:
            raise ModeError("record_warps", "a block inside another", "one at a time")
        self._recorder.begin(self._num_calls)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls = self._recorder.end()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the calls as a trace that chrome://tracing and ui.perfetto.dev show, and
        `python -m deepep warps` draws. Raises OSError.
        """
        with open(path, "w", encoding="utf-8") as file:
            json.dump(trace_of(self.calls), file)


class WarpCalls:
    """Calls about time lines, of whoever has an engine."""

    _engine: Engine

    def record_warps(self, calls: int = 4) -> WarpTimeline:
        """Record, in a `with` block, what each warp of the kernels was at and when.

            with buffer.record_warps() as lines:
                buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=E)
            lines.save("rank0.json")

        Not collective; ranks may differ. The calls in the block are launched in a form of their kernel that
        writes time lines; all others as ever, so that nothing is paid for it elsewhere. Dispatch (by a layout
        or top-k), combine by SMs, low-latency dispatch and combine in one launch, in the default mode, have
        such a form; the others, and those that a graph captures, are listed without warps. The end of the
        block waits until the calls have ended.

        calls: so many of each mode have memory, 1 to 64; later ones are listed without warps.

        Raises ModeError on a backend whose operations no warps carry out, and between domains;
        ArgumentTypeError and RangeError.
        """
        num_calls = check_int("calls", calls, 1, MOST_CALLS)
        recorder = self._engine.lines
        if recorder is None:
            backend = self._engine.info.backend
            raise ModeError(
                "backend", backend, "one whose kernels record, inside one domain: cuda or emulator"
            )
        return WarpTimeline(recorder, num_calls)


def trace_of(calls: Iterable[CallLines]) -> dict[str, Any]:
    """Calls of any ranks as a trace: a process a rank, a thread a warp; times in microseconds."""
    events: list[dict[str, Any]] = []
    named: set[tuple[int, int]] = set()
    for number, call in enumerate(calls):
        for line in call.warps:
            place = {"pid": call.rank, "tid": 100 * line.block + line.warp}
            if (call.rank, place["tid"]) not in named:
                named.add((call.rank, place["tid"]))
                name = f"block {line.block}, warp {line.warp}, SM {line.sm}"
                events.append({"ph": "M", "name": "thread_name", "args": {"name": name}, **place})
            about = {"call": number, "operation": call.operation, "sm": line.sm, "dropped": line.dropped}
            for span in line.spans:
                times = {"ts": span.begin / 1e3, "dur": (span.end - span.begin) / 1e3}
                nanoseconds = {"begin": span.begin, "end": span.end}
                args = {**about, "block": line.block, "warp": line.warp, **nanoseconds}
                events.append(
                    {"ph": "X", "name": span.step, "cat": call.operation, "args": args} | times | place
                )
    ranks = sorted({call.rank for call in calls})
    events += [{"ph": "M", "name": "process_name", "pid": r, "args": {"name": f"rank {r}"}} for r in ranks]
    return {"displayTimeUnit": "ns", "traceEvents": events}


def calls_of(trace: Any) -> list[CallLines]:
    """The calls in a trace that `trace_of` has made, those without warps left out. Raises ValueError."""
    lines: dict[tuple[int, int, str], dict[tuple[int, int, int, int], list[WarpSpan]]] = {}
    try:
        for event in trace["traceEvents"]:
            if event["ph"] != "X":
                continue
            about = event["args"]
            of_call = lines.setdefault((about["call"], event["pid"], about["operation"]), {})
            warp = about["block"], about["warp"], about["sm"], about["dropped"]
            span = WarpSpan(event["name"], int(about["begin"]), int(about["end"]))
            of_call.setdefault(warp, []).append(span)
    except (KeyError, TypeError) as problem:
        raise ValueError("no trace of record_warps") from problem
    return [
        CallLines(
            operation,
            rank,
            tuple(
                WarpLine(block, warp, sm, tuple(spans), dropped)
                for (block, warp, sm, dropped), spans in warps.items()
            ),
        )
        for (_, rank, operation), warps in lines.items()
    ]
