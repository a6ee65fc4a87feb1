"""The examples of docs/simulator.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deepep.sim

DOCS = Path(__file__).resolve().parents[2] / "docs" / "simulator.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_runs(number):
    namespace = {"__name__": f"simulator_example_{number}"}
    exec(compile(BLOCKS[number], f"{DOCS.name}, example {number}", "exec"), namespace)
    for name, value in list(namespace.items()):
        if name.startswith("test_"):
            value()


def test_there_are_examples():
    assert len(BLOCKS) >= 5


def test_as_many_defects_are_applied_as_the_page_says():
    source = (DOCS.parents[1] / "tests" / "sim" / "rules" / "test_teeth.py").read_text()
    (said,) = re.findall(r"applies (\d+) deliberate defects", DOCS.read_text())
    assert int(said) == len(re.findall(r"\bDefect\(", source))


def test_every_command_and_file_named_exists():
    text = DOCS.read_text()
    root = DOCS.parents[1]
    for path in re.findall(r"`?\b((?:tests|docs)/[\w./]+\.(?:py|md))\b", text):
        assert (root / path).exists(), path
    for name in set(re.findall(r"\bdeepep\.sim\.([a-z_]+(?:\.[a-z_]+)*)", text)):
        path = root / "sim" / name.replace(".", "/")
        assert name in deepep.sim.__all__ or path.is_dir() or path.with_suffix(".py").exists(), name
