"""The repository's source files, and their docstrings, for tests that read code instead of running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("deepep", "reference", "sim")
PYTHON = (*PRODUCT, "tests", "examples", "setup.py")
NATIVE = ("csrc", "include")
NATIVE_SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh", ".h"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def files(*names: str, suffixes: set[str]) -> list[Path]:
    """The files under these folders of the repository, and those named themselves."""
    found = []
    for name in names:
        path = ROOT / name
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes)
    return [path for path in found if "__pycache__" not in path.parts]


def python_files(*names: str) -> list[Path]:
    """Python files under these folders; of the whole repository if none is given."""
    return files(*(names or PYTHON), suffixes={".py"})


def native_files(*names: str) -> list[Path]:
    """C++ and CUDA files under these folders; of the whole repository if none is given."""
    return files(*(names or NATIVE), suffixes=NATIVE_SUFFIXES)


def relative(path: Path) -> str:
    """A file's name as messages give it."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Docstring:
    """A docstring, as it stands. owner: what it belongs to, "" for a module; line: where it begins."""

    owner: str
    line: int
    lines: list[str]

    @property
    def first_word(self) -> str:
        """The word that it begins with."""
        words = self.lines[0].strip().lstrip('r"').split()
        return words[0] if words else ""


def docstrings(source: str) -> Iterator[Docstring]:
    """All docstrings of a Python source."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Documented) or ast.get_docstring(node) is None:
            continue
        text = node.body[0].value  # type: ignore[attr-defined]
        owner = "" if isinstance(node, ast.Module) else node.name
        yield Docstring(owner, text.lineno, lines[text.lineno - 1 : text.end_lineno])
