"""The figures of docs/performance.md: its tables and pictures are those of docs/figures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures() -> Any:
    """release/figures.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("release_figures", ROOT / "release" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_that_stand_in_the_files(figures: Any) -> None:
    page = figures.PAGE.read_text()
    assert len(figures.MARK.findall(page)) >= 8
    assert figures.with_tables(page) == page, "docs/performance.md differs from docs/figures: make figures"


def test_every_file_says_when_where_and_how_it_was_measured(figures: Any) -> None:
    files = sorted(path.stem for path in figures.FIGURES.glob("*.csv"))
    assert files == sorted(figures.TABLES)
    for name in files:
        about = figures.read(name).about
        assert set(about) == {"date", "host", "command", "shape", "times"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])


def test_every_picture_of_a_page_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"\((?:docs/)?images/([^)]+)\)", page.read_text())}
    assert shown == {path.name for path in (ROOT / "docs" / "images").iterdir()}


def test_a_run_becomes_rows_of_a_file(figures: Any) -> None:
    timed = {"tokens": 4096, "dtype": "fp8", "median": 95.63, "p99": 98.04, "floor": 92.81}
    ours = {"operation": "cached dispatch", "by": "deepep", "sms": 24, "floor_ratio": 1.0304}
    theirs = {"operation": "combine", "by": "nccl with reduce", "sms": None, "floor_ratio": 9.07}
    report = {
        "figures": [{**timed, **ours}, {**timed, **theirs, "dtype": "bf16"}, {**ours, "operation": "layout"}]
    }
    report["figures"][2] |= timed
    rows = figures.rows_of("throughput", [report])
    assert [list(row.values()) for row in rows] == [
        ["4096", "dispatch FP8, cached", "deepep", "24", "95.63", "98.04", "92.81", "1.03"],
        ["4096", "combine BF16", "NCCL with permute / reduce", "", "95.63", "98.04", "92.81", ""],
    ]
    assert list(rows[0]) == list(figures.read("throughput").rows[0])
    layer = {"tokens": 512, "operation": "forward", "by": "deepep", "median": 2240.0, "p99": 2770.0}
    rows = figures.rows_of("layer", [{"environment": {"ranks": 2}, "figures": [layer]}])
    assert list(rows[0].values()) == ["2", "512", "forward", "deepep.nn", "2.24", "2.77"]
    assert list(rows[0]) == list(figures.read("layer").rows[0])
