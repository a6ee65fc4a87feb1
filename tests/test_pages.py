"""Pages: their code runs, the tests that answers name exist, and the index leads to every page."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from harness.page_code import SURROUNDINGS, run_page

from deepep.cli import COMMANDS
from deepep.sim import World

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN_ELSEWHERE = {"moving_from_deepep.md": "tests/api", "simulator.md": "tests/sim"}
"""Pages whose code other tests run, and where."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", sorted(SURROUNDINGS.keys() - {"jax"}))
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """On two ranks, as it stands, block after block, with names that `harness.page_code` has."""
    found = blocks(DOCS / f"{page}.md")
    numbers = [number for number, block in enumerate(found) if "jax" not in block]
    with World(2, timeout=120.0) as world:  # its own: pages change what holds for a process
        world.run(run_page, page, found, numbers, str(tmp_path))


def test_the_code_for_jax_runs(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    (line,) = (line for line in commands(DOCS / "interop.md") if "csrc/ffi/xla.cpp" in line)
    line = line.replace("-o ", f"-o {tmp_path}/").replace("python", sys.executable)
    subprocess.run(["bash", "-ec", line], cwd=ROOT, check=True, timeout=600)
    with World(2, timeout=120.0) as world:
        world.run(run_page, "jax", blocks(DOCS / "interop.md"), [1, 2], str(tmp_path))


def test_code_in_a_page_is_run_by_some_test() -> None:
    for page in DOCS.glob("*.md"):
        if blocks(page) and page.stem not in SURROUNDINGS:
            folder = ROOT / RUN_ELSEWHERE[page.name]
            assert any(page.name in test.read_text() for test in folder.rglob("test_*.py")), page.name


def commands(page: Path) -> list[str]:
    """Lines of a page that are to be typed, continued ones joined, comments left out."""
    text = re.sub(r"```(?:python|yaml|mermaid)\n.*?```", "", page.read_text(), flags=re.DOTALL)
    fenced = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    plain = "".join(line[4:] for line in re.findall(r"^    \S.*\n(?: {8,}\S.*\n)*", text, flags=re.MULTILINE))
    joined = re.sub(r"\\\n\s*", "", "".join(fenced) + plain)
    return [line for each in joined.splitlines() if (line := re.sub(r"(^|\s)#.*", "", each).strip())]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PROGRAMS = {
    *("torchrun", "python", ".venv/bin/python", "make", "pip", "docker", "g++", "nvcc", "cmake", "echo"),
    *("srun", "export", "scontrol"),
}
OUTPUT = {"failures.md", "emulator.md", "kernels.md", "domains.md"}
"""Pages with indented lines that are no commands: what one prints, and tables of bytes."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_indented_in_a_page_is_typed_or_runs(page: Path) -> None:
    """So that no Python is overlooked: a block of it says so."""
    for line in commands(page):
        words = re.sub(r'\b[A-Z_]+=("[^"]*"|\S+)', "", line).split()
        assert not words or words[0] in PROGRAMS or page.name in OUTPUT, f"{page.name}: {line}"
    assert (
        re.findall(r"^```\n(?=.)", re.sub(r"```\w+\n.*?```", "", page.read_text(), flags=re.DOTALL), re.M)
        == []
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_a_page_are_taken(page: Path) -> None:
    """`python -m deepep` and examples by their options, make by its targets, all by their files."""
    makefile = (ROOT / "Makefile").read_text()
    for line in [
        *commands(page),
        *re.findall(r"`((?:python -m deepep|torchrun|make) [^`]+)`", page.read_text()),
    ]:
        line = " ".join(line.split())
        if found := re.search(r"-m deepep (\w+)(.*)", line):
            known = options_of(found[1])
            given = re.findall(r"(?<!\S)--[a-z][\w-]*", re.split(r" -- |`|;|\)", found[2])[0])
            assert set(given) <= known, f"{page.name}: {line}"
        elif found := re.search(r"((?:examples|tests)/[\w/]+\.py)(.*)", line):
            text = (ROOT / found[1]).read_text()
            if "pytest" not in line:
                for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", found[2]):
                    assert f'"{option}"' in text, f"{page.name}: {line}"
        for target in re.findall(r"(?<!\S)make ([a-z][\w-]*)", line):
            assert f"\n{target}:" in makefile, f"{page.name}: {line}"


def options_of(command: str) -> set[str]:
    """All options that a command takes."""
    app = typer.Typer(add_completion=False)
    app.command()(importlib.import_module(COMMANDS[command][0]).command)
    parameters = typer.main.get_command(app).params
    return {word for each in parameters for word in (*each.opts, *each.secondary_opts)} | {"--help"}


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
