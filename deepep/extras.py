"""Extras: packages that only parts of the library need, and errors that name the extra that brings them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: Module that may be missing -> the extra of pyproject.toml that installs it.
EXTRA_OF: dict[str, str] = {
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "safetensors": "cli",
    "cloudpickle": "sim",
    "hypothesis": "sim",
    "nvshmem": "nvshmem",
}


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra is not installed. `extra`: which one; `name`: the module that was imported."""

    def __init__(self, what: str, module: str) -> None:
        self.extra = EXTRA_OF[module]
        super().__init__(f"{what} needs {module}: pip install 'deepep[{self.extra}]'", name=module)


@contextlib.contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Turns a failing import of an extra's package into an error that says what needs it, and the command
    that installs it. Other errors pass.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA_OF or isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError(what, module) from error
