"""Resources of the kernels, and the vocabulary they are written in; no GPU is needed.

ptxas is asked for every kernel, with the flags of setup.py for compute capability 9.0a, or has said it when
the package was built here: no spills, no stack, registers for a whole block, shared memory from the launch
alone. The sources are read for the rule that lets the emulator run them: everything that crosses a warp, a
block or a rank goes through the vocabulary of csrc/device.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from harness.nvcc import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = CSRC / "kernels"
SOURCES = sorted(KERNELS.rglob("*.cu"))
HEADERS = sorted(KERNELS.rglob("*.hpp"))

MEASURED = "-gencode=arch=compute_90a,code=sm_90a"
REGISTERS = 65536  # of an SM
REGISTER_UNIT = 8  # a thread's registers are granted in multiples of this


def read_code(path: Path) -> str:
    """The file without comments and string literals."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL)


# Resources


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel, by ptxas; bytes, but for the registers of a thread."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    local: int

    def problems(self, threads: int) -> list[str]:
        """Reasons why a kernel of `threads` threads a block may not be so."""
        granted = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT
        checks = {
            f"stores {self.spill_stores} bytes of spilled registers": self.spill_stores,
            f"loads {self.spill_loads} bytes of spilled registers": self.spill_loads,
            f"keeps {self.stack} bytes on the stack": self.stack,
            f"keeps {self.local} bytes in local memory": self.local,
            f"has {self.shared} bytes of static shared memory": self.shared,
            f"needs {granted} registers for {threads} threads": granted * threads > REGISTERS,
        }
        return [problem for problem, found in checks.items() if found]


