"""JSON files of cases and failures: bounded in size, and every field checked before it is used.

A file comes from anywhere, and whatever is wrong with it is a `CaseError` that names the field.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

#: Largest file that is read.
MAX_BYTES = 16 << 20
#: Bounds of an integer field for which none are given.
ANY_WORD = (0, 2**32 - 1)

Plain = TypeVar("Plain")


class CaseError(ValueError):
    """A case, or a file of cases, is not what it has to be."""


def read_json(path: str | os.PathLike[str]) -> Any:
    """The contents of a JSON file.

    Raises:
        CaseError: it is not a regular file, too large, or not JSON.
        OSError: it cannot be read.
    """
    source = Path(path)
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
        raise CaseError(f"{source} is not a regular file")
    with source.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise CaseError(f"{source} is larger than {MAX_BYTES >> 20} MiB")
    return parse_json(text, str(source))


def parse_json(text: str | bytes, name: str) -> Any:
    """The text's value; infinities and NaN, which JSON does not have, are refused."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no text
        raise CaseError(f"{name} is not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


class Fields:
    """The fields of a JSON object, each taken with what it has to be."""

    def __init__(self, plain: Any, what: str) -> None:
        if not isinstance(plain, dict):
            raise CaseError(f"{what}: got {_short(plain)}; allowed: an object")
        self._plain: dict[str, Any] = plain
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self._plain

    def get(self, name: str) -> Any:
        if name not in self._plain:
            raise CaseError(f"{self._what}: {name} is missing")
        return self._plain[name]

    def integer(self, name: str, low: int, high: int) -> int:
        return check_integer(self.get(name), low, high, f"{self._what}: {name}")

    def text(self, name: str, longest: int = 1 << 16) -> str:
        value = self.get(name)
        if not isinstance(value, str) or len(value) > longest:
            self.refuse(name, f"a text of at most {longest} characters")
        return str(value)

    def items(self, name: str, most: int) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > most:
            self.refuse(name, f"a list of at most {most}")
        return list(value)

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raises CaseError for a field."""
        raise CaseError(f"{self._what}: {name}: got {_short(self._plain[name])}; allowed: {allowed}")


def check_integer(value: Any, low: int, high: int, what: str) -> int:
    """An integer from `low` to `high`; a truth value is none."""
    if type(value) is not int or not low <= value <= high:
        raise CaseError(f"{what}: got {_short(value)}; allowed: {low} to {high}")
    return value


def check_fields(
    kind: type[Any],
    plain: Any,
    what: str,
    *,
    names: Sequence[str] = (),
    bounds: Mapping[str, tuple[int, int]] | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The fields of a dataclass of numbers, truth values and texts; one that is left out keeps its default.

    names: the fields allowed, if not all. bounds: of integers and floats, by field. words: the texts that a
    field may hold.
    """
    given = Fields(plain, what)
    types = {field.name: str(field.type) for field in fields(kind) if not names or field.name in names}
    for name, value in plain.items():
        if name not in types:
            raise CaseError(f"{what}: got {_short(name)}; allowed: {', '.join(types)}")
        low, high = (bounds or {}).get(name, ANY_WORD)
        if types[name] == "int":
            given.integer(name, low, high)
        elif types[name] == "float":
            if type(value) not in (int, float) or not low <= value <= high:
                given.refuse(name, f"{low} to {high}")
        elif types[name] == "bool":
            if not isinstance(value, bool):
                given.refuse(name, "true or false")
        elif given.text(name) not in (words or {}).get(name, (value,)):
            given.refuse(name, ", ".join((words or {})[name]))
    return dict(plain)


def make_dataclass(kind: type[Plain], plain: Any, what: str, **allowed: Any) -> Plain:
    """The dataclass of these fields; `allowed` as for `check_fields`."""
    given = check_fields(kind, plain, what, **allowed)
    try:
        return kind(**given)
    except TypeError as error:  # a field without a default is missing
        raise CaseError(f"{what}: {error}") from error


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
