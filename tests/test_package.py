"""The source distribution holds whatever a build needs, the package nothing that is for tests alone; what
an extra brings is named where it is missing. That a wheel made of it works shows tests/test_container.py.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import deepep
from deepep.cli import COMMANDS, main
from deepep.extras import EXTRA_OF, MissingExtraError
from deepep.trace import RoutingTrace

ROOT = Path(__file__).parents[1]
NEEDED = ("csrc", "include", "deepep", "reference", "sim")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files that a source distribution is made of, and the packages."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set((folder / "deepep.egg-info" / "SOURCES.txt").read_text().splitlines())


def test_the_source_distribution_holds_what_is_compiled_and_installed(listed: set[str]) -> None:
    present = {
        str(path.relative_to(ROOT))
        for folder in NEEDED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "__pycache__" not in path.parts
    }
    assert len(present) > 200
    assert sorted(present - listed) == []
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= listed


def test_nothing_of_the_tests_is_distributed(listed: set[str]) -> None:
    assert [name for name in listed if name.startswith("tests/")] == []


def packed(folder: Path, files: dict[str, str]) -> Path:
    """A wheel with these files."""
    path = folder / "deepep-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


METADATA = "deepep-0.dist-info/METADATA"
ABOUT = """Metadata-Version: 2.4
License-Expression: Apache-2.0
Requires-Python: >=3.10
Provides-Extra: cli
Provides-Extra: sim
Provides-Extra: nvshmem
Requires-Dist: numpy
Requires-Dist: torch>=2.8
Requires-Dist: typer; extra == "cli"
"""


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"deepep/py.typed": None}, "deepep/py.typed is missing"),
        ({"deepep/reference/high_throughput.py": None}, "deepep/reference/high_throughput.py is missing"),
        ({"reference/layout.py": ""}, "reference/layout.py is not of the package"),
        ({"deepep/tests/test_it.py": ""}, "deepep/tests/test_it.py is a test"),
        ({"deepep/_cuda.cpython-311.so": ""}, "_cuda: built True"),
        ({"deepep/_core.cpython-311.so": None}, "_core: built False"),
        ({"deepep-0.dist-info/licenses/LICENSE": None}, "LICENSE is missing"),
        ({METADATA: ABOUT + "Requires-Dist: rich\n"}, "requires ['numpy', 'rich', 'torch']"),
        ({METADATA: ABOUT.replace("Provides-Extra: sim\n", "")}, "the extra sim is missing"),
    ],
)
def test_a_wheel_that_is_not_as_promised_is_told(
    dist: ModuleType, tmp_path: Path, changed: dict[str, str | None], problem: str | None
) -> None:
    files = {**dict.fromkeys(dist.NEEDED, ""), METADATA: ABOUT, "deepep/_core.cpython-311.so": ""}
    files["deepep-0.dist-info/licenses/LICENSE"] = ""
    wheel = packed(tmp_path, {k: v for k, v in {**files, **changed}.items() if v is not None})
    found = dist.problems_of_wheel(wheel, ["_core"])
    if problem is None:
        assert found == []
    else:
        assert any(problem in line for line in found), found


def test_the_version_and_its_changes() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    first = re.findall(r"^## (\S+)", changes, re.MULTILINE)[0]
    assert first == deepep.__version__


#: What is imported anew -> the module of an extra that it needs.
IMPORTS = {"deepep.sim.worlds.travel": "cloudpickle", "deepep.sim.cases.strategies": "hypothesis"}


@pytest.mark.parametrize("module", IMPORTS)
def test_a_missing_extra_is_named_by_what_needs_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, IMPORTS[module], None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'deepep[sim]'")) as raised:
        importlib.import_module(module)
    assert raised.value.name == IMPORTS[module]


def test_a_missing_extra_is_named_by_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=re.escape("reading a routing trace needs safetensors: pip")):
        RoutingTrace.load(tmp_path / "none")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_extra_it_misses(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for name in [name for name in sys.modules if name.startswith("deepep.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as left:
        main([command])
    assert left.value.code == f"`deepep {command}` needs typer: pip install 'deepep[cli]'"


def test_every_extra_is_offered_and_brings_what_is_said_of_it() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for module, extra in EXTRA_OF.items():
        line = re.search(rf"^{extra} = \[(.*)\]", project, re.MULTILINE)
        if extra == "nvshmem" and line is None:
            continue  # comes with its backend
        assert line is not None, extra
        assert module in line[1], (module, extra)
