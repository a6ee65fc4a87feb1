"""Layers, by who may import whom: api -> runtime -> backends; the oracle and the layout rules stand alone.

docs/architecture.md, "Layers", says it in words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.sources import ROOT, native_files, python_files, relative

JUDGES = {
    "deepep/bench/collective.py",
    "deepep/bench/low_latency/oracle.py",
    "deepep/bench/oracle.py",
    "deepep/bench/elastic/oracle.py",
    "deepep/bench/workload.py",
    "deepep/cli/selftest.py",
    "deepep/demo/single.py",
}
"""Files that compare what ran with the oracle, or draw the inputs of both, and serve no operation."""
FALLBACK = ("deepep/backends/cuda/low_latency.py", "deepep.backends.reference.low_latency")
"""The operation of the CUDA backend that may run on the reference, and the module that it takes for it."""
BELOW = {
    "deepep/backends": {"deepep.api"},
    "deepep/runtime": {"deepep.api", "deepep.nn"},
    "deepep/api": {"deepep.backends", "deepep.nn"},
    "deepep/nn": {"deepep.backends"},
    "reference": {"deepep"},
}
"""Folders, and what they do not import: what is built on them, or is reached through the runtime."""
NATIVE_BELOW = {
    "csrc/layout": {"device", "host", "kernels", "emulator", "bindings"},
    "csrc/device": {"host", "kernels", "bindings"},
    "csrc/kernels": {"host", "emulator", "bindings"},
    "csrc/host": {"bindings"},
    "csrc/emulator": {"bindings"},
}


def imports(source: str, package: str = "") -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether only when a function runs) of each import; relative ones against `package`."""
    tree = ast.parse(source)
    inside = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno, id(node) in inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base, node.lineno, id(node) in inside
            yield from ((f"{base}.{name.name}", node.lineno, id(node) in inside) for name in node.names)


def package_of(path: Path) -> str:
    """The package that a file belongs to, as users import it."""
    folder = path.relative_to(ROOT).parent.as_posix().replace("/", ".")
    return folder if folder.startswith("deepep") else f"deepep.{folder}"


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    """`imports` of a file."""
    return list(imports(path.read_text(), package_of(path)))


def within(module: str, *packages: str) -> bool:
    """True if the module is one of these packages, or inside."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def offences(folder: str, refused: set[str], *, lazy: bool = True) -> list[str]:
    """Imports of what a folder does not import. Unless `lazy`, those inside functions pass."""
    return [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files(folder)
        for module, line, inside in imports_of(path)
        if within(module, *refused) and (lazy or not inside)
    ]


@pytest.mark.parametrize("folder", BELOW)
def test_nothing_imports_what_is_built_on_it(folder: str) -> None:
    refused = BELOW[folder]
    found = offences(folder, refused)
    if folder == "reference":  # it is `deepep.reference` itself
        found = [line for line in found if "deepep.reference" not in line.partition(" imports ")[2]]
    assert not found, "\n".join(found)


def test_the_runtime_meets_backends_in_its_registry_alone() -> None:
    found = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files("deepep/runtime")
        for module, line, inside in imports_of(path)
        if within(module, "deepep.backends", "deepep.sim")
        and not (inside and relative(path) == "deepep/runtime/backends.py")
    ]
    assert not found, "\n".join(found)


def uses_the_oracle(file: str) -> bool:
    """True if a file of the product may import the oracle."""
    return file.startswith("deepep/backends/reference/") or file in JUDGES


def test_the_oracle_serves_its_backend_and_judges_alone() -> None:
    found = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files("deepep")
        for module, line, _ in imports_of(path)
        if within(module, "deepep.reference") and not uses_the_oracle(relative(path))
    ]
    assert not found, "\n".join(found)


def cuda_offences(file: str, source: str) -> list[str]:
    """Imports by which the CUDA backend would stand on the reference."""
    return [
        f"{file}:{line} imports {module}"
        for module, line, _ in imports(source, "deepep.backends.cuda")
        if within(module, "deepep.reference", "deepep.backends.reference")
        and not (file == FALLBACK[0] and within(module, FALLBACK[1]))
        and not (file == FALLBACK[0] and module == "deepep.backends.reference")
    ]


def test_the_cuda_backend_stands_on_its_own_feet() -> None:
    found = [
        line
        for path in python_files("deepep/backends/cuda")
        for line in cuda_offences(relative(path), path.read_text())
    ]
    assert not found, "\n".join(found)


def class_bases(sources: dict[str, str]) -> dict[str, set[str]]:
    """Names of the bases of every class, by class."""
    found: dict[str, set[str]] = {}
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2].partition("[")[0] for base in node.bases}
                found.setdefault(node.name, set()).update(bases)
    return found


def ancestors(name: str, bases: dict[str, set[str]]) -> set[str]:
    """All classes that a class inherits from, as far as they are known by name."""
    found: set[str] = set()
    ahead = list(bases.get(name, ()))
    while ahead:
        base = ahead.pop()
        if base not in found:
            found.add(base)
            ahead += bases.get(base, ())
    return found


def test_the_cuda_backend_has_no_base_among_the_oracles() -> None:
    product = {relative(path): path.read_text() for path in python_files("deepep", "reference")}
    bases = class_bases(product)

    def defined_in(*folders: str) -> set[str]:
        return set(class_bases({f: s for f, s in product.items() if f.startswith(folders)}))

    oracle = defined_in("reference/", "deepep/backends/reference/")
    cuda = defined_in("deepep/backends/cuda/")
    assert cuda
    assert "CudaEngine" in cuda
    assert "ReferenceEngine" in oracle
    found = {name: ancestors(name, bases) & oracle for name in cuda}
    assert not any(found.values()), {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("folder", NATIVE_BELOW)
def test_native_code_includes_nothing_that_is_built_on_it(folder: str) -> None:
    found = [
        f"{relative(path)} includes {name}"
        for path in native_files(folder)
        for name in includes(path.read_text())
        if name.split("/")[0] in NATIVE_BELOW[folder] - ({"emulator"} if path.name == "device.hpp" else set())
    ]
    assert not found, "\n".join(found)


def includes(source: str) -> list[str]:
    """The repository's own headers that a C++ source includes, as it names them."""
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', source, re.MULTILINE)


