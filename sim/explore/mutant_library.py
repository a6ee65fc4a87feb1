"""One library with many mutants in it: each mutated expression asks which is chosen, and runs that one.

Compiling is most of what a mutant costs that has a library of its own: nearly all fail in their first
schedules. One that changes an expression (an ordered operation, a fence, a barrier, a wait) needs none:
`load<acquire, sys_scope>(p)` becomes
`(::chosen_mutant == 7 ? load<relaxed, sys_scope>(p) : load<acquire, sys_scope>(p))`.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from deepep.sim.explore.kernel_mutants import Mutant, kernel_headers

#: Flags of these builds: schedules run a few times faster than with -O0, and the library is compiled once.
FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas")

_CHOICE = """\
#include "emulator/passing_waits.hpp"
static thread_local int chosen_mutant = 0;
extern "C" __attribute__((visibility("default"))) void deepep_choose_mutant(int number) {
  chosen_mutant = number;
}
"""


def can_share(mutant: Mutant) -> bool:
    """True for a mutant that changes an expression of a kernel, and that expression alone."""
    return mutant.kind != "protocol"


class MutantLibrary:
    """The kernels with all of the mutants in them, compiled; none is chosen to begin with.

    A choice is its thread's, so that hunts side by side share the library.
    """

    def __init__(self, mutants: Sequence[Mutant], csrc: Path, folder: Path, compiler: str = "c++") -> None:
        """Compiles it under `folder`.

        Raises:
            ValueError: a mutant does not compile, which is a fault of the pattern that made it; or it cannot
                share a library (`can_share`).
        """
        self.path = folder / "mutants.so"
        self._numbers = {mutant.name: number for number, mutant in enumerate(mutants, start=1)}
        by_file: dict[str, list[Mutant]] = defaultdict(list)
        for mutant in mutants:
            if not can_share(mutant):
                raise ValueError(f"{mutant.name}: changes more than an expression")
            by_file[mutant.file].append(mutant)
        for file, there in by_file.items():
            changed = folder / file
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(with_choices((csrc / file).read_text(), there, self._numbers.__getitem__))
        includes = [*kernel_headers(csrc), "emulator/kernel_set.hpp"]
        source = folder / "mutants.cpp"
        source.write_text(_CHOICE + "".join(f'#include "{header}"\n' for header in includes))
        command = [compiler, *FLAGS, f"-I{folder}", f"-I{csrc}", "-shared", str(source), "-o", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"the mutants do not compile:\n{done.stderr[:4000]}")
        self._choose = ctypes.CDLL(str(self.path)).deepep_choose_mutant

    def choose(self, mutant: Mutant | None) -> None:
        """Makes this thread's schedules run a mutant; None: the kernels as they are."""
        self._choose(0 if mutant is None else self._numbers[mutant.name])


def with_choices(text: str, mutants: Sequence[Mutant], number: Callable[[str], int]) -> str:
    """A file's text in which each mutant's expression is a choice by its number."""
    alternatives: dict[tuple[int, int], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        alternatives[_call_around(text, mutant)].append(mutant)
    return _chosen(text, 0, len(text), alternatives, number)


def _chosen(
    text: str,
    begin: int,
    end: int,
    alternatives: dict[tuple[int, int], list[Mutant]],
    number: Callable[[str], int],
) -> str:
    """text[begin:end] with choices; one within another is made where the outer one is not mutated."""
    made, at = "", begin
    for (first, last), mutants in sorted(alternatives.items(), key=lambda item: (item[0][0], -item[0][1])):
        if first < at or last > end or (first, last) == (begin, end):
            continue
        within = {span: those for span, those in alternatives.items() if span != (first, last)}
        made += text[at:first] + "("
        for mutant in mutants:
            new = mutant.replacement.rstrip(";")  # the statement's own stays
            changed = text[first : mutant.start] + new + text[mutant.end : last]
            if not new:
                changed = "static_cast<void>(0)"
            made += f"::chosen_mutant == {number(mutant.name)} ? {changed} : "
        made += _chosen(text, first, last, within, number) + ")"
        at = last
    return made + text[at:end]


def _call_around(text: str, mutant: Mutant) -> tuple[int, int]:
    """Begin and end of the call that the mutant changes, its object or namespace included."""
    if mutant.kind == "epoch":
        return mutant.start, mutant.end
    first, end = mutant.operation
    first = _begin_of_postfix(text, first)
    if text[first:end].endswith(";"):
        return first, end - 1
    at, depth = text.index("(", end - 1), 0  # behind template arguments
    while True:
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
        if depth == 0:
            return first, at


def _begin_of_postfix(text: str, at: int) -> int:
    """Begin of the expression whose last name begins at `at`: names, members and subscripts before it."""
    depth = 0
    while at > 0:
        c = text[at - 1]
        if c in ")]":
            depth += 1
        elif c in "([":
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0 and not (
            c.isalnum() or c in "_:." or "->" in (text[at - 1 : at + 1], text[at - 2 : at])
        ):
            return at
        at -= 1
    return at
