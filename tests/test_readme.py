"""The README's examples are the files in examples/, and they run; its links lead somewhere."""

from __future__ import annotations

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


def test_the_readme_shows_the_examples_as_they_are() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    files = {name: text.split('"""\n\n', 1)[1] for name, text in EXAMPLES.items()}
    assert sorted(blocks) == sorted(files.values())
    assert set(files) == {"train", "prefill", "decode", "property"}
    for name, text in files.items():
        assert len(text.splitlines()) <= 28, f"{name} is meant to be read at a glance"


def test_the_property_holds() -> None:
    path = ROOT / "examples" / "property.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "holds for 50 drawn cases\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["train", "prefill", "decode"])
def test_the_examples_run(
    world_of: Callable[[int], Any], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """As torchrun would run them, but for the process group, which the world has made."""

    def body(context: Any, source: str) -> list[str]:
        import builtins
        from unittest import mock

        import torch.distributed as dist

        printed: list[str] = []
        with (
            mock.patch.object(dist, "init_process_group"),
            mock.patch.object(dist, "destroy_process_group"),
            mock.patch.object(builtins, "print", lambda *a: printed.append(" ".join(map(str, a)))),
        ):
            exec(compile(source, "example", "exec"), {"__name__": "__main__"})
        return printed

    printed = world_of(4).run(body, EXAMPLES[name])
    expected = {"train": "step 9: loss", "prefill": "rows came", "decode": "rows per expert"}[name]
    assert any(expected in line for line in printed[0])
    if name == "train":
        losses = [float(re.findall(r"loss ([\d.]+)", line)[0]) for line in printed[0]]
        assert losses[-1] < losses[0]


def test_links_and_commands_lead_somewhere() -> None:
    from deepep.cli import COMMANDS

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    listed = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert listed
    for command in listed:
        assert command in COMMANDS
        assert (ROOT / "deepep" / "cli" / f"{command}.py").exists()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
