"""docker/Dockerfile: its RUN lines run, in order, in folders that stand for a fresh image's; the compose file
and the launch examples name what exists.

No container is started. Lines of apt-get are not run, and torch is borrowed from this environment: all others
are executed by sh as they stand, with the file's own variables and folders.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

import deepep
from deepep.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
FOLDERS = ("/opt/build", "/opt/deepep", "/src", "/wheels", "/work")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


@dataclass
class Image:
    """A stage of a Dockerfile, built in a folder: `environment` as ARG and ENV lines have made it."""

    folder: Path
    environment: dict[str, str]
    workdir: Path = field(default_factory=Path)
    skipped: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def here(self, text: str) -> str:
        """`text` with the image's folders in this stage's."""
        return re.sub("|".join(map(re.escape, FOLDERS)), lambda m: f"{self.folder}{m[0]}", text)

    def run(self, line: str, borrowed: Path) -> None:
        """Runs a RUN line; what needs root is noted as skipped."""
        if line.startswith("apt-get"):
            self.skipped.append(line)
            return
        done = subprocess.run(
            ["sh", "-ec", self.here(line)],
            cwd=self.workdir if self.workdir.is_dir() else self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        self.ran.append(line)
        if " -m venv " in line:
            (site,) = Path(self.here(line.split()[-1])).glob("lib/python*/site-packages")
            for old in (*site.glob("setuptools*"), site / "pkg_resources"):  # Python 3.12 has none, either
                shutil.rmtree(old, ignore_errors=True)
            (site / "borrowed.pth").write_text(f"{borrowed}\n")


def build(tree: Path, folder: Path, environment: dict[str, str], borrowed: Path) -> list[Image]:
    """All stages, built as docker would, but for apt-get."""
    stages: list[Image] = []
    names: dict[str, Image] = {}
    for instruction, rest in instructions(DOCKERFILE):
        stage = stages[-1] if stages else None
        if instruction == "FROM":
            place = folder / f"stage{len(stages)}"
            place.mkdir(parents=True)
            stages.append(Image(place, dict(environment)))
            names[rest.rpartition(" AS ")[2]] = stages[-1]
        elif stage is None:
            assert instruction == "ARG"
        elif instruction == "ARG":
            name, _, value = rest.partition("=")
            stage.environment.setdefault(name, value)
        elif instruction == "ENV":
            name, _, value = rest.partition("=")
            stage.environment[name] = stage.here(value).replace("$PATH", stage.environment["PATH"])
        elif instruction == "WORKDIR":
            stage.workdir = Path(stage.here(rest))
            stage.workdir.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *options, source, target = rest.split()
            origin = Path(names[options[0].partition("=")[2]].here(source)) if options else tree / source
            shutil.copytree(origin, stage.workdir / stage.here(target), dirs_exist_ok=True)
        elif instruction == "RUN":
            stage.run(rest, borrowed)
        else:
            assert instruction in ("ENTRYPOINT", "CMD"), instruction
    return stages


@pytest.mark.slow
def test_the_dockerfile_installs_a_wheel_of_the_sdist_that_works(dist: ModuleType, tmp_path: Path) -> None:
    """Made of the sdist, not of this tree. Then everything holds between two processes outside of both."""
    sdist = dist.make_sdist(ROOT, tmp_path / "dist")
    tree = dist.unpack(sdist, tmp_path / "sdist")
    assert not (tree / ".git").exists()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python3").chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "DEEPEP_OBJECTS": str(ROOT / "build" / "objects"),
        "DEEPEP_LOCAL_VERSION": "+test1",  # as wheels with kernels have "+cu130"
        "PIP_NO_INDEX": "1",  # everything else is there: what a line needs besides is an error
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_COMPILE": "1",
    }
    stages = build(tree, tmp_path / "image", environment, Path(torch.__file__).parents[1])
    assert [len(stage.ran) for stage in stages] == [3, 3]
    assert all(line.startswith("apt-get update && ") for stage in stages for line in stage.skipped)
    (wheel,) = Path(stages[1].here("/wheels")).glob("*.whl")
    assert wheel.name.startswith(f"deepep-{deepep.__version__}+test1-cp")
    assert dist.problems_of_wheel(wheel, ["_core", "_emulator"]) == []
    program = Path(stages[1].here("/opt/deepep")) / "bin" / "python"
    said = dist.try_wheel(wheel, program, tmp_path, "--ranks", "2", "--backend", "reference")
    held, of = re.findall(r"(\d+) of (\d+) hold", said)[-1]
    assert held == of, said


def test_what_is_given_to_the_dockerfile_exists() -> None:
    arguments = {rest.partition("=")[0] for word, rest in instructions(DOCKERFILE) if word == "ARG"}
    for text in (DOCKERFILE, OPERATIONS):
        assert set(re.findall(r"--build-arg (\w+)=", text)) <= arguments
    block = re.findall(r"^      args:\n((?:        \S.*\n)+)", COMPOSE, re.MULTILINE)
    assert block
    assert {line.split(":")[0].strip() for part in block for line in part.splitlines()} <= arguments
    for path in re.findall(r"dockerfile: (\S+)", COMPOSE):
        assert (ROOT / path).exists()
    for command in re.findall(r'command: \["(\w+)"', COMPOSE):
        assert command in COMMANDS
    copied = [rest for word, rest in instructions(DOCKERFILE) if word == "COPY"]
    assert copied == [". .", "--from=build /wheels /wheels"]


def test_every_variable_of_the_environment_is_in_the_table() -> None:
    table = OPERATIONS.partition("## Settings of the environment")[2].partition("\n## ")[0]
    sources = [
        ROOT / "setup.py",
        *(p for f in ("deepep", "sim", "reference") for p in (ROOT / f).rglob("*.py")),
    ]
    read = {name for path in sources for name in re.findall(r'environ[^\n]*"(DEEPEP_\w+)"', path.read_text())}
    assert len(read) >= 12
    assert read - set(re.findall(r"DEEPEP_\w+", table)) == set()


def test_the_launch_examples_name_what_exists() -> None:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", OPERATIONS, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=60)
    everything = OPERATIONS + COMPOSE
    for path in re.findall(r"\b((?:examples|docker|docs|tests)/[\w./-]+\.\w+)", everything):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"(?:python|torchrun[^\n`]*) -m deepep (\w+)", everything):
        assert command in COMMANDS, command
