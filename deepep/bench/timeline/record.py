"""Spans of time on one rank: what its host called, and on a GPU the kernels of each stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepep.runtime.control.transport import gather_bytes

HOST = "host"
#: Part of a kernel's name, in small letters -> what it does; the first that fits.
KERNELS = (
    ("dispatch", "dispatch"),
    ("combine", "combine"),
    ("deepep", "rows and routing"),
    ("gemm", "products"),
    ("nvjet", "products"),
    ("cutlass", "products"),
    ("grouped", "products"),
)


@dataclass(frozen=True)
class Span:
    """Something that lasted. lane: "host", or "stream 7". begin, end: microseconds of the host's clock."""

    lane: str
    name: str
    begin: float
    end: float


class Marks:
    """The host's spans, as a program marks them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Marks what is inside; spans are not nested."""
        begin = time.time_ns()
        yield
        self.spans.append(Span(HOST, name, begin / 1e3, time.time_ns() / 1e3))


Step = Callable[[Marks], None]


def record(
    group: dist.ProcessGroup,
    device: torch.device,
    step: Step,
    warmup: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[Span]]:
    """By rank, the spans of one step behind `warmup` others; times begin with the first. Collective."""
    for number in range(warmup):
        say(f"step {number + 1} of {warmup} to warm up")
        step(Marks())
    say("the step that is recorded")
    marks = Marks()
    kernels: list[Span] = []
    if device.type == "cuda":
        kernels = _profiled(group, device, step, marks)
    else:
        meet(group, device)
        step(marks)
    spans = [astuple(span) for span in [*marks.spans, *kernels]]
    everyone = [
        [Span(*fields) for fields in json.loads(raw)]
        for raw in gather_bytes(group, json.dumps(spans).encode())
    ]
    first = min(span.begin for mine in everyone for span in mine)
    return [
        [Span(span.lane, span.name, span.begin - first, span.end - first) for span in mine]
        for mine in everyone
    ]


def meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """Lets all ranks go at nearly the same time, with idle devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    gather_bytes(group, b"")


def _profiled(group: dist.ProcessGroup, device: torch.device, step: Step, marks: Marks) -> list[Span]:
    """A step's kernels by stream, those that begin with its first mark or later."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        meet(group, device)
        step(marks)
        torch.cuda.synchronize()
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    found = []
    for event in results.events():
        # Labels of calls are repeated among the kernels, under their own names.
        if event.device_type() != DeviceType.CUDA or event.name().startswith("deepep."):
            continue
        begin = event.start_ns() / 1e3
        end = begin + event.duration_ns() / 1e3
        if begin >= marks.spans[0].begin:
            found.append(Span(f"stream {event.device_resource_id()}", kind_of(event.name()), begin, end))
    return found


def kind_of(kernel: str) -> str:
    """The work that a kernel of this name does."""
    name = kernel.lower()
    return next((kind for part, kind in KERNELS if part in name), "other kernels")
