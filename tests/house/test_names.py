"""One name, one meaning: no two classes share a name, and the glossary's words live where it says."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping

from harness.sources import ROOT, python_files, relative

TWINS = {
    "DispatchLayout": "the core's layout, compared field by field with the oracle's",
    "ReceivedRows": "the core's layout, compared field by field with the oracle's",
}
"""Names that two classes share on purpose, each with the reason."""
GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"^\*\*(?P<word>[^*]+)\*\*: (?P<text>.+?)(?=^\*\*|\Z)", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"`(?P<file>[\w.-]+(?:/[\w.-]+)*/?)(?:: (?P<name>[\w.]+))?`")


def classes(source: str) -> list[str]:
    """The names of all classes in a Python source."""
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def shared_names(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Class names that occur more than once, and in which files."""
    found = defaultdict(list)
    for file, source in sources.items():
        for name in classes(source):
            found[name].append(file)
    return {name: places for name, places in found.items() if len(places) > 1}


def product() -> dict[str, str]:
    """The text of every file of the product."""
    return {relative(path): path.read_text() for path in python_files("deepep", "reference", "sim")}


def entries(text: str) -> dict[str, str]:
    """The glossary's words and what is said about each."""
    return {found["word"]: found["text"] for found in ENTRY.finditer(text)}


def misplaced(text: str) -> list[str]:
    """Entries without a place, and places that are not there."""
    problems = []
    for word, meaning in entries(text).items():
        places = [place for place in PLACE.finditer(meaning) if "/" in place["file"]]
        if not places:
            problems.append(f"{word}: no file")
        for place in places:
            file, name = ROOT / place["file"], place["name"]
            if not file.exists():
                problems.append(f"{word}: there is no {place['file']}")
            elif name and not re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", file.read_text()):
                problems.append(f"{word}: there is no {name} in {place['file']}")
    return problems


def test_no_two_classes_share_a_name() -> None:
    shared = shared_names(product())
    assert shared.keys() - TWINS == set(), {name: shared[name] for name in shared.keys() - TWINS}


def test_twins_are_still_twins() -> None:
    assert TWINS.keys() <= shared_names(product()).keys()


def test_every_word_of_the_glossary_has_its_place() -> None:
    text = GLOSSARY.read_text()
    assert len(entries(text)) >= 40
    assert not (problems := misplaced(text)), "\n".join(problems)


def test_the_glossary_is_in_alphabetical_order_and_names_a_word_once() -> None:
    words = re.findall(r"^\*\*([^*]+)\*\*:", GLOSSARY.read_text(), re.MULTILINE)
    assert words == sorted(set(words), key=str.casefold)


def test_a_shared_name_is_seen() -> None:
    sources = {"a.py": "class Plan: ...", "b.py": "def f():\n    class Plan: ...", "c.py": "class Route: ..."}
    assert shared_names(sources) == {"Plan": ["a.py", "b.py"]}


def test_a_word_without_its_place_is_seen() -> None:
    good = "**rank**: a process. `deepep/api/buffer.py: Buffer`\n\n"
    bad = "**a**: no place.\n\n**b**: `deepep/nowhere.py`\n\n**c**: `deepep/api/buffer.py: Nobody`\n"
    assert not misplaced(good)
    assert [problem[0] for problem in misplaced(good + bad)] == ["a", "b", "c"]
