"""Mutants of the kernels: their own source with one ordering operation weakened, removed or misdirected.

What the explorer is measured by: it must catch them all. Mutants are made from the text of csrc/kernels, so a
kernel that is new or changed has its own at once; kernel_edits.py lists those made by hand. Each is compiled
into a library that the emulator loads.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deepep.sim.explore.far_edits import FAR_EDITS
from deepep.sim.explore.kernel_edits import EDITS, Edit

#: The bare exchange is a kernel by itself, and hunted with it alone: files, and the layout that they run.
EXCHANGE_FILES = ("kernels/exchange/", "layout/exchange_slots.hpp")
#: So are all-reduces.
REDUCE_FILES = ("kernels/all_reduce/", "layout/all_reduce_slots.hpp")
#: So are sends around a ring.
RING_FILES = ("kernels/ring/", "layout/ring_slots.hpp")
#: So are the low-latency operations: files, and the layout that they run.
LOW_LATENCY_FILES = ("kernels/low_latency/", "layout/low_latency_slots.hpp")
#: And those between domains.
FAR_FILES = ("kernels/low_latency_far/", "layout/low_latency_far_slots.hpp")
#: And those between domains in two levels.
RAIL_FILES = ("kernels/low_latency_rails/",)
#: Of these, files that take effect where kernels mask a rank that stops, and an edit of another.
MASKING_FILES = tuple(
    f"kernels/low_latency/{name}.hpp" for name in ("mend", "patience", "combine_call", "dispatch_call")
)
MASKING_EDITS = ("low_latency/combine_reduce.hpp: flags of rows that were not made",)
#: Of these, files that take effect in some combines alone, and the options of those.
LOW_LATENCY_OPTIONS: dict[str, Mapping[str, object]] = {
    f"kernels/low_latency/{name}.hpp": options
    for names, options in (
        (
            ("combine_entry_sum", "combine_exact", "combine_exact_send", "combine_exact_receive"),
            {"reduce": "token", "logfmt": False},
        ),
        (("combine_entries",), {"reduce": "token"}),
        (("logfmt", "logfmt_rows", "combine_encode", "combine_decode"), {"logfmt": True}),
        (
            ("combine_logfmt", "combine_logfmt_send", "combine_logfmt_receive"),
            {"reduce": "rank", "logfmt": True},
        ),
        (
            ("combine_exact_logfmt", "combine_exact_logfmt_send", "combine_exact_logfmt_receive"),
            {"reduce": "token", "logfmt": True},
        ),
        (
            ("combine", "combine_send", "combine_receive", "combine_stage", "combine_sum"),
            {"reduce": "rank", "logfmt": False},
        ),
    )
    for name in names
}
#: The same of files between domains.
LOW_LATENCY_OPTIONS |= {
    file.replace("low_latency/", "low_latency_far/"): options for file, options in LOW_LATENCY_OPTIONS.items()
} | {
    "kernels/low_latency_far/combine_rows.hpp": {"reduce": "token"},
    "kernels/low_latency_far/logfmt_puts.hpp": {"logfmt": True},
}
#: And the kernels around the local experts.
ROW_FILES = ("kernels/rows/",)
#: Two-level operations, and the layout that they alone run.
TWO_LEVEL_FILES = (
    *("kernels/two_level/", "layout/crossing_layout.hpp"),
    *("layout/rail_layout.hpp", "layout/return_layout.hpp"),
)
#: Files that take effect where copy engines return a combine's rows.
COPY_ENGINE_FILES = tuple(
    f"kernels/combine/{name}.hpp" for name in ("copy_engine", "drive", "finish", "overwritten")
)
#: Files that take effect where dispatches find out themselves where tokens go.
COUNTING_FILES = tuple(f"kernels/dispatch/{name}.hpp" for name in ("count", "count_experts", "topk"))
#: Files that take effect where rows are expanded.
EXPANDED_FILES = ("kernels/combine/expanded.hpp",)
#: Files that take effect in dispatches that spread rows, which are hunted with these alone.
SPREADING_FILES = tuple(
    f"kernels/dispatch/{name}.hpp" for name in ("expanded", "number", "scale_tiles", "spread", "streams")
)

_COMMENT = re.compile(r"//[^\n]*")
_FUNCTION = re.compile(
    r"(?:DEEPEP_DEVICE|DEEPEP_(?:WATCHING_)?(?:RECORDED_)?KERNEL\()[^;{}]*?(\w+)\s*(?:\(|,)"
)
_ORDERED = re.compile(
    r"\b(?P<op>load|store|fetch_add|fetch_or|wait_\w+|mbarrier_\w+)"
    r"<(?P<order>relaxed|acquire|release|acq_rel), (?P<scope>\w+)_scope>"
)
_FENCE = re.compile(r"\bfence<(?P<order>\w+), (?P<scope>\w+)_scope>\(\);")
_PROXY_FENCE = re.compile(r"\bfence_async<(?P<space>\w+)>\(\);")
_BULK_WAIT = re.compile(r"\bbulk_wait(?P<read>_read)?<(?P<pending>[^<>]+)>\(\);")
_BULK_COMMIT = re.compile(r"\bbulk_commit\(\);")
_SIGNAL = re.compile(r"\b(?P<op>put_signal|signal)<(?P<update>signal_add)>")
_PUT_ORDER = re.compile(r"\bput_(?P<what>fence|quiet)\(\);")
_PHASE_WAIT = re.compile(r"\bmbarrier_wait<")
_SHARED_ORDERED = re.compile(r"\.(?:get|set)<(?P<order>acquire|release)>")
_BARRIER = re.compile(r"\b(?P<op>sync_block|sync_warp)\(\);")
_WAIT = re.compile(r"\b(?P<verb>wait_)(?P<what>\w+)<(?=relaxed|acquire)")
_PLAIN_LOAD = re.compile(r"\b(?P<op>load_streaming|load)\((?!_)")
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_EPOCH = re.compile(r"const uint32_t epoch = (?P<value>next_epoch\([^;]*\));")

_WEAKER = {"acquire": ("relaxed",), "release": ("relaxed",), "acq_rel": ("relaxed", "acquire", "release")}
_NARROWER = {"sys": "gpu", "gpu": "block"}


@dataclass(frozen=True)
class Mutant:
    """One changed file. `name` tells function, operation and change, and stays when lines move."""

    name: str
    kind: str
    file: str  # relative to csrc
    line: int
    text: str  # of the whole file
    start: int  # of what is replaced in the file's text as it is
    end: int
    replacement: str
    operation: tuple[int, int]  # begin and end of the pattern that found it


_ORDERED_BY_COUNTER = "the blocks' counter has put all of these words in order before"
_OWN_ATOMIC = "the notes are atomics themselves, gathered by time and not by order"
_WORD_ALONE = "the word is all that is read"
_KERNEL_END = "the end of the kernel before it is a fence"
_BARRIER_BEHIND = "place_tokens has a block barrier, too, before any of these words is used"
_READ_BEHIND_THE_KERNEL = "hosts here read it when the kernel has ended"
_A_FIGURE = "a figure that no explored call asks for: tests of what is measured know what is right"
_OWN_ARRIVAL = "the lane that arrives is the one that waits"
_BYTES_ALONE = "the phase waits for the copies' bytes, and nobody reads what the lane wrote before"
_ONE_WORD = "the emulator orders stores to one word as they run: it cannot show what this order is for"
_ONE_OF_TWO = "get<acquire> and the fence behind it each acquire what the pushing warps have stored"

_ACQUIRED_BEFORE = "what the fence hands on was acquired before it: by a wait, or by a barrier"

_WIRE_OF_GPUS = "it comes before the wire is closed, which machines here do not need"

#: Mutants that nothing can catch, and why they do no harm. What is not here must be caught.
HARMLESS: dict[str, str] = {
    "common/fault.hpp report_fault: fetch_add acq_rel -> acquire": _OWN_ATOMIC,
    "common/fault.hpp report_fault: fetch_add acq_rel -> relaxed": _OWN_ATOMIC,
    "common/fault.hpp report_fault: fetch_add acq_rel -> release": _OWN_ATOMIC,
    "layout/layout.hpp write_totals: load gpu -> block": _ORDERED_BY_COUNTER,
    "layout/layout.hpp write_totals: store gpu -> block": _ORDERED_BY_COUNTER,
    "layout/layout.hpp write_totals: store gpu -> block (2)": _ORDERED_BY_COUNTER,
    "dispatch/dispatch.hpp dispatch_kernel: sync_block removed": _BARRIER_BEHIND,
    "dispatch/count_experts.hpp post_experts: load gpu -> block": _ORDERED_BY_COUNTER,
    "dispatch/count_experts.hpp post_experts: store gpu -> block": _ORDERED_BY_COUNTER,
    "dispatch/call.hpp grant_credit: load -> load_once": "no dispatch writes the combine epoch",
    "dispatch/host_counts.hpp post_counts_to_host: wait_tag acquire -> relaxed": _WORD_ALONE,
    "low_latency/mend.hpp mask: store sys -> gpu": _READ_BEHIND_THE_KERNEL,
    "all_reduce/flags.hpp wait_flags: fetch_or sys -> gpu": _READ_BEHIND_THE_KERNEL,
    "low_latency/patience.hpp measure_waits: load sys -> gpu": _A_FIGURE,
    "common/waits.hpp measure_wait: load -> load_once": _A_FIGURE,
    "common/lines.hpp enter: sync_warp removed": _A_FIGURE,
    "common/lines.hpp enter: sync_warp removed (2)": _A_FIGURE,
    "common/lines.hpp enter: load -> load_once": _A_FIGURE,
    "dispatch/metadata.hpp measure_metadata: load sys -> gpu": _A_FIGURE,
    "dispatch/signal.hpp wait_rows: sync_warp removed": _A_FIGURE,
    "dispatch/signal.hpp wait_rows: load -> load_once": _A_FIGURE,
    "combine/digest.hpp measure_digests: load sys -> gpu": _A_FIGURE,
    "combine/reduce.hpp measure_rows: load sys -> gpu": _A_FIGURE,
    "low_latency/dispatch_count.hpp post_words: store gpu -> block": _ONE_WORD,
    "low_latency/dispatch_count.hpp post_words: store release -> relaxed": _ONE_WORD,
    "low_latency/combine_stage.hpp stage_rows: mbarrier_expect release -> relaxed": _BYTES_ALONE,
    "combine/push.hpp signal_rows: shared acquire -> relaxed": _ONE_OF_TWO,
    "combine/push.hpp signal_rows: fence acq_rel -> release": _ONE_OF_TWO,
    "dispatch/streams.hpp follow_rows: shared acquire -> relaxed": _ONE_OF_TWO,
    "dispatch/streams.hpp follow_rows: fence acq_rel -> release": _ONE_OF_TWO,
    "barrier/barrier.hpp signal_arrival: store release -> relaxed": _KERNEL_END,
    "rows/weigh_rows.hpp weigh_row: load -> load_once": "no kernel writes the gradient while this one runs",
    "copy/bulk_copy.hpp fill: mbarrier_expect release -> relaxed": _OWN_ARRIVAL,
    "two_level/save_counts.hpp post_counts_to_host: wait_tag acquire -> relaxed": _WORD_ALONE,
    "two_level/ask.hpp ask_for_sums: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "two_level/combine_call.hpp relay_digests: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "two_level/items.hpp put_chunk: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "two_level/items.hpp grant_window_credit: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "two_level/metadata.hpp post_metadata: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "two_level/metadata.hpp relay_metadata: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "low_latency_far/puts.hpp put_stretch: fence acq_rel -> release": _ACQUIRED_BEFORE,
    "low_latency_far/puts.hpp has_put: load sys -> gpu": _A_FIGURE,
    "low_latency_far/dispatch_put.hpp put_messages: sync_warp removed": _WIRE_OF_GPUS,
    "low_latency_far/combine_put.hpp put_returns: sync_warp removed": _WIRE_OF_GPUS,
}


def mutants(csrc: Path) -> list[Mutant]:
    """All of them, in the order of the source."""
    found: list[Mutant] = []
    for path in sorted((csrc / "kernels").rglob("*.hpp")):
        text = path.read_text()
        names: Counter[str] = Counter()
        file = path.relative_to(csrc).as_posix()
        for change in sorted(_changes(text), key=lambda c: (*c.found.span(c.group), c[2:])):
            where = f"{name_of(file)} {_function_at(text, change.found.start())}: {change.change}"
            names[where] += 1
            name = where if names[where] == 1 else f"{where} ({names[where]})"
            start, end = change.found.span(change.group)
            found.append(
                Mutant(
                    name=name,
                    kind=change.kind,
                    file=file,
                    line=text.count("\n", 0, start) + 1,
                    text=text[:start] + change.replacement + text[end:],
                    start=start,
                    end=end,
                    replacement=change.replacement,
                    operation=change.found.span(),
                )
            )
    found.extend(_edited(csrc, edit) for edit in (*EDITS, *FAR_EDITS))
    return found


def name_of(file: str) -> str:
    """A file as the names of its mutants have it: folder and file, since several folders have a call.hpp."""
    return "/".join(file.split("/")[-2:])


def _edited(csrc: Path, edit: Edit) -> Mutant:
    text = (csrc / edit.file).read_text()
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.name}: {edit.old!r} occurs {text.count(edit.old)} times in {edit.file}")
    start = text.index(edit.old)
    name = f"{name_of(edit.file)}: {edit.name}"
    end = start + len(edit.old)
    return Mutant(
        name=name,
        kind="protocol",
        file=edit.file,
        line=text.count("\n", 0, start) + 1,
        text=text.replace(edit.old, edit.new),
        start=start,
        end=end,
        replacement=edit.new,
        operation=(start, end),
    )


class _Change(NamedTuple):
    """Replacement of a group of a pattern's match; the whole match is the operation."""

    found: re.Match[str]
    group: str | int
    replacement: str
    kind: str
    change: str


