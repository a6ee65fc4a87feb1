"""A docstring begins with a verb or a noun that can be searched for, and no re-wrapping has torn it."""

from __future__ import annotations

import re

from harness.sources import Docstring, docstrings, python_files, relative

QUESTIONS = {"What", "How", "Where", "Which", "When", "Whether", "Who", "Whose", "Why"}
SHORT = 25
"""Columns of text: a line with no more, behind a full one, is where a wrapper has torn a paragraph."""
FULL = 80


def questions(source: str) -> list[Docstring]:
    """Docstrings that begin with a question word."""
    return [doc for doc in docstrings(source) if doc.first_word.rstrip(",:") in QUESTIONS]


def torn_lines(doc: Docstring) -> list[int]:
    """The lines of a docstring that hold the few words a wrapper pushed out of the line before.

    Such a line is short, begins in mid-sentence, stands behind a full one, and its paragraph goes on.
    """
    torn = []
    for i in range(1, len(doc.lines) - 1):
        before, line, after = (doc.lines[j].strip() for j in (i - 1, i, i + 1))
        in_the_middle = bool(before and line and after) and not after.startswith(('"""', "- ", "* ", "|"))
        pushed_out = len(doc.lines[i - 1]) > FULL and len(line) <= SHORT and re.match(r"[a-z(`]", line)
        if in_the_middle and pushed_out and not line.endswith((".", ":", ";")):
            torn.append(doc.line + i)
    if len(doc.lines) == 3 and 0 < len(doc.lines[1].strip()) <= SHORT and not doc.lines[2].strip(' "'):
        torn.append(doc.line + 1)  # a sentence that nearly fitted its line, and a quote left alone
    return torn


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{relative(path)}:{doc.line}: {doc.owner} begins with {doc.first_word}"
        for path in python_files()
        for doc in questions(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_no_docstring_is_torn() -> None:
    found = [
        f"{relative(path)}:{line}"
        for path in python_files()
        for doc in docstrings(path.read_text())
        for line in torn_lines(doc)
    ]
    assert not found, "\n".join(found)


def test_questions_are_seen() -> None:
    source = '''
"""How rows travel."""
class Rows:
    """What a rank sends."""
    def size(self):
        """Bytes of a row."""
    def sends(self):
        """Whether it sends."""
    def whatever(self):
        """Whatever it takes."""
'''
    assert [doc.owner for doc in questions(source)] == ["", "Rows", "sends"]


def test_a_torn_paragraph_is_seen() -> None:
    full = "    Collective: waits, up to the time-out, for other ranks to come to this point, so that none of"
    torn = f'def f():\n    """Leaves.\n\n{full}\n        them\n    loses a message under way.\n    """\n'
    assert [line for doc in docstrings(torn) for line in torn_lines(doc)] == [5]
    whole = torn.replace("\n        them\n    loses", "\n    them loses")
    assert not [line for doc in docstrings(whole) for line in torn_lines(doc)]
    full = '    """Takes the ranks of every other node, one by one and in the order of the'
    lone = f'def f():\n{full}\n    table.\n    """\n'
    assert [line for doc in docstrings(lone) for line in torn_lines(doc)] == [3]
