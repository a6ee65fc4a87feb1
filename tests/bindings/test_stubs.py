"""The stubs deepep/_*.pyi declare what the compiled modules have, name for name; and no function takes more
than eight arguments by position.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, WrapperDescriptorType
from typing import Any

import pytest

import deepep

MODULES = [name for name in ("_core", "_emulator", "_cuda") if find_spec(f"deepep.{name}") is not None]
MOST_POSITIONAL = 8
#: named in the stubs to say what is expected of an argument, without being there
PROTOCOLS = {"Blocks"}


@dataclass(frozen=True)
class Parameters:
    """Of a function, but for `self`: those that may be given by position, and those given by name alone."""

    positional: tuple[str, ...]
    by_name: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()


def of_stub(function: ast.FunctionDef, is_method: bool) -> Parameters:
    """As a stub declares them."""
    args = function.args
    assert args.vararg is None, f"{function.name}: *{args.vararg}"
    assert args.kwarg is None, f"{function.name}: **{args.kwarg}"
    names = [arg.arg for arg in args.posonlyargs + args.args]
    presets = names[len(names) - len(args.defaults) :]
    presets += [
        a.arg for a, preset in zip(args.kwonlyargs, args.kw_defaults, strict=True) if preset is not None
    ]
    is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    if is_method and not is_static:
        assert names[0] == "self"
        del names[0]
    return Parameters(tuple(names), tuple(arg.arg for arg in args.kwonlyargs), frozenset(presets))


def of_signature(function: Any) -> Parameters:
    """As the module states them: pybind11 in the docstring, others as Python's own functions do."""
    lines = (function.__doc__ or "").splitlines()
    stated = [line for line in lines if re.match(rf"(\d+\. )?{function.__name__}\(.*\) -> ", line)]
    if not stated:
        given = inspect.signature(function).parameters
        names = [p for p in given.values() if p.name != "self"]
        by_name = tuple(p.name for p in names if p.kind is p.KEYWORD_ONLY)
        assert len(by_name) == len(names), f"{function.__name__}: pybind11 states its signature otherwise"
        return Parameters((), by_name, frozenset(p.name for p in names if p.default is not p.empty))
    found = {of_line(re.sub(r"^\d+\. ", "", line)) for line in stated}
    assert len(found) == 1, f"{function.__name__}: overloads whose names differ"
    return found.pop()


def of_line(line: str) -> Parameters:
    """`name(self: module.Class, a: int, *, b: int = 0) -> None`."""
    positional: list[str] = []
    by_name: list[str] = []
    optional = set()
    into = positional
    for part in split(line[line.index("(") + 1 : line.rindex(") ->")]):
        name, _, rest = part.partition(":")
        if name == "*":
            into = by_name
        elif name not in ("self", "/"):
            into.append(name.strip())
            if has_preset(rest):
                optional.add(name.strip())
    return Parameters(tuple(positional), tuple(by_name), frozenset(optional))


def split(arguments: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def has_preset(annotation: str) -> bool:
    """True if ` int = 0` states one."""
    return " = " in annotation


def declared(name: str) -> tuple[dict[str, Parameters], set[str], dict[str, set[str]]]:
    """Of a stub: functions and methods (as Class.method), values, and the properties of each class."""
    functions: dict[str, Parameters] = {}
    values: set[str] = set()
    properties: dict[str, set[str]] = {}
    shared = {node.name: node for node in stub_of("_launches").body if isinstance(node, ast.ClassDef)}
    given: list[ast.stmt] = []
    for node in stub_of(name).body:
        if isinstance(node, ast.ImportFrom) and node.module == "deepep._launches":
            given += [shared[alias.name] for alias in node.names if alias.asname is not None]
    for node in [*given, *stub_of(name).body]:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = of_stub(node, is_method=False)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            values.add(node.target.id)
        elif isinstance(node, ast.ClassDef) and node.name not in PROTOCOLS:
            properties[node.name] = set()
            for method in members_of(node, shared):
                if not isinstance(method, ast.FunctionDef):
                    continue
                if any(isinstance(d, ast.Name) and d.id == "property" for d in method.decorator_list):
                    properties[node.name].add(method.name)
                else:
                    functions[f"{node.name}.{method.name}"] = of_stub(method, is_method=True)
    return functions, values, properties


def stub_of(name: str) -> ast.Module:
    return ast.parse(Path(deepep.__file__).with_name(f"{name}.pyi").read_text())


def members_of(node: ast.ClassDef, shared: dict[str, ast.ClassDef]) -> list[ast.stmt]:
    """With those of its bases, as far as they are shared ones."""
    bases = [shared[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in shared]
    return [*node.body, *(member for base in bases for member in members_of(base, shared))]


def compiled(module: ModuleType) -> tuple[dict[str, Parameters], set[str], dict[str, set[str]]]:
    """The same of a module."""
    functions: dict[str, Parameters] = {}
    values: set[str] = set()
    properties: dict[str, set[str]] = {}
    for name, entry in vars(module).items():
        if name.startswith("__"):
            continue
        if isinstance(entry, type):
            properties[name] = {n for n, member in vars(entry).items() if isinstance(member, property)}
            for method, member in vars(entry).items():
                if isinstance(member, staticmethod):
                    functions[f"{name}.{method}"] = of_signature(member.__func__)
                elif isinstance(member, WrapperDescriptorType):
                    assert method.startswith("__"), f"{name}.{method}"  # of a class that Python cannot make
                elif callable(member) and (method == "__init__" or not method.startswith("_")):
                    functions[f"{name}.{method}"] = of_signature(member)
        elif callable(entry):
            functions[name] = of_signature(entry)
        else:
            values.add(name)
    return functions, values, properties


@pytest.fixture(params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(name: str) -> ModuleType:
    return importlib.import_module(f"deepep.{name}")


def test_stubs_name_what_the_module_has(name: str, module: ModuleType) -> None:
    wanted, wanted_values, wanted_properties = declared(name)
    got, values, properties = compiled(module)
    assert values == wanted_values
    assert properties == wanted_properties
    assert got.keys() == wanted.keys()
    for function, parameters in got.items():
        assert parameters == wanted[function], function


def test_launches_are_declared_once() -> None:
    """Functions that both modules have alike, beyond a few words, are in the stub that they share."""
    seen: dict[str, str] = {}
    for name in ("_cuda", "_emulator", "_launches"):
        for node in ast.walk(stub_of(name)):
            if isinstance(node, ast.FunctionDef) and len(node.args.kwonlyargs) > MOST_POSITIONAL:
                text = ast.unparse(node)
                assert text not in seen, f"{name}: {node.name}, as in {seen[text]}"
                seen[text] = name


def test_no_more_than_eight_cross_by_position(module: ModuleType) -> None:
    functions, _, _ = compiled(module)
    assert functions
    for function, parameters in functions.items():
        num_self = "." in function  # counts too
        assert len(parameters.positional) + num_self <= MOST_POSITIONAL, function
