"""Aggregates of more than four fields are made by name in C++ and CUDA (rule 2), not by position."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from harness.sources import native_files, relative

MANY_FIELDS = 4

_NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\]|\\.)\'', re.DOTALL)
#: In front of a brace that makes no aggregate: arrays, enumerations, scopes.
_NOT_ONE = re.compile(r"(\]\s*=?|\benum\s+(class\s+)?\w*\s*(:\s*\w+\s*)?|\bnamespace[\w:\s]*)\s*$")


def lists_by_position(code: str) -> Iterator[tuple[int, str]]:
    """Line and text of each list in braces of more than `MANY_FIELDS` values without names."""
    text = _NO_CODE.sub(lambda found: (" " if found[0][0] == "/" else "_") * len(found[0]), code)
    for begin, end, commas in brace_lists(text):
        cuts = zip([begin, *commas], [*commas, end], strict=True)
        values = [value for value in (text[a + 1 : b].strip() for a, b in cuts) if value]
        if len(values) <= MANY_FIELDS or values[0].startswith("."):
            continue
        of_lists = all(value.startswith("{") for value in values)
        if not of_lists and not _NOT_ONE.search(text[max(0, begin - 80) : begin]):
            yield text.count("\n", 0, begin) + 1, " ".join(code[begin : end + 1].split())


def brace_lists(text: str) -> Iterator[tuple[int, int, list[int]]]:
    """Both braces and the commas between them, of all that hold no statements."""
    opened: list[tuple[int, list[int]]] = []
    statements: set[int] = set()
    for at, character in enumerate(text):
        if character in "({[":
            opened.append((at, []))
        elif character in ")}]" and opened:
            begin, commas = opened.pop()
            if character == "}" and begin not in statements:
                yield begin, at, commas
        elif character == "," and opened:
            opened[-1][1].append(at)
        elif character == ";" and opened:
            statements.add(opened[-1][0])


def test_large_aggregates_are_made_by_name() -> None:
    found = [
        f"{relative(path)}:{line}: {text}"
        for path in native_files()
        for line, text in lists_by_position(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "log({Kind::load, order, scope, site, 0});",
        "const Layout layout{1, f(2, 3), 4,\n  5, int(6)};",
        "return {a, b, c, {d, e}, f};",
        'names_.push_back({"a, b", 1, 2, 3, 4});',
        "Class() : shape_{a, b, c, d, e} { g(); }",
    ],
)
def test_one_by_position_is_seen(code: str) -> None:
    assert len(list(lists_by_position(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "log({.kind = load, .order = order, .scope = scope, .site = site, .at = now});",
        "const Layout layout{1, 2, 3, 4};",
        "const int table[] = {1, 2, 3, 4, 5, 6};",
        "constexpr int table[2][3]{{1, 2, 3}, {4, 5, 6}};",
        "enum class Kind : uint8_t { a, b, c, d, e };",
        "void f(int a, int b, int c, int d, int e) { g(a, b, c, d, e); }",
        "expect({{1, a}, {2, b}, {3, c}, {4, d}, {5, e}});",
        "const Layout layout(1, 2, 3, 4, 5);",
        "// {a, b, c, d, e}",
    ],
)
def test_others_are_left_alone(code: str) -> None:
    assert list(lists_by_position(code)) == []
