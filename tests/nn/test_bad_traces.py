"""Odd values for what makes, writes and reads routing traces: the library's own error, naming it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from harness import bad_arguments as bad

import deepep
from deepep import trace


def trace_of(**changes: Any) -> Any:
    parts: dict[str, Any] = {
        "num_layers": 1,
        "num_ranks": 2,
        "num_experts": 4,
        "step": torch.tensor([3]),
        "topk_idx": torch.zeros(4, 2, dtype=torch.int16),
        "topk_weights": torch.ones(4, 2),
        "row_splits": torch.tensor([0, 1, 4]),
        **changes,
    }
    return trace.RoutingTrace(**parts)


def validated(**changes: Any) -> None:
    trace_of(**changes).validate()


def added(**changes: Any) -> None:
    """A batch added to a recording; refused, it leaves that as it was."""
    writer = trace.TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=2)
    good = {"step": 0, "layer": 0, "topk_idx": [torch.zeros(3, 2, dtype=torch.int64)]}
    good["topk_weights"] = [torch.ones(3, 2)]
    try:
        writer.add(**{**good, **changes})
    except deepep.DeepEPError:
        writer.add(**good)
        raise
    writer.finish()


SIZES = {"num_layers": 1, "num_ranks": 1, "num_experts": 4, "num_topk": 2}
PARTS = {
    "num_layers": int,
    "num_ranks": int,
    "num_experts": int,
    "step": "Tensor",
    "topk_idx": "Tensor",
    "topk_weights": "Tensor",
    "row_splits": "Tensor",
    "notes": "Mapping",
}


def traced(function: Callable[..., Any], good: dict[str, Any], kinds: dict[str, str]) -> list[str]:
    """Complaints of a function of traces, whose errors name the argument in their text."""
    function(**good)
    found = []
    for parameter, kind in kinds.items():
        for name, value in bad.odd_values(good.get(parameter)):
            outcome, wrong = bad.judge(parameter, lambda v=value, p=parameter: function(**{**good, p: v}))
            if outcome is not None:
                words = set(re.findall(r"\w+", kind))
                is_named = any(part in outcome[2] for part in (parameter, *good))
                is_fine = bad.fits(words, name, value) if outcome[0] == "took it" else is_named
                is_fine |= outcome[0] == "took it" and name == "negated in place"  # read as what it says
                wrong = "" if is_fine else f"{outcome}"
            if wrong:
                found.append(f"{function.__qualname__}: {parameter} is {name}: {wrong}")
    return found


def test_traces(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    notes = {"notes": "Mapping None"}
    found = traced(trace.TraceWriter, SIZES, {**dict.fromkeys(SIZES, "int"), **notes})
    found += bad.complaints_of(trace_of().batch(0, 0).reshard, {"num_ranks": 2})
    found += traced(trace_of().batch, {"step_index": 0, "layer": 0}, {"step_index": "int", "layer": "int"})
    found += traced(added, {}, {"step": "int", "layer": "int", "topk_idx": "none", "topk_weights": "none"})
    good = {name: getattr(trace_of(), name) for name in PARTS}
    kinds = {name: "int" if kind is int else str(kind) for name, kind in PARTS.items()}
    found += traced(validated, good, kinds)
    path = tmp_path / "trace"
    trace_of().save(path)
    found += traced(trace_of().save, {"path": path}, {"path": "str"})
    found += traced(trace.RoutingTrace.load, {"path": path}, {"path": "str"})
    assert not found, "\n".join(found)
