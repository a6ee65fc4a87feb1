"""The README's examples are the files in examples/, and they run; its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = {path.stem: path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))}


PROGRAMS = {
    "train": ["--steps", "12", "--tokens", "64"],
    "prefill": ["--steps", "1", "--tokens", "24"],
    "elastic": ["--steps", "1", "--tokens", "24"],
    "beside": ["--steps", "1", "--tokens", "24", "--hidden", "64"],
    "decode": ["--steps", "2", "--tokens", "5"],
    "overlap": ["--steps", "1", "--tokens", "5"],
    "data_parallel": ["--steps", "3", "--tokens", "16", "--hidden", "64"],
}


def test_the_readme_shows_pieces_of_the_examples_as_they_are() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert set(EXAMPLES) == {*PROGRAMS, "property"}
    shown = {name for name, text in EXAMPLES.items() for block in blocks if block in text}
    assert shown == set(EXAMPLES)
    assert len(blocks) == len(shown), "each block is of one example"
    for name, text in EXAMPLES.items():
        assert len(text.splitlines()) <= 80, f"{name} is meant to be read at a glance"
        assert f"examples/{name}.py" in text.splitlines()[0], "the first line says how to start it"


def test_the_property_holds() -> None:
    path = ROOT / "examples" / "property.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "holds for 50 drawn cases\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_examples_run(world_of: Callable[[int], Any], name: str) -> None:
    """As torchrun would run them, but for the process group, which the world has made."""

    def body(context: Any, source: str, arguments: list[str]) -> tuple[list[str], int]:
        import builtins
        import sys
        import threading
        from unittest import mock

        import torch.distributed as dist

        def threads() -> int:
            return sum(thread.name.startswith("deepep-rank") for thread in threading.enumerate())

        printed, before = [], threads()
        with (
            mock.patch.object(sys, "argv", ["example", *arguments]),
            mock.patch.object(dist, "init_process_group") as begin,
            mock.patch.object(dist, "destroy_process_group") as end,
            mock.patch.object(builtins, "print", lambda *a, **how: printed.append(" ".join(map(str, a)))),
        ):
            exec(compile(source, "example", "exec"), {"__name__": "__main__"})
        begin.assert_called_once_with("gloo")
        end.assert_called_once_with()
        return printed, threads() - before

    outcomes = world_of(4).run(body, EXAMPLES[name], PROGRAMS[name])
    for printed, left in outcomes:
        assert any(re.search(r"[\d,]+ tokens/s", line) for line in printed)
        assert left == 0, "no buffer is left behind"
    if name == "overlap":
        timeline = re.findall(
            r"^((?:next )?\w+ [01](?:, \w+)?) +[\d.]+ us$", "\n".join(outcomes[0][0]), re.MULTILINE
        )
        assert timeline == [
            *("attention 0", "dispatch 0, send", "attention 1", "dispatch 0, receive", "dispatch 1, send"),
            *("experts 0", "dispatch 1, receive", "combine 0, send", "experts 1", "combine 0, receive"),
            *("combine 1, send", "next attention 0", "combine 1, receive"),
        ]
        assert all("GEMMs alone" in line for printed, _ in outcomes for line in printed)
    if name == "train":
        losses = [float(found) for found in re.findall(r"loss ([\d.]+)", "\n".join(outcomes[0][0]))]
        assert len(losses) == 12
        assert sum(losses[-3:]) < sum(losses[:3])


def test_an_example_runs_under_torchrun() -> None:
    path, arguments = ROOT / "examples" / "decode.py", PROGRAMS["decode"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # Ranks share the terminal: a line may begin where another has not ended.
    assert sorted(re.findall(r"rank ([01]): out \[5, 256\]", done.stdout)) == ["0", "1"], done.stdout


def test_links_and_commands_lead_somewhere() -> None:
    from deepep.cli import COMMANDS

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    section = README.split("\n## Commands\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    for command in listed:
        assert (ROOT / "deepep" / "cli" / f"{command}.py").exists()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
