"""A kernel reads as its protocol does: its file's header names the phases, and its body calls them in order.

Every kernel has a file of its own. The comment at the head of the file has a list under "Phases:"; the
kernel's body calls functions of exactly those names, each once, and nothing else of csrc/kernels; it has no
loop. What is decided is decided in a phase, or by the launch's mode, which chooses the kernel.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = CSRC / "kernels"
#: Of macros that define one: in a macro of theirs the line does not begin with them.
KERNEL = re.compile(r"^DEEPEP_(?:WATCHING_)?(?:RECORDED_)?KERNEL\((\w+)", re.MULTILINE)
FILES = [path for path in sorted(KERNELS.rglob("*.hpp")) if KERNEL.search(path.read_text())]

CALL = re.compile(r"\b([A-Za-z_]\w*)\s*(?:<[\w:, ]+>)?\s*\(")
DEFINED = re.compile(r"\bDEEPEP_DEVICE\b[^;{}()]*?\b(\w+)\(")
#: What is followed by a parenthesis and is no call.
KEYWORDS = {"if", "else", "return", "sizeof", "static_cast", "constexpr"}
LOOPS = re.compile(r"\b(for|while|do|switch|goto)\b|\[[&=]\]")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def vocabulary() -> set[str]:
    """The names of csrc/device: a kernel may use them between its phases, for a barrier of its block."""
    text = without_comments((CSRC / "device" / "cuda.cuh").read_text())
    return set(DEFINED.findall(text))


def phases_of(text: str) -> list[str]:
    """The names that the comment at the head of a file lists under "Phases:"."""
    header = re.match(r"(?://[^\n]*\n)+", text)
    lines = header[0].splitlines() if header else []
    if "// Phases:" not in lines:
        return []
    found = []
    for line in lines[lines.index("// Phases:") + 1 :]:
        if line == "//":
            break
        # Names stand three spaces behind the slashes; what goes on in the next line is further to the right.
        name = re.match(r"//   (\w+)", line)
        if name:
            found.append(name[1])
    return found


def bodies_of(text: str) -> dict[str, str]:
    """The bodies of a file's kernels, by name, without comments."""
    code, found = without_comments(text), {}
    for kernel in re.finditer(KERNEL.pattern + r",[^)]*\) \{", code, re.MULTILINE):
        depth, end = 1, kernel.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(code[end], 0)
            end += 1
        found[kernel[1]] = code[kernel.end() : end - 1]
    return found


def problems_of(text: str) -> list[str]:
    """Differences between the kernel of a file and its header."""
    bodies, phases = bodies_of(text), phases_of(text)
    if len(bodies) != 1:
        return [f"{len(bodies)} kernels in one file: {sorted(bodies)}"]
    (body,) = bodies.values()
    calls = [name for name in CALL.findall(body) if name not in KEYWORDS | vocabulary()]
    found = []
    if not phases:
        found.append("no phases in the header")
    if calls != phases:
        found.append(f"the header names {phases}, the kernel calls {calls}")
    if LOOPS.search(body):
        found.append("a loop, a switch or a lambda in the kernel's body")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_kernel_calls_the_phases_that_its_header_names(path: Path) -> None:
    assert problems_of(path.read_text()) == []


def test_every_phase_is_a_function_of_the_kernels() -> None:
    text = "\n".join(without_comments(path.read_text()) for path in sorted(KERNELS.rglob("*.hpp")))
    defined = set(DEFINED.findall(text))
    named = {phase for path in FILES for phase in phases_of(path.read_text())}
    assert named <= defined


def test_every_kernel_is_looked_at() -> None:
    everywhere = "\n".join(without_comments(p.read_text()) for p in KERNELS.rglob("*") if p.is_file())
    names = KERNEL.findall(everywhere)
    assert sorted(names) == sorted(name for path in FILES for name in bodies_of(path.read_text()))
    assert len(names) >= 10


RIGHT = """// A kernel for this test.
//
// Phases:
//   start      reads the epoch
//   post       block 0 posts to the others; where that takes
//              two lines
//   wait_rows  the last block
//   finish
//
// Who waits for whom: nobody.
#pragma once

DEEPEP_KERNEL(some_kernel, SomeArgs, kThreads) {
  using namespace dev;
  const Call call = start(args);
  sync_block();
  if (post<Mode::kFresh>(call) == 0) {
    wait_rows(call);  // not start(call)
  }
  finish(call);
}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("//   post ", "//   posts"),
        ("wait_rows(call);", "await_rows(call);"),
        ("//   start      reads the epoch\n", ""),
        ("  finish(call);\n", ""),
        ("  finish(call);\n", "  finish(call);\n  finish(call);\n"),
        ("  sync_block();\n", "  sync_block();\n  prepare(call);\n"),
        ("//   wait_rows  the last block\n//   finish\n", "//   finish\n//   wait_rows  the last block\n"),
        ("// Phases:\n", "// Steps:\n"),
        ("  sync_block();\n", "  while (ready) sync_block();\n"),
        ("#pragma once\n", "#pragma once\nDEEPEP_KERNEL(other, SomeArgs, kThreads) {}\n"),
    ],
)
def test_a_difference_is_found(old: str, new: str) -> None:
    assert problems_of(RIGHT) == []
    assert old in RIGHT
    assert problems_of(RIGHT.replace(old, new)) != []