def reached(start: list[Path], root: Path) -> set[Path]:
    """The headers under `root` that these files include, directly or not."""
    seen: set[Path] = set()
    ahead = list(start)
    while ahead:
        file = ahead.pop()
        for name in includes(file.read_text()):
            header = root / name
            if header.exists() and header not in seen:
                seen.add(header)
                ahead.append(header)
    return seen


def test_every_layout_rule_is_the_kernels_or_says_that_it_is_not() -> None:
    layout = ROOT / "csrc" / "layout"
    used = reached(native_files("csrc/kernels"), ROOT / "csrc")
    rules = [path for path in native_files("csrc/layout") if (layout / "rules") in path.parents]
    kernels = [path for path in native_files("csrc/layout") if path not in rules]
    assert rules
    assert kernels
    assert not (idle := [relative(path) for path in kernels if path not in used]), idle
    assert not (busy := [relative(path) for path in rules if path in used]), busy
    silent = [relative(path) for path in rules if "CPU alone" not in path.read_text()]
    assert not silent, silent


def test_what_headers_reach_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.hpp").write_text('#include "b.hpp"\n#include <vector>\n')
    (tmp_path / "b.hpp").write_text('  #  include "a.hpp"\n')
    (tmp_path / "c.hpp").write_text("")
    start = tmp_path / "k.cu"
    start.write_text('#include "a.hpp"\n// #include "c.hpp" is not needed\n')
    assert reached([start], tmp_path) == {tmp_path / "a.hpp", tmp_path / "b.hpp"}


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\nfrom . import c\ndef f():\n    from .d import e\n"
    found = list(imports(source, "deepep.x"))
    assert ("a.b", 1, False) in found
    assert ("deepep.x.c", 2, False) in found
    assert ("deepep.x.d.e", 4, True) in found


def test_a_cuda_backend_that_leans_on_the_reference_is_seen() -> None:
    engine = "from deepep.backends.reference.engine import ReferenceEngine"
    assert cuda_offences("deepep/backends/cuda/engine.py", engine)
    assert cuda_offences(FALLBACK[0], engine)
    fallback = "def f():\n    from deepep.backends.reference import low_latency\n"
    assert not cuda_offences(FALLBACK[0], fallback)
    assert cuda_offences("deepep/backends/cuda/dispatch.py", fallback)
    bases = class_bases({"a": "class A(B): ...", "b": "class B(x.C[int]): ..."})
    assert ancestors("A", bases) == {"B", "C"}
