"""Transport of functions, arguments and results between the parent and the ranks: by cloudpickle."""

from __future__ import annotations

import importlib
import io
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from deepep.extras import needed_for

with needed_for("deepep.sim.World"):
    import cloudpickle


def pack(message: tuple[Any, ...]) -> bytes:
    """`message` as bytes. Functions of scripts and test modules go by value, installed ones by name."""
    with _by_value(message):
        stream = io.BytesIO()
        _Pickler(stream).dump(message)
        return stream.getvalue()


def unpack(message: bytes) -> Any:
    """Restores what `pack` was given."""
    return cloudpickle.loads(message)


class _Pickler(cloudpickle.Pickler):
    """Modules of a class of their own go by name, too: torch's configuration modules are such, and a
    function that mentions torch takes along those that happen to be loaded. Code keeps the name of its file,
    for tracebacks: cloudpickle 3.1.3 forgets it.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            _, parts = self.dispatch_table[CodeType](obj)
            return _code, (obj.co_filename, parts)
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def _code(filename: str, parts: tuple[Any, ...]) -> CodeType:
    return CodeType(*parts).replace(co_filename=filename)


@contextmanager
def _by_value(message: tuple[Any, ...]) -> Iterator[None]:
    """Registers the modules of the message's functions that a rank could not import by name."""
    modules: set[ModuleType] = set()
    for item in _items(message):
        name = getattr(item, "__module__", None) or type(item).__module__
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is not None and name != "__main__" and not _installed(getattr(module, "__file__", None)):
            modules.add(module)
    fresh = [m for m in modules if m.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in fresh:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in fresh:
            cloudpickle.unregister_pickle_by_value(module)


def _items(message: tuple[Any, ...]) -> Iterator[Any]:
    """The message's parts: what stands in it directly, and what its tuples, lists and dictionaries hold."""
    for part in message:
        if isinstance(part, (tuple, list)):
            yield from _items(tuple(part))
        elif isinstance(part, dict):
            yield from _items(tuple(part.values()))
        else:
            yield part


@cache
def _installed(file: str | None) -> bool:
    """True if a rank can import this file's module by name: standard library, site-packages, deepep."""
    if file is None:
        return True  # built in
    path = Path(file).resolve()
    # Of this environment, the user's own, or the one that this environment was made of.
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    paths = sysconfig.get_paths()
    roots = [Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    package = sys.modules.get("deepep")
    if package is not None and package.__file__ is not None:
        roots.append(Path(package.__file__).resolve().parent)
    roots.append(Path(__file__).resolve().parents[1])  # deepep.sim
    reference = sys.modules.get("deepep.reference")
    if reference is not None and reference.__file__ is not None:
        roots.append(Path(reference.__file__).resolve().parent)
    return any(path.is_relative_to(root) for root in roots)
