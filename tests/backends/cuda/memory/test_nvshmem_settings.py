"""Variables of NVSHMEM: the table, the page, and the libraries of the wheel name the same ones."""

from __future__ import annotations

import re

import pytest
from harness.sources import ROOT
from harness.wire import nvshmem_library, why_no_nvshmem

from deepep.backends.cuda.memory import nvshmem_checks
from deepep.backends.cuda.memory.nvshmem_settings import LIBRARIES, SETTINGS
from deepep.runtime.traffic_lanes import VARIABLES
from deepep.sim.links import hosts

PAGE = ROOT / "docs" / "operations.md"
_REASON = why_no_nvshmem()


def unread(settings: dict[str, tuple[str, ...]]) -> list[str]:
    """Variables that a library which should read them does not name."""
    used = {library for libraries in settings.values() for library in libraries}
    content = {library: nvshmem_library(LIBRARIES[library]).read_bytes() for library in used}
    return [
        f"{name} in {library}"
        for name, libraries in settings.items()
        for library in libraries
        # A string's end may be shared with longer ones', so nothing is asked of the byte before it.
        if name.removeprefix("NVSHMEM_").encode() + b"\0" not in content[library]
    ]


@pytest.mark.skipif(_REASON != "", reason=_REASON or "it is here")
def test_the_libraries_read_what_the_table_says() -> None:
    assert not unread({name: setting.libraries for name, setting in SETTINGS.items()})


@pytest.mark.skipif(_REASON != "", reason=_REASON or "it is here")
def test_a_variable_that_no_library_reads_is_found() -> None:
    wrong = {"NVSHMEM_IB_SERVICE_LEVEL": ("ibrc",), "NVSHMEM_IB_SL": ("ibrc", "uid")}
    assert unread(wrong) == ["NVSHMEM_IB_SERVICE_LEVEL in ibrc", "NVSHMEM_IB_SL in uid"]


def test_the_page_names_the_table_s_variables_with_their_defaults() -> None:
    text = " ".join(PAGE.read_text().split())
    named = set(re.findall(r"\bNVSHMEM_[A-Z0-9_]+\b", text))
    assert named == set(SETTINGS)
    for name, setting in SETTINGS.items():
        assert f"`{name}` ({setting.default or 'none'})" in text, name


def test_what_the_code_sets_and_checks_is_in_the_table() -> None:
    wire = hosts._environment(hosts.WireOptions(1, 1, roce=True), 0, "x", "y", 1)
    names = {name for name in wire if name.startswith("NVSHMEM_")} | set(VARIABLES.values())
    assert names | set(nvshmem_checks._WATCHED) <= set(SETTINGS)