def parse_report(report: str) -> dict[str, Usage]:
    """By mangled name, from the output of -Xptxas=-v; of sm_90a, where it speaks of others too."""
    found = {}
    for part in re.split(r"Compiling entry function '", report)[1:]:
        if "' for 'sm_90a'" not in part.partition("\n")[0]:
            continue

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        assert "Used" in part, f"ptxas said nothing of registers:\n{part}"
        assert "spill stores" in part, f"ptxas said nothing of spills:\n{part}"
        found[part.partition("'")[0]] = Usage(
            registers=number(r"Used (\d+) registers"),
            stack=max(number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes cumulative stack size")),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            shared=number(r"(\d+) bytes smem"),
            local=number(r"(\d+) bytes lmem"),
        )
    return found


def declared_kernels() -> dict[str, int]:
    """Threads of a block by kernel, as csrc/kernels declares them."""
    code = "\n".join(read_code(header) for header in HEADERS)
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", code))
    declared = re.findall(r"DEEPEP_((?:WATCHING_)?(?:RECORDED_)?)KERNEL\((\w+),\s+\w+,\s+(\w+)\)", code)
    forms = {
        "": ("",),
        "WATCHING_": ("", "_watching"),
        "RECORDED_": ("", "_recorded"),
        "WATCHING_RECORDED_": ("", "_watching", "_recorded"),
    }
    return {
        name + form: int(constants.get(threads, threads))
        for kind, name, threads in declared
        if not name.endswith("name")  # that is the macro itself
        for form in forms[kind]
    }


def build_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, which cannot be imported: it builds; for the capability that is measured."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            flags: list[str] = ast.literal_eval(node.value)
            return [*flags, MEASURED]
    raise AssertionError("setup.py has no NVCC_FLAGS")


def kept_report(source: Path, flags: Sequence[str]) -> str | None:
    """Words of the compiler when setup.py made the object of this very source with these flags, if it did."""
    name = str(source.relative_to(ROOT)).replace("/", "-")
    for state in (ROOT / "build" / "objects").glob(f"*/deepep._cuda/{name}.json"):
        known = json.loads(state.read_text())
        files = {ROOT / file: digest for file, digest in known["files"].items()}
        same = all(f.is_file() and sha256(f.read_bytes()).hexdigest() == d for f, d in files.items())
        if same and set(flags) <= set(known["made_by"]) and "said" in known:
            return str(known["said"])
    return None


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Usage]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (CUDA_HOME or PATH)")
    flags = build_flags()
    assert any("-Xptxas=-v" in flag for flag in flags)
    folder = tmp_path_factory.mktemp("objects")

    def compile_one(source: Path) -> str:
        kept = kept_report(source, flags)  # read before: Python 3.11 cannot parse in two threads at once
        if kept is not None:
            return kept
        out = folder / f"{source.stem}.o"
        command = [nvcc, *flags, f"-I{CSRC}", "-x", "cu", "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        return parse_report("\n".join(pool.map(compile_one, SOURCES)))


def test_every_kernel_fits(usage: dict[str, Usage], capsys: pytest.CaptureFixture[str]) -> None:
    declared = declared_kernels()
    assert len(declared) >= 5
    by_name = {
        name: found
        for name in declared
        for mangled, found in usage.items()
        if f"{len(name)}{name}E" in mangled
    }
    assert by_name.keys() == declared.keys(), "declared and compiled kernels differ"
    assert len(by_name) == len(usage), f"kernels without a declaration: {sorted(usage)}"
    with capsys.disabled():
        print(f"\n{'kernel':18} {'threads':>7} {'registers':>9} {'stack':>6} {'spills':>6} {'shared':>6}")
        for name, threads in sorted(declared.items()):
            u = by_name[name]
            spills = u.spill_stores + u.spill_loads
            print(f"{name:18} {threads:7} {u.registers:9} {u.stack:6} {spills:6} {u.shared:6}")
    bad = {name: found for name in declared if (found := by_name[name].problems(declared[name]))}
    assert not bad, "\n".join(f"{name}: {', '.join(problems)}" for name, problems in sorted(bad.items()))


REPORT = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem
"""
FITS = {"stack": 0, "stores": 0, "loads": 0, "registers": 128, "shared": 0}


@pytest.mark.parametrize(
    ("what", "amount"), [("stack", 8), ("stores", 4), ("loads", 4), ("registers", 129), ("shared", 16)]
)
def test_an_excess_is_found(what: str, amount: int) -> None:
    assert parse_report(REPORT.format(**FITS))["_Z1fv"].problems(512) == []
    assert len(parse_report(REPORT.format(**(FITS | {what: amount})))["_Z1fv"].problems(512)) == 1


# Vocabulary

#: Outside of the vocabulary: a kernel with one of these is not the kernel that the emulator explores.
FOREIGN = {
    "PTX": r"\basm\b",
    "a built-in variable of CUDA": r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b",
    "an intrinsic": r"\b__\w+",
    "an atomic of CUDA or C++": r"\batomic\w*|\bstd::atomic\w*",
    "a volatile access": r"\bvolatile\b",
    "CUDA's runtime": r"\bcuda\w*|\bcooperative_groups\b|\bnv_\w+",
    "a choice between the two bodies": r"#\s*if",
}
INCLUDES = re.compile(r'#\s*include\s*([<"][^>"]+[>"])')


def foreign_words(code: str) -> list[str]:
    return [f"{what}: {m[0]}" for what, pattern in FOREIGN.items() for m in re.finditer(pattern, code)]


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_kernels_use_the_vocabulary_alone(header: Path) -> None:
    assert foreign_words(read_code(header)) == []
    included = set(INCLUDES.findall(header.read_text()))
    allowed = {"<cstddef>", "<cstdint>", '"device/device.hpp"'}
    assert {name for name in included if not name.startswith(('"layout/', '"kernels/'))} <= allowed


@pytest.mark.parametrize(
    "line",
    ['asm("membar.sys;");', "t = threadIdx.x;", "__syncthreads();", "atomicAdd(p, 1);", "#if defined(X)"],
)
def test_a_foreign_word_is_found(line: str) -> None:
    assert foreign_words(line) != []
    assert foreign_words("const int t = thread();\nsync_block();") == []


def test_ptx_stands_in_one_file() -> None:
    files = [p for p in sorted(CSRC.rglob("*")) if p.suffix in {".hpp", ".cuh", ".cu", ".cpp"}]
    device = [p for p in files if "emulator" not in p.parts]  # the emulator switches its fibers in assembler
    with_ptx = [p.name for p in device if re.search(r"\basm\b", read_code(p))]
    assert with_ptx == ["cuda.cuh"]


# Waits


UNUSED = ("unused-result", "unused-variable", "unused-but-set-variable")


def compile_kernels(folder: Path, extra: str = "") -> subprocess.CompletedProcess[str]:
    """All kernels by the C++ compiler, over the emulator's body; a result that is not used is an error."""
    source = folder / "kernels.cpp"
    headers = "".join(f'#include "{header.relative_to(CSRC)}"\n' for header in HEADERS)
    source.write_text(headers + extra)
    flags = ["-std=c++20", "-fsyntax-only", f"-I{CSRC}", *(f"-Werror={warning}" for warning in UNUSED)]
    command = [os.environ.get("CXX", "g++"), *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)

WAIT = """
inline void careless_{}(const uint32_t* p, const uint64_t* q, deepep::dev::Deadline deadline) {{
  using namespace deepep::dev;
  [[maybe_unused]] uint32_t seen = 0;
  {};
}}
"""
WAITS = [
    "wait_equal<acquire, sys_scope>(p, 1u, deadline)",
    "wait_reached<acquire, sys_scope>(p, 1u, deadline)",
    "wait_masked<acquire, sys_scope>(p, 1u, 1u, deadline, seen)",
    "wait_tag<acquire, sys_scope>(q, 1u, deadline, seen)",
    "wait_signal<acquire, sys_scope>(q, 1u, deadline)",
    "mbarrier_wait<acquire, block_scope>(q, 1u, deadline)",
]


@needs_compiler
def test_the_result_of_every_wait_is_used(tmp_path: Path) -> None:
    """A wait that is not asked whether it ended in time goes on without what it waited for."""
    done = compile_kernels(tmp_path)
    assert done.returncode == 0, done.stderr
    for header in HEADERS:
        code = read_code(header)
        # The compiler takes a cast to void, and a variable that is `maybe_unused`, for a use.
        assert re.findall(r"\(void\)|<void>\(|maybe_unused|std::ignore", code) == [], header.name


@needs_compiler
def test_a_wait_without_its_result_does_not_compile(tmp_path: Path) -> None:
    """Each ignored result is an error of its own, named where it stands."""
    asked = [f"if (!{wait}) return" for wait in WAITS]
    ignored = [*WAITS, *(f"const bool came = {wait}" for wait in WAITS)]
    assert compile_kernels(tmp_path, careless(asked)).returncode == 0
    done = compile_kernels(tmp_path, careless(ignored))
    assert done.returncode != 0
    lines = (tmp_path / "kernels.cpp").read_text().splitlines()
    errors = re.findall(r"kernels\.cpp:(\d+):.*\[-Werror=([\w-]+)\]", done.stderr)
    wrong = [lines[int(number) - 1].strip() for number, warning in errors if warning in UNUSED]
    assert wrong == [f"{use};" for use in ignored], done.stderr


def careless(uses: Sequence[str]) -> str:
    """A function for each use of a wait."""
    return "".join(WAIT.format(number, use) for number, use in enumerate(uses))


def test_all_waits_are_known() -> None:
    """Those above are all there are, and both bodies of the vocabulary say that their result matters."""
    for body in (CSRC / "device" / "cuda.cuh", CSRC / "emulator" / "device.hpp"):
        code = read_code(body)
        declared = set(re.findall(r"\bbool (wait_\w+|mbarrier_wait)\(", code)) - {"wait_until"}
        assert declared == {wait.partition("<")[0] for wait in WAITS}
        assert (
            set(re.findall(r"\[\[nodiscard\]\] DEEPEP_DEVICE bool (wait_\w+|mbarrier_wait)\(", code))
            >= declared
        )
