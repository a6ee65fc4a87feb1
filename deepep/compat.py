"""install_as_deep_ep: existing clients of DeepEP run on this library unchanged.

They import it by several names, and some look before they import (importlib.util.find_spec, the version in
importlib.metadata): whatever they find is this library, V1's Buffer and V2's ElasticBuffer.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from types import ModuleType
from typing import Any

_NAME = "deep_ep"
_CPP = "deep_ep_cpp"
_UTILS = ("envs", "event", "math", "testing")


def install_as_deep_ep() -> None:
    """Make `import deep_ep` give this library, and with it `deep_ep.buffer`, `deep_ep.buffers.legacy` and
    `.elastic`, `deep_ep.utils` and its modules, `deep_ep._C`, and `deep_ep_cpp`. Modules of this library are
    the same ones under either name.

    Call it before the client is imported. Raises RuntimeError if another `deep_ep` has been imported already.
    """
    import deepep
    from deepep.api import buffer

    loaded = sys.modules.get(_NAME)
    if loaded is not None and loaded is not deepep:
        where = getattr(loaded, "__file__", None) or "elsewhere"
        raise RuntimeError(f"deep_ep has been imported from {where}: install this library first")
    if loaded is None:
        sys.meta_path.insert(0, _Names())
    extension = _extension(deepep)
    legacy = _module(f"{_NAME}.buffers.legacy", "V1's Buffer.", Buffer=deepep.Buffer, Config=deepep.Config)
    v2 = {"ElasticBuffer": deepep.ElasticBuffer, "EPHandle": deepep.EPHandle}
    elastic = _module(f"{_NAME}.buffers.elastic", "V2's ElasticBuffer and its handle.", **v2)
    both = {"Buffer": deepep.Buffer, "legacy": legacy, "elastic": elastic, **v2}
    buffers = _module(f"{_NAME}.buffers", "Buffers, by V2's names.", **both)
    buffers.__path__ = []  # a package, and nothing else in it
    utils = importlib.import_module("deepep.utils")
    modules = {_NAME: deepep, f"{_NAME}.buffer": buffer, f"{_NAME}.buffers": buffers}
    modules |= {module.__name__: module for module in (legacy, elastic)}
    modules |= {f"{_NAME}.utils": utils, _CPP: extension, f"{_NAME}._C": extension}
    for name in _UTILS:
        modules[f"{_NAME}.utils.{name}"] = importlib.import_module(f"deepep.utils.{name}")
    sys.modules.update(modules)
    # An import that finds its module in the table sets nothing on the parent.
    vars(deepep).update(buffer=buffer, buffers=buffers, _C=extension)


def _extension(library: ModuleType) -> ModuleType:
    names: dict[str, Any] = {name: getattr(library, name) for name in ("Config", "EventHandle", "topk_idx_t")}
    return _module(
        _CPP,
        "DeepEP's extension module, as far as clients import from it.",
        is_sm90_compiled=library.Buffer.is_sm90_compiled,
        get_low_latency_rdma_size_hint=library.Buffer.get_low_latency_rdma_size_hint,
        **names,
    )


def _module(name: str, about: str, **names: Any) -> ModuleType:
    """A module that importlib takes for an imported one."""
    module = ModuleType(name, about)
    module.__spec__ = ModuleSpec(name, None, origin="deepep", is_package=name == f"{_NAME}.buffers")
    vars(module).update(names)
    return module


class _Names(DistributionFinder):
    """Finds the distribution "deep_ep", of this library's version, and the library's modules by that name.

    By its path, Python would make them anew: classes of errors that nobody raises.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that exists without the underscore, too; DeepEP's own stand in sys.modules."""
        package, _, rest = fullname.partition(".")
        if package != _NAME or not rest:
            return None
        try:
            found = importlib.util.find_spec(f"deepep.{rest}")
        except ModuleNotFoundError:  # its parent is one of DeepEP's
            return None
        return None if found is None else ModuleSpec(fullname, _SameModule(found.name))

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The one distribution, for those who ask for it by name."""
        asked = getattr(context, "name", None) or ""
        return [_DeepEP()] if asked.replace("-", "_").lower() == _NAME else []


class _SameModule(Loader):
    """Loads a module of this library by giving it out once more."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that is there, or is imported now."""
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives it its own spec again, in whose place importlib has put the one that it was asked for."""
        module.__spec__ = self._spec


class _DeepEP(Distribution):
    """Metadata of "deep_ep" as this library stands for it."""

    def read_text(self, filename: str) -> str | None:
        """METADATA alone."""
        from deepep.version import __version__

        if filename != "METADATA":
            return None
        message = Message()
        message["Metadata-Version"], message["Name"], message["Version"] = "2.1", _NAME, __version__
        message["Summary"] = "deepep, installed as deep_ep"
        return message.as_string()

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """No file is installed under this name."""
        raise FileNotFoundError(f"deep_ep is deepep under another name: it has no file {path}")