def _changes(text: str) -> Iterator[_Change]:
    """All that the patterns find outside of comments."""
    code = _COMMENT.sub(lambda m: " " * len(m.group()), text)
    for m in _ORDERED.finditer(code):
        for order in _WEAKER.get(m["order"], ()):
            yield _Change(m, "order", order, "order", f"{m['op']} {m['order']} -> {order}")
        if m["scope"] in _NARROWER:
            scope = _NARROWER[m["scope"]]
            yield _Change(m, "scope", scope, "scope", f"{m['op']} {m['scope']} -> {scope}")
    for m in _SHARED_ORDERED.finditer(code):
        yield _Change(m, "order", "relaxed", "order", f"shared {m['order']} -> relaxed")
    for m in _FENCE.finditer(code):
        yield _Change(m, 0, "", "fence", f"fence.{m['scope']} removed")
        for order in _WEAKER[m["order"]]:
            if order != "relaxed":
                yield _Change(m, "order", order, "fence", f"fence {m['order']} -> {order}")
        if m["scope"] in _NARROWER:
            scope = _NARROWER[m["scope"]]
            yield _Change(m, "scope", scope, "scope", f"fence {m['scope']} -> {scope}")
    for m in _PROXY_FENCE.finditer(code):
        yield _Change(m, 0, "", "proxy fence", f"fence_async<{m['space']}> removed")
        other = "global_space" if m["space"] == "shared_space" else "shared_space"
        yield _Change(m, "space", other, "proxy fence", f"fence_async {m['space']} -> {other}")
    for m in _BULK_WAIT.finditer(code):
        name = f"bulk_wait{m['read'] or ''}<{m['pending']}>"
        yield _Change(m, 0, "", "bulk group", f"{name} removed")
        more = f"{m['pending']} + 1"
        yield _Change(m, "pending", more, "bulk group", f"{name}: one group more may be pending")
        if not m["read"]:
            weaker = f"bulk_wait_read<{m['pending']}>();"
            yield _Change(m, 0, weaker, "bulk group", f"{name} -> bulk_wait_read")
    for m in _BULK_COMMIT.finditer(code):
        yield _Change(m, 0, "", "bulk group", "bulk_commit removed")
    for m in _SIGNAL.finditer(code):
        yield _Change(m, "update", "signal_set", "signal", f"{m['op']} added -> set")
    for m in _PUT_ORDER.finditer(code):
        yield _Change(m, 0, "", "put order", f"put_{m['what']} removed")
        if m["what"] == "quiet":
            yield _Change(m, 0, "put_fence();", "put order", "put_quiet -> put_fence")
    for m in _PHASE_WAIT.finditer(code):
        yield _Change(m, 0, "emulator_passes_mbarrier<", "wait", "mbarrier_wait does not wait")
    for m in _BARRIER.finditer(code):
        yield _Change(m, 0, "", "barrier", f"{m['op']} removed")
    for m in _WAIT.finditer(code):
        # The word is read once, in its order, and taken for what was waited for.
        yield _Change(m, "verb", "emulator_passes_", "wait", f"wait_{m['what']} does not wait")
    for m in _PLAIN_LOAD.finditer(code):
        yield _Change(m, "op", "load_once", "read-only path", f"{m['op']} -> load_once")
    for m in _EPOCH.finditer(code):
        yield _Change(m, "value", "1", "epoch", "epoch always 1")
        yield _Change(m, "value", f"(({m['value']}) & 1u)", "epoch", "epoch is a parity")


