"""A log of this library's functions as they are entered, in all threads that start inside."""

from __future__ import annotations

import ast
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any


def roots() -> dict[str, str]:
    """Folders of the installed library, longest first, and what the repository calls them."""
    import deepep
    import deepep.reference
    import deepep.sim

    packages = {"deepep": deepep, "reference": deepep.reference, "sim": deepep.sim}
    found = {str(Path(package.__file__ or "").parent): name for name, package in packages.items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


@dataclass(frozen=True)
class Definition:
    """A function of a file: `Class.method` or `function.inner`, and how many lines it takes."""

    name: str
    lines: int


@cache
def definitions(file: str) -> dict[int, Definition]:
    """The functions of a file, by the line where each begins."""
    found: dict[int, Definition] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{outer}.{child.name}" if outer else child.name
                if not isinstance(child, ast.ClassDef):
                    begin = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    found[begin] = Definition(name, (child.end_lineno or begin) - child.lineno + 1)
            visit(child, name)

    visit(ast.parse(Path(file).read_text()), "")
    return found


class CallLog:
    """Within its `with`, notes what is entered. calls: ["deepep/api/buffer.py: Buffer.dispatch", ...]."""

    def __init__(self) -> None:
        self._roots = roots()
        self._codes: list[CodeType] = []
        self._on = False

    def __enter__(self) -> CallLog:
        self._on = True
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self._on = False

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._on and event == "call":
            self._codes.append(frame.f_code)

    @property
    def calls(self) -> list[str]:
        """In order; lambdas and the like are left out."""
        found = (self._name(code) for code in self._codes)
        return [name for name in found if name]

    def _name(self, code: CodeType) -> str:
        for folder, name in self._roots.items():
            if code.co_filename.startswith(folder + "/"):
                function = definitions(code.co_filename).get(code.co_firstlineno)
                if function is None or function.name.rpartition(".")[2] != code.co_name:
                    return ""
                return f"{name}{code.co_filename[len(folder) :]}: {function.name}"
        return ""
