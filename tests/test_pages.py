"""Pages: their code runs, the tests that answers name exist, and the index leads to every page."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN_ELSEWHERE = {"moving_from_deepep.md": "tests/api", "simulator.md": "tests/sim"}
"""Pages whose code other tests run, and where."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def test_the_code_of_observing_runs(world_of: Any) -> None:
    def body(context: Any, source: str) -> None:
        exec(compile(source, "observing.md", "exec"), {})

    source = "".join(blocks(DOCS / "observing.md"))
    assert len(blocks(DOCS / "observing.md")) == 3
    world_of(2).run(body, source)


def test_code_in_a_page_is_run_by_some_test() -> None:
    for page in DOCS.glob("*.md"):
        if blocks(page) and page.name != "observing.md":
            folder = ROOT / RUN_ELSEWHERE[page.name]
            assert any(page.name in test.read_text() for test in folder.rglob("test_*.py")), page.name


@pytest.mark.parametrize("page", ["answers.md", "announced.md", "observing.md"])
def test_named_tests_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:: (\w+))?`", text)
    assert named
    for file, function in named:
        assert (ROOT / file).exists(), file
        assert not function or function in functions((ROOT / file).read_text()), f"{file}: {function}"


def test_every_answer_names_a_test() -> None:
    rows = [line for line in (DOCS / "answers.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        complaint, answer, held = (cell.strip() for cell in row.strip("|").split(" | "))
        assert complaint
        assert answer
        assert re.match(r"`tests/", held), row


def test_every_page_has_a_picture_or_a_table() -> None:
    for page in DOCS.glob("*.md"):
        assert re.search(r"^\|---|!\[", page.read_text(), re.MULTILINE), page.name


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    ways = re.findall(r"^## (.*)", index, re.MULTILINE)
    assert len(ways) == 5
