"""Lines have at most 112 columns in C++ and CUDA and 110 in Python; long files are named, not refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.sources import ROOT, native_files, python_files, relative

PYTHON_COLUMNS = 110
NATIVE_COLUMNS = 112
MANY_LINES = 450


def long_lines(text: str, columns: int) -> list[int]:
    """Numbers of the lines with more columns. URLs and orders to linters, at the end, do not count."""
    return [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if len(re.sub(r"\s+# (type: ignore|noqa)\b.*$|https?://\S+$", "", line)) > columns
    ]


def report(paths: list[Path], columns: int) -> str:
    """One line for each line that is too long."""
    return "\n".join(f"{relative(p)}:{n}" for p in paths for n in long_lines(p.read_text(), columns))


def test_python_lines_fit() -> None:
    assert not (found := report(python_files(), PYTHON_COLUMNS)), found


def test_native_lines_fit() -> None:
    assert not (found := report(native_files(), NATIVE_COLUMNS)), found


def test_formatters_have_the_same_limits() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^line-length = {PYTHON_COLUMNS}$", pyproject, re.MULTILINE)
    assert re.search(rf"^max-doc-length = {PYTHON_COLUMNS}$", pyproject, re.MULTILINE)
    clang_format = ROOT / ".clang-format"
    if clang_format.exists():
        assert re.search(rf"^ColumnLimit: +{NATIVE_COLUMNS}$", clang_format.read_text(), re.MULTILINE)


def test_long_lines_are_seen() -> None:
    text = "a" * 110 + "\n" + "b" * 111 + "\n# " + "x" * 90 + " https://example.org/" + "y" * 40 + "\n"
    assert long_lines(text, 110) == [2]


def test_long_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints files in which a second idea may have moved in; a warning, not an error."""
    lengths = {path: len(path.read_text().splitlines()) for path in [*python_files(), *native_files()]}
    long = {path: lines for path, lines in lengths.items() if lines > MANY_LINES}
    with capsys.disabled():
        for path, lines in sorted(long.items()):
            print(f"\n{relative(path)}: {lines} lines; a second idea?", end="")
