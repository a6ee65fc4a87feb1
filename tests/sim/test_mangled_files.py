"""Saved examples and schedules, each part of them replaced by odd values: the documented error, or none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepep.sim.cases.case import Case
from deepep.sim.cases.files import CaseError
from deepep.sim.fuzz.stored import StoredExample

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    1 << 31,
    1 << 63,
    10**400,
    "",
    "x",
    [],
    [[]],
    {},
    {"x": 1},
    [None],
)


def places(part: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in inner:
        yield (name,)
        yield from ((name, *rest) for rest in places(value))


def mangled(whole: Any) -> Iterator[tuple[str, Any]]:
    """The value with one part replaced."""
    for place in places(whole):
        for odd in ODD:
            changed = copy.deepcopy(whole)
            inner = changed
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = odd
            yield f"{place} = {str(odd)[:20]}", changed


def complaints(path: Path, whole: Any, load: Callable[[Path], Any]) -> list[str]:
    """Errors of other kinds than the documented one."""
    found, refused = [], 0
    for name, changed in mangled(whole):
        path.write_text(json.dumps(changed))
        try:
            load(path)
        except CaseError:
            refused += 1
        except Exception as error:  # what is looked for
            found.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    assert refused > 100
    return found


def test_examples(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    StoredExample("oracle", "rule", "message", (Case(2, (np.array([[0, 1]]), np.array([[1, -1]]))),)).save(
        file
    )
    found = complaints(file, json.loads(file.read_text()), StoredExample.load)
    assert not found, "\n".join(found)


def test_failing_schedules(tmp_path: Path) -> None:
    pytest.importorskip("deepep._emulator")
    from deepep.sim.explore.failures import Failure

    saved = Path(__file__).parents[1] / "emulator" / "schedules"
    first = sorted(saved.glob("*.json"))[0]
    found = complaints(tmp_path / "x.json", json.loads(first.read_text()), Failure.load)
    assert not found, "\n".join(found)
