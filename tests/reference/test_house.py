"""The reference stands alone: torch and the standard library, and no routing code shared by its two forms."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import deepep.reference

FOLDER = Path(deepep.reference.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
GLOBAL_VIEW = {
    *("all_reduce", "elastic", "layout", "high_throughput", "low_latency", "ordered_sum"),
    "side_primitives",
}
RUNNABLE = {"wire", "logfmt_wire", "all_to_all", "all_to_all_low_latency", "two_level"}
SHARED = {
    "checks",
    "records",
    "numerics",
    "formats",
    "logfmt",
    "gradient_codec",
}  # bytes, formats, rounding: no routing


def imports(file: Path) -> tuple[set[str], set[str]]:
    """(top-level packages, modules of the reference) that a file imports, anywhere in it."""
    packages, own = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            packages |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{file.name}: an import from outside of the reference"
            own |= {node.module} if node.module else {name.name for name in node.names}
    return packages, own


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_torch_and_the_standard_library_alone(file: Path) -> None:
    packages, _ = imports(file)
    assert packages <= set(sys.stdlib_module_names) | {"torch"}


def test_every_module_has_its_place() -> None:
    assert {file.stem for file in FILES} - {"__init__"} == GLOBAL_VIEW | RUNNABLE | SHARED


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_two_forms_share_formats_alone(file: Path) -> None:
    _, own = imports(file)
    for form in (GLOBAL_VIEW, RUNNABLE):
        if file.stem in form:
            assert own <= form | SHARED
    if file.stem in SHARED:
        assert own <= SHARED


def test_no_file_has_grown_a_second_idea() -> None:
    assert all(len(file.read_text().splitlines()) <= 400 for file in FILES)