def _function_at(text: str, position: int) -> str:
    names = [m.group(1) for m in _FUNCTION.finditer(text, 0, position)]
    return names[-1] if names else "?"


#: Flags of a mutant's build: most fail in their first schedules, so compiling is what costs.
_FLAGS = (
    "-std=c++20",
    "-O0",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
)


_COMMON = "common.hpp"


def precompile(csrc: Path, folder: Path, compiler: str = "c++") -> Path:
    """Compiles the headers that no mutant changes, once for all builds; under `folder`, which it returns."""
    header = folder / _COMMON
    header.write_text('#include "emulator/passing_waits.hpp"\n')  # with it, all of the vocabulary
    _run([compiler, *_FLAGS, f"-I{csrc}", "-x", "c++-header", str(header), "-o", f"{header}.gch"], "headers")
    return folder


def build(mutant: Mutant, csrc: Path, folder: Path, common: Path, compiler: str = "c++") -> Path:
    """Compiles the kernels that the mutant's file is a part of, under `folder`; returns the library.

    common: the folder of `precompile`. The emulator takes all other kernels from its own library.

    Raises:
        ValueError: the mutant does not compile, which is a fault of the pattern that made it.
    """
    changed = folder / mutant.file
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text(mutant.text)
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    headers = [_COMMON, *kernels_with(mutant.file, csrc), "emulator/kernel_set.hpp"]
    source.write_text("".join(f'#include "{header}"\n' for header in headers))
    includes = [f"-I{common}", f"-I{folder}", f"-I{csrc}"]
    _run([compiler, *_FLAGS, *includes, "-shared", str(source), "-o", str(library)], mutant.name)
    return library


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{what} does not compile:\n{done.stderr[:2000]}")


def kernel_headers(csrc: Path) -> list[str]:
    """The headers of the emulator's set of kernels, but for its litmus tests."""
    return [h for h in _included(csrc / "emulator/kernel_set.cpp") if "litmus" not in h]


def kernels_with(file: str, csrc: Path) -> list[str]:
    """Those of `kernel_headers` that include `file`, directly or not."""
    return [header for header in kernel_headers(csrc) if file in _closure(header, csrc)]


@cache
def _closure(header: str, csrc: Path) -> frozenset[str]:
    within = (_closure(other, csrc) for other in _included(csrc / header) if (csrc / other).exists())
    return frozenset({header}).union(*within)


def _included(file: Path) -> list[str]:
    return _INCLUDE.findall(file.read_text())
