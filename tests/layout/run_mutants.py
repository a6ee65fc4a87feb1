"""Builds deepep._core once for each defect of mutations.py and compares it with the oracle till it is caught.

    python tests/layout/run_mutants.py [--cases N] [name ...]

Prints one JSON object a line: first {"name": "(none)"} for the core as it is, which must hold, then one for
each defect: what caught it ("caught_by", null if nothing did), the seconds and cases that took, the message.

A defect replaces text in a copy of one header, and what includes the header is compiled again; Python's
binding is not part of that and is compiled once, as are the standard headers. Each build runs in a forked
child: a defect may well write where it must not.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator
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
SMALL = Limits(masks=False)
WIDE = Limits(ranks=(33, 40), max_local_experts=2, max_topk=10, max_tokens=3, masks=False)


@dataclass(frozen=True)
class Verdict:
    name: str
    caught_by: str | None
    seconds: float
    cases: int
    message: str


class Builds:
    """Compiles what a header's text goes into, and links it with what it does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX", "g++")
        self.sources = {source.stem: source for source in (CSRC / "layout" / "rules").glob("*.cpp")}
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        self.standard = self.precompile()
        jobs = {
            "bindings": (CSRC / "bindings/core.cpp", includes),
            **{n: (s, self.standard) for n, s in self.sources.items()},
        }
        with ThreadPoolExecutor(2) as pool:
            objects = pool.map(lambda job: self.compile(self.folder / job[0], *job[1]), jobs.items())
            self.objects = dict(zip(jobs, objects, strict=True))
        scan = ["-std=c++20", f"-I{CSRC}", "-MM"]
        self.includes = {name: self.run(*scan, str(source)) for name, source in self.sources.items()}

    def precompile(self) -> list[str]:
        """Compiles the standard headers that the sources and csrc/layout include; the options to use them."""
        files = [*self.sources.values(), *(CSRC / "layout").rglob("*.hpp")]
        names = {name for file in files for name in STANDARD.findall(file.read_text())}
        header = self.folder / "standard.hpp"
        header.write_text("".join(f"#include <{name}>\n" for name in sorted(names)))
        self.run(*FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch")
        return ["-include", str(header)]

    def compile(self, target: Path, source: Path, includes: list[str]) -> Path:
        out = target.with_suffix(".o")
        self.run(*FLAGS, *includes, f"-I{CSRC}", "-c", str(source), "-o", str(out))
        return out

    def users_of(self, header: str) -> list[str]:
        """The host sources that include csrc/layout/<header>, directly or not."""
        return [name for name, files in self.includes.items() if f"layout/{header}" in files]

    def build(self, mutation: Mutation | None) -> Path:
        """The shared library with the defect, or as it is."""
        if mutation is None:
            return self.link(self.folder, self.objects)
        text = (CSRC / "layout" / mutation.header).read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: its text occurs {text.count(mutation.old)} times in {mutation.header}"
            )
        folder = self.folder / f"mutant{MUTATIONS.index(mutation)}"
        (folder / "layout" / mutation.header).parent.mkdir(parents=True)
        (folder / "layout" / mutation.header).write_text(text.replace(mutation.old, mutation.new))
        objects = dict(self.objects)
        for name in self.users_of(mutation.header):  # the copy comes first on the include path
            objects[name] = self.compile(folder / name, self.sources[name], [*self.standard, f"-I{folder}"])
        return self.link(folder, objects)

    def link(self, folder: Path, objects: dict[str, Path]) -> Path:
        library = folder / "_core.so"
        self.run("-shared", *map(str, objects.values()), "-o", str(library))
        return library

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.compiler, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
        return done.stdout


def cases(count: int) -> Iterator[Case]:
    """Small cases, every eighth with more ranks than 32 bits."""
    for number in range(count):
        yield draw_case(RandomChoices(f"teeth {number}"), WIDE if number % 8 == 7 else SMALL)


def compare(name: str, library: Path, count: int) -> Verdict:
    """Runs the properties on the library, in this process, until one does not hold."""
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


def judge(name: str, library: Path, count: int) -> Verdict:
    """`compare` in a child; one that dies or hangs is caught, too."""
    began = time.perf_counter()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            os.write(send, json.dumps(asdict(compare(name, library, count))).encode())
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
    wanted: list[Mutation | None] = [m for m in MUTATIONS if not arguments.names or m.name in arguments.names]
    with tempfile.TemporaryDirectory() as folder:
        builds = Builds(Path(folder))
        wanted.insert(0, None)
        with ThreadPoolExecutor(2) as pool:
            libraries = list(pool.map(builds.build, wanted))
        for mutation, library in zip(wanted, libraries, strict=True):
            name, count = (mutation.name, arguments.cases) if mutation else (SOUND, SOUND_CASES)
            verdict = judge(name, library, count)
            print(json.dumps(asdict(replace(verdict, seconds=round(verdict.seconds, 3)))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
