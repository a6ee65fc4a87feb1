"""Distributions: an sdist, wheels made of it, and a trial of each in a fresh environment outside of the tree.

    make dist                                     the sdist; wheels for each Python 3.10 to 3.13 found here
    python release/dist.py --pythons 3.11 --try   one wheel, tried with the dependencies it asks for

Wheels are made of the unpacked sdist, so that whatever it lacks shows here and not at a user's. Those with
CUDA kernels carry CUDA's version behind their own, "0.1.0+cu130", and are made where nvcc is found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEEDED = (
    *(
        "deepep/__init__.py",
        "deepep/py.typed",
        "deepep/_core.pyi",
        "deepep/_cuda.pyi",
        "deepep/_emulator.pyi",
        "deepep/_launches.pyi",
    ),
    *("deepep/api/buffer.py", "deepep/backends/cuda/memory/heap.py", "deepep/cli/selftest.py"),
    *("deepep/reference/high_throughput.py", "deepep/sim/__init__.py", "deepep/sim/worlds/world.py"),
)
"""Files that a wheel has in any case, a few of each part."""
NOT_SOURCE = (".*", "build", "dist", "*.so", "__pycache__", "*.egg-info", "*-output", "explore-failures")
"""Names in a checkout that are made, not written; and what begins with a dot."""
TOP_LEVEL = re.compile(r"deepep(-[^/]+\.dist-info)?/")


@dataclass(frozen=True)
class Interpreter:
    """A Python to build for: "3.12", and its program."""

    version: str
    program: Path


def interpreters(wanted: Iterable[str] = PYTHONS) -> list[Interpreter]:
    """Those of the wanted versions that run here: on PATH, or pyenv's."""
    found = []
    for version in wanted:
        on_path = shutil.which(f"python{version}")
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        candidates = [Path(on_path)] if on_path else []
        candidates += sorted(pyenv.glob(f"{version}.*/bin/python"))
        for program in candidates:
            code = "import sys, sysconfig, os; v = sys.version_info; print(f'{v[0]}.{v[1]}')"
            code += "; print(os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
            done = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
            if done.stdout.split() == [version, "True"]:
                found.append(Interpreter(version, program))
                break
    return found


def make_sdist(source: Path, out: Path) -> Path:
    """The sdist of a tree, by setuptools of this environment. Asks no version control for what it holds, and
    leaves nothing in the tree, not for a moment either: others may be reading it.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(out.resolve())]
    with tempfile.TemporaryDirectory() as nowhere:
        tree = Path(nowhere) / "tree"
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(*NOT_SOURCE))
        done = _run(command, cwd=tree, env={**os.environ, "PATH": _without_git(Path(nowhere))})
    return out / done.splitlines()[-1]


def _without_git(folder: Path) -> str:
    """PATH with a git in front that fails."""
    git = folder / "git"
    git.write_text("#!/bin/sh\necho 'an sdist must not need git' >&2\nexit 1\n")
    git.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def unpack(sdist: Path, folder: Path) -> Path:
    """The tree of an sdist, unpacked in `folder`."""
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


def make_wheel(
    tree: Path, out: Path, python: Path, environment: Mapping[str, str], *, isolated: bool = True
) -> Path:
    """The wheel that pip makes of a tree with this Python. isolated: with the build's packages from an index,
    else with those of the environment.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--disable-pip-version-check", "-q", "-w", folder]
        options += [] if isolated else ["--no-build-isolation"]
        _run([str(python), "-m", "pip", "wheel", *options, "."], cwd=tree, env={**os.environ, **environment})
        (made,) = Path(folder).glob("*.whl")
        return Path(shutil.move(made, out / made.name))


