"""Compiles deepep._core with the defects of mutations.py in it and compares each with the oracle.

    python tests/layout/run_mutants.py [--cases N] [name ...]

Prints one JSON object a line: first {"name": "(none)"} for the core as it is, which must hold, then one for
each defect: what caught it ("caught_by", null if nothing did), the seconds and cases that took, the message.

A defect replaces text in a function of a header. All share one library: a function with defects asks which is
chosen and runs that body. Each runs in a forked child: a defect may well write where it must not.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pybind11
import torch
from mutations import MUTATIONS, Mutation

from deepep import layout
from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.rules.layout import PROPERTIES, Laid
from deepep.sim.rules.windows import CROSSING_PROPERTIES

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w"]
STANDARD = re.compile(r"^#include <(\w+)>", re.MULTILINE)
SECONDS = 20.0  # a defect that is still running then, hangs; the core as it is has ten times as long
SOUND = "(none)"
SOUND_CASES = 60  # of the core as it is: test_properties.py runs thousands; a defect is caught within ten
BODY = re.compile(r"\)(?: const)?\s*$")  # in front of a function's brace
CHOICE = """\
#pragma once
extern int chosen_defect;
#define CHOSEN(number) (!__builtin_is_constant_evaluated() && ::chosen_defect == number)
"""
CHOOSE = """\
#include "choice.hpp"
int chosen_defect = 0;
extern "C" __attribute__((visibility("default"))) void choose(int number) { chosen_defect = number; }
"""
SMALL = Limits(masks=False)
WIDE = Limits(ranks=(33, 40), max_local_experts=2, max_topk=10, max_tokens=3, masks=False)


@dataclass(frozen=True)
class Verdict:
    name: str
    caught_by: str | None
    seconds: float
    cases: int
    message: str


class Build:
    """Compiles the core with all defects in it; one may be chosen, by its place in the list, from 1."""

    def __init__(self, mutations: Sequence[Mutation], folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX", "g++")
        write(folder / "choice.hpp", CHOICE)
        write(folder / "choose.cpp", CHOOSE)
        for header in {mutation.header for mutation in mutations}:
            text = (CSRC / "layout" / header).read_text()
            bodies: dict[int, str] = {}
            for number, mutation in enumerate(mutations, 1):
                if mutation.header == header:
                    begin, body = defective_body(text, mutation, number)
                    bodies[begin] = bodies.get(begin, "") + body
            for begin, chosen in sorted(bodies.items(), reverse=True):
                text = text[:begin] + chosen + text[begin:]
            write(folder / "layout" / header, f'#include "choice.hpp"\n{text}')
        rules = {source.stem: source for source in (CSRC / "layout" / "rules").glob("*.cpp")}
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        standard = self.precompile([*rules.values(), *(CSRC / "layout").rglob("*.hpp")])
        jobs = {
            "bindings": (CSRC / "bindings/core.cpp", python),
            "choose": (folder / "choose.cpp", []),
            **{name: (source, standard) for name, source in rules.items()},
        }
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: self.compile(job[0], *job[1]), jobs.items()))
        self.library = folder / "_core.so"
        self.run("-shared", *map(str, objects), "-o", str(self.library))

    def precompile(self, files: Sequence[Path]) -> list[str]:
        """Compiles the standard headers that the files include; the options to use them."""
        names = {name for file in files for name in STANDARD.findall(file.read_text())}
        header = self.folder / "standard.hpp"
        header.write_text("".join(f"#include <{name}>\n" for name in sorted(names)))
        self.run(*FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch")
        return ["-include", str(header)]

    def compile(self, name: str, source: Path, options: Sequence[str]) -> Path:
        """An object; the copies of headers come first on the include path."""
        out = self.folder / f"{name}.o"
        self.run(*FLAGS, *options, f"-I{self.folder}", f"-I{CSRC}", "-c", str(source), "-o", str(out))
        return out

    def run(self, *arguments: str) -> None:
        done = subprocess.run([self.compiler, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def defective_body(text: str, mutation: Mutation, number: int) -> tuple[int, str]:
    """Find where the function with the defect begins; the body with it, run where it is chosen."""
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: its text occurs {text.count(mutation.old)} times in {mutation.header}"
        )
    old, new, first = mutation.old, mutation.new, text.index(mutation.old)
    if old.startswith("{"):  # a whole body
        old, new, first = old[1:-1], new[1:-1], first + 1
    opened: list[int] = []
    for at, c in enumerate(text):
        if c == "{":
            opened.append(at)
        elif c == "}":
            brace = opened.pop()
            is_function = BODY.search(text[:brace]) and not any(BODY.search(text[:b]) for b in opened)
            if is_function and brace < first and first + len(old) <= at:
                body = text[brace + 1 : first] + new + text[first + len(old) : at]
                begin = max(text.rfind(mark, 0, brace) for mark in (";", "}", "\n\n"))
                leave = " return;" if re.search(r"\bvoid ", text[begin:brace]) else ""
                return brace + 1, f" if (CHOSEN({number})) {{{body}{leave} }}"
    raise SystemExit(f"{mutation.name}: in no function of {mutation.header}")


def cases(count: int) -> Iterator[Case]:
    """Small cases, every eighth with more ranks than 32 bits."""
    for number in range(count):
        yield draw_case(RandomChoices(f"teeth {number}"), WIDE if number % 8 == 7 else SMALL)


def compare(name: str, library: Path, number: int, count: int) -> Verdict:
    """Runs the properties on the library, in this process, until one does not hold."""
    ctypes.CDLL(str(library)).choose(number)
    loader = importlib.machinery.ExtensionFileLoader("_core", str(library))
    spec = importlib.util.spec_from_loader("_core", loader)
    assert spec is not None
    core = importlib.util.module_from_spec(spec)
    loader.exec_module(core)
    layout._core = core
    for struct in ("LowLatencyBuffer", "CrossingBuffer", "RecordSizes"):
        setattr(layout, struct, getattr(core, struct))
    began, done = time.perf_counter(), 0
    for done, case in enumerate(cases(count), 1):
        laid = Laid(case)
        for holds in (*PROPERTIES, *CROSSING_PROPERTIES):
            try:
                holds(laid)
            except (AssertionError, ValueError, IndexError, RuntimeError, OverflowError) as error:
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                return Verdict(name, holds.__name__, time.perf_counter() - began, done, message)
    return Verdict(name, None, time.perf_counter() - began, done, "")


def judge(name: str, library: Path, number: int, count: int) -> Verdict:
    """`compare` in a child; one that dies or hangs is caught, too."""
    began = time.perf_counter()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            os.write(send, json.dumps(asdict(compare(name, library, number, count))).encode())
        finally:
            os._exit(1)  # seen only if nothing was written: an error of this script, not a verdict
    os.close(send)
    with selectors.DefaultSelector() as selector, os.fdopen(receive, "rb") as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        in_time = bool(selector.select(SECONDS if name != SOUND else 10 * SECONDS))
        if not in_time:
            os.kill(child, signal.SIGKILL)
        line = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if line:
        return Verdict(**json.loads(line))
    if status >= 0:
        raise SystemExit(f"{name}: the comparison itself failed")
    caught_by = f"a crash ({signal.Signals(-status).name})" if in_time else "a hang"
    return Verdict(name, caught_by, time.perf_counter() - began, 0, "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = Build(MUTATIONS, Path(folder)).library
        report(judge(SOUND, library, 0, SOUND_CASES))
        for number, mutation in enumerate(MUTATIONS, 1):
            if not arguments.names or mutation.name in arguments.names:
                report(judge(mutation.name, library, number, arguments.cases))


def report(verdict: Verdict) -> None:
    print(json.dumps(asdict(replace(verdict, seconds=round(verdict.seconds, 3)))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
