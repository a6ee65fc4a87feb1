"""The words that the code has left behind do not come back: each had a word of the field."""

from __future__ import annotations

import re
from pathlib import Path

from harness.sources import native_files, python_files, relative

LEFT = {
    "hear": "wait, learn",
    "hears": "wait, learn",
    "heard": "waited, learned",
    "unheard": "recv_failed",
    "untold": "post_failed",
    "talks": "is_leader_block",
    "lend": "grant, acquire",
    "lends": "grants",
    "lent": "granted, acquired",
    "asker": "credit_warp",
    "clerk": "posts_digest",
    "glance": "check",
    "dear": "expensive",
    "outlive": "leak",
    "outlived": "leaked",
    "regain": "reclaim",
    "landing": "overflow area",
    "landed": "overflow",
    "repeats": "cached",
}
"""Parts of identifiers that the code no longer has, and what it says instead."""
GONE = re.compile(
    r"\b(tell_host|lend_staging|ask_for_staging|is_clerk|have_read_epoch|hand_over_faults|tell_overwritten"
    r"|ENGINE_SMS|ENGINE_BYTES|NO_ENGINE|engine_cut|engine_go|sees_nothing_wrong|NvlinkPlan|dispatch_again"
    r"|words_heard|listening_warps|drives_engine|speaks_for)\b"
)
PHRASES = re.compile(r"\bfor\s+ever\b|\bspeaks?\s+for\b|\bdear(?:er|est)?\b", re.IGNORECASE)
"""Words of comments and documentation."""


def parts(identifier: str) -> list[str]:
    """The words that an identifier is made of, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def without_text(source: str, native: bool) -> str:
    """The source without comments and strings, its lines kept."""
    kinds = (
        (r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"')
        if native
        else r'[rbfRBF]*""".*?"""|[rbfRBF]*"(?:\\.|[^"\\\n])*"|[rbfRBF]*\'(?:\\.|[^\'\\\n])*\'|#[^\n]*'
    )
    return re.sub(kinds, lambda found: "\n" * found[0].count("\n"), source, flags=re.DOTALL)


def left_words(source: str, native: bool) -> list[tuple[int, str]]:
    """(line, identifier) of whatever in the code has a word that was left behind."""
    found = []
    for number, line in enumerate(without_text(source, native).splitlines(), start=1):
        for name in re.findall(r"[A-Za-z_]\w*", line):
            if GONE.search(name) or any(part in LEFT for part in parts(name)):
                found.append((number, name))
    return found


def report(paths: list[Path], native: bool) -> list[str]:
    """A line for each identifier that is found."""
    return [
        f"{relative(path)}:{line}: {name}"
        for path in paths
        for line, name in left_words(path.read_text(), native)
    ]


def test_the_code_has_the_fields_words() -> None:
    assert not (found := report(python_files("deepep", "reference", "sim"), False)), "\n".join(found)


def test_native_code_has_the_fields_words() -> None:
    assert not (found := report(native_files(), True)), "\n".join(found)


def test_comments_have_plain_words() -> None:
    found = [
        f"{relative(path)}: {phrase}"
        for path in [*python_files("deepep", "reference", "sim"), *native_files()]
        for phrase in PHRASES.findall(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_words_left_behind_are_seen() -> None:
    python = 'x = lent_rows  # heard\ny = "landing"\n"""lend\nit"""\nengine_cut = ListeningAsker()\n'
    assert left_words(python, native=False) == [(1, "lent_rows"), (5, "engine_cut"), (5, "ListeningAsker")]
    native = '// lent\nint words_heard; /* asker\n */ f("dear"); heardIt();\n'
    assert left_words(native, native=True) == [(2, "words_heard"), (3, "heardIt")]
    assert not left_words("clear(talent, appear, shear)", native=False)
    assert PHRASES.findall("waits for ever; a dearer one")