def problems_of_wheel(path: Path, extensions: Iterable[str]) -> list[str]:
    """Everything about a wheel that is not as promised: its files, its licence, what it requires.

    extensions: compiled modules it has to hold, and no others.
    """
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(metadata).decode())
    problems = [f"{name} is missing" for name in NEEDED if name not in names]
    problems += [f"{name} is not of the package" for name in names if not TOP_LEVEL.match(name)]
    tests = [name for name in names if re.search(r"(^|/)(tests?|conftest\.py|test_[^/]*\.py)(/|$)", name)]
    problems += [f"{name} is a test" for name in tests]
    built = {match[1] for name in names if (match := re.fullmatch(r"deepep/(_\w+)\.[^/]+\.so", name))}
    problems += [f"{name}: built {name in built}" for name in sorted(built ^ set(extensions))]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        problems.append("LICENSE is missing")
    if about["License-Expression"] != "Apache-2.0":
        problems.append(f"License-Expression: {about['License-Expression']}")
    if about["Requires-Python"] != ">=3.10":
        problems.append(f"Requires-Python: {about['Requires-Python']}")
    needs = about.get_all("Requires-Dist") or []
    plain = sorted(re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need)
    if plain != ["numpy", "torch"]:
        problems.append(f"requires {plain} without any extra, not numpy and torch alone")
    missing = {"cli", "sim", "nvshmem"} - set(about.get_all("Provides-Extra") or [])
    problems += [f"the extra {name} is missing" for name in sorted(missing)]
    return problems


def fresh_environment(folder: Path, python: Path, borrow: Path | None = None) -> Path:
    """The Python of a new environment. borrow: a site-packages whose packages are seen, behind its own."""
    if borrow is None:
        _run([str(python), "-m", "venv", str(folder)])
    else:
        venv.EnvBuilder(symlinks=True).create(folder)  # pip of this environment installs into it
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(f"{borrow}\n")
    return folder / "bin" / "python"


def try_wheel(wheel: Path, program: Path, folder: Path, *options: str) -> str:
    """Output of `python -m deepep check`, of an installed wheel, run in `folder`, with nothing of this tree.

    Raises RuntimeError if it says that something does not hold, or if another deepep than the wheel's runs.
    """
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    code = "import deepep, deepep.sim, deepep.reference, sys; print(deepep.__file__, deepep.sim.__file__)"
    for place in _run([str(program), "-c", code], cwd=folder, env=outside).split():
        if Path(program).parents[1] not in Path(place).parents:
            raise RuntimeError(f"{wheel.name}: {place} was imported instead")
    return _run([str(program), "-m", "deepep", "check", *options], cwd=folder, env=outside)


def cuda_label() -> str:
    """ "+cu130" of the nvcc that is found; empty without one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", said)
    return f"+cu{match[1]}{match[2]}" if match else ""


def _run(command: list[str], **how: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def main() -> None:
    """Makes everything, says what it made, and ends with status 1 if something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pythons", default=",".join(PYTHONS), help="versions, with commas between them")
    parser.add_argument("--no-cuda", action="store_true", help="no wheels with kernels, nvcc or not")
    parser.add_argument("--try", dest="tried", action="store_true", help="install each, and run its check")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    sdist = make_sdist(ROOT, asked.out)
    print(sdist.name, flush=True)
    label = "" if asked.no_cuda else cuda_label()
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        tree = unpack(sdist, Path(scratch) / "sdist")
        shared = {"DEEPEP_OBJECTS": str(ROOT / "build" / "objects")}
        kinds = [({"DEEPEP_CUDA": "0"}, ("_core", "_emulator"))]
        if label:
            with_cuda = {"DEEPEP_CUDA": "1", "DEEPEP_LOCAL_VERSION": label}
            kinds.append((with_cuda, ("_core", "_emulator", "_cuda")))
        for interpreter in interpreters(asked.pythons.split(",")):
            for environment, extensions in kinds:
                wheel = make_wheel(tree, asked.out, interpreter.program, {**shared, **environment})
                print(wheel.name, flush=True)
                problems += [f"{wheel.name}: {what}" for what in problems_of_wheel(wheel, extensions)]
                if asked.tried:
                    folder = Path(tempfile.mkdtemp(dir=scratch))
                    program = fresh_environment(folder / "env", interpreter.program)
                    pins = ["-c", str(ROOT / "constraints.txt")]
                    _run([str(program), "-m", "pip", "install", "-q", *pins, f"{wheel}[cli,sim]"])
                    print("  " + try_wheel(wheel, program, folder).splitlines()[-1], flush=True)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
