"""The source distribution holds whatever a build needs, and the package nothing that is for tests alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("csrc", "include", "deepep", "reference", "sim")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files that a source distribution is made of, and the packages."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set((folder / "deepep.egg-info" / "SOURCES.txt").read_text().splitlines())


def test_the_source_distribution_holds_what_is_compiled_and_installed(listed: set[str]) -> None:
    present = {
        str(path.relative_to(ROOT))
        for folder in NEEDED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "__pycache__" not in path.parts
    }
    assert len(present) > 200
    assert sorted(present - listed) == []
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= listed


def test_nothing_of_the_tests_is_distributed(listed: set[str]) -> None:
    assert [name for name in listed if name.startswith("tests/")] == []
