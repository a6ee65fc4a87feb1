"""Terminal conventions of the commands: text of the user's is never markup, misuse is one line, and outputs
are checked before the work begins.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

PASSED, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints strings as they are, "[brackets]" included; styles are given as rich's Text."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def misused(message: object) -> NoReturn:
    """Prints one line to standard error and leaves with the status of misuse."""
    line = " ".join(str(message).split())
    make_console(stderr=True).print(line, style="red", soft_wrap=True)
    raise typer.Exit(MISUSED)


def demand_folder(option: str, path: Path) -> None:
    """Misuse unless `path` is a folder that can be written to, or can be made."""
    present = path
    while not present.exists() and present != present.parent:
        present = present.parent
    if not present.is_dir():
        misused(f"{option}: {present} is not a folder")
    _demand_room(option, present)


def demand_file(option: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """Misuse unless a file can be written at `path`, whose name ends in one of `endings` if there are any."""
    if endings and path.suffix.lower() not in endings:
        misused(f"{option}: got {path}; allowed: a name that ends in {', '.join(endings)}")
    if path.is_dir():
        misused(f"{option}: {path} is a folder")
    if path.exists() and not path.is_file():  # a FIFO: writing would wait for a reader, after the work
        misused(f"{option}: {path} is not a regular file")
    if not path.parent.is_dir():
        misused(f"{option}: there is no folder {path.parent}")
    if not path.exists():
        _demand_room(option, path.parent)
    elif not os.access(path, os.W_OK):
        misused(f"{option}: {path} cannot be written")


def _demand_room(option: str, folder: Path) -> None:
    """Misuse unless something can be made in the folder: permissions do not say so of all, /proc for one."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        misused(f"{option}: {folder} cannot be written to: {error.strerror}")
