"""Terminal conventions of the commands: text of the user's is never markup, misuse is one line, and outputs
are checked before the work begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import typer
from rich.console import Console
from typer.models import ArgumentInfo, OptionInfo

PASSED, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints strings as they are, "[brackets]" included; styles are given as rich's Text."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


_SPELLINGS: ContextVar[Mapping[str, str]] = ContextVar("spellings")
"""What a user types for each parameter of the command that runs: --ranks-per-domain, TRACE."""


@contextlib.contextmanager
def spelling_options_of(command: Callable[..., object]) -> Iterator[None]:
    """Inside, misuse names options as they are typed, whatever complained about them."""
    token = _SPELLINGS.set(_spellings(command))
    try:
        yield
    finally:
        _SPELLINGS.reset(token)


def _spellings(command: Callable[..., object]) -> dict[str, str]:
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # Inside Annotated typer has the first name in the place of a default.
                words = (info.default, *(info.param_decls or ()))
                given = [word for word in words if isinstance(word, str) and word.startswith("--")]
                found[name] = (given or [f"--{name.replace('_', '-')}"])[0].partition("/")[0]
            elif isinstance(info, ArgumentInfo):
                found[name] = name.upper()
    return found


def _spelled(line: str) -> str:
    """A message that begins with parameters' names and a colon, with what is typed in their place."""
    names, colon, problem = line.partition(":")
    spellings, words = _SPELLINGS.get({}), names.split(", ")
    if not colon or not all(re.fullmatch(r"\w+", word) and word in spellings for word in words):
        return line
    return ", ".join(spellings[word] for word in words) + colon + problem


def demand_use(context: typer.Context, used: Collection[str], otherwise: str = "") -> None:
    """Misuse if an option was given that is not among the parameters `used`: it would change nothing.

    otherwise: where it may be given, and is not, for the message; else that names those that are used.
    """
    for parameter in context.command.params:
        name: Any = parameter.name
        source: Any = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in used:
            allowed = otherwise or ", ".join(_SPELLINGS.get({}).get(each, each) for each in used)
            misused(f"{name}: given, and not used; allowed: {allowed}")


def misused(message: object) -> NoReturn:
    """Prints one line to standard error and leaves with the status of misuse."""
    line = _spelled(" ".join(str(message).split()))
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
