"""docs/architecture.md names every folder of the source and no other, tests mirror it, old names are gone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from harness.sources import ROOT, native_files, python_files, relative

PAGE = ROOT / "docs" / "architecture.md"
WITHOUT_A_MIRROR = {"tests/harness": "shared by tests", "tests/house": "the repository's own rules"}
OLD_NAMES = re.compile(
    r"""\bdeepep\.(?:engine|buffer|buffer_low_latency|arguments|handles|selftest)\b
      | \bdeepep\.sim\.(?:choices|options|routing|strategies|traces|values|copy_runs|emulated|explorer|hunting
          |kernel_mutants|litmus|scenarios|fault_runs|all_to_all_runs|buffer_runs|drawing|examples|fuzzer
          |shrinking|subjects|checking|observed|oracle|properties|relations|\w+_properties|gpus|outcomes
          |preloaded|rank_handle|rank_process|threads|travel|world|deaths|steadiness|device_calls
          |training_steps|virtual_ranks)\b
      | \bdeepep/(?:engine/|(?:buffer|buffer_low_latency|arguments|handles|selftest)\.py)
      | (?<!tests/)\bsim/(?!__init__)\w+\.py
      | \bcsrc/(?:core/|bindings\.cpp|bindings_cuda\.cpp|host/(?:layout|sizes|check)\.)
      | \bcsrc/emulator/litmus\w*\.hpp
      | \bcsrc/kernels/\w+\.(?:hpp|cuh?)\b
      | \btests/(?:core|deepep)/
      | \b(?:cuda_base|cuda_streams|reference_engine|reference_high_throughput
          |reference_low_latency|emulator_calls|emulator_domain|emulator_engine|emulator_all_to_all)\b""",
    re.VERBOSE,
)
"""Modules and folders as they were called before the map."""


def folders(text: str) -> set[str]:
    """The folders in the first column of the page's table."""
    rows = re.findall(r"^\| (`[^|]+/`) \|", text, re.MULTILINE)
    return {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}


def unmirrored(tests: Iterable[str], sources: set[str]) -> list[str]:
    """Folders of tests that no folder of the source corresponds to."""
    found = []
    for folder in tests:
        name = folder.removeprefix("tests/")
        if folder not in WITHOUT_A_MIRROR and not sources & {name, f"deepep/{name}", f"csrc/{name}"}:
            found.append(folder)
    return found


def test_every_folder_is_on_the_map() -> None:
    files = [*python_files("deepep", "reference", "sim"), *native_files()]
    there = {relative(path.parent) for path in files}
    listed = folders(PAGE.read_text())
    assert not (missing := there - listed), missing
    assert not (gone := {name for name in listed if not (ROOT / name).is_dir()}), gone


def test_tests_mirror_the_source() -> None:
    files = [*python_files("deepep", "reference", "sim"), *native_files()]
    sources = {relative(folder) for path in files for folder in path.parents if ROOT in folder.parents}
    tests = {relative(path.parent) for path in python_files("tests")} - {"tests"}
    assert not (lost := unmirrored(sorted(tests), sources)), lost


def test_old_names_are_gone() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found = [
        f"{relative(path)}:{number}: {old[0]}"
        for path in [*python_files(), *native_files(), *pages]
        if path.name != "test_map.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for old in OLD_NAMES.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_folders_are_read_off_the_table() -> None:
    text = "| folder | role |\n|---|---|\n| `a/b/` | one |\n| `c/`, `d/` | two |\n`e/` is not in it\n"
    assert folders(text) == {"a/b", "c", "d"}


def test_a_folder_without_a_source_is_seen() -> None:
    sources = {"deepep/api", "csrc/layout", "sim", "sim/fuzz"}
    tests = ["tests/api", "tests/layout", "tests/sim/fuzz", "tests/house", "tests/deepep"]
    assert unmirrored(tests, sources) == ["tests/deepep"]


def test_old_names_are_seen() -> None:
    old = "deepep.engine.fabric; csrc/core/arith.hpp; sim/fuzzer.py; deepep.sim.oracle; tests/deepep/x.py"
    assert len(OLD_NAMES.findall(old)) == 5
    new = "deepep.runtime.engine, csrc/layout/arith.hpp, sim/fuzz/fuzzer.py, deepep.sim.rules, sim/x/y.py"
    assert not OLD_NAMES.findall(new)
