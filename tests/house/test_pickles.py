"""Nothing is unpickled that came over a store, a group or out of a file: such bytes could run code.

What travels is bytes with a layout of their own: numbers, JSON, tensors.
"""

from __future__ import annotations

import ast

from harness.sources import python_files, relative

MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
}
ALLOWED = {
    "sim/worlds/travel.py": "between a world and the processes that it has started itself",
    "sim/emulator/packing.py": "between the ranks of a test, on the emulator",
}
"""Files that unpickle, each with the reason why their bytes can be trusted."""


def unpickling(source: str) -> list[tuple[int, str]]:
    """(line, name) of whatever unpickles: modules, torch.load without weights_only=True, collectives."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [name.name for name in node.names if name.name in CALLS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = [f"{node.func.attr}()"] if node.func.attr in CALLS else []
            owner = node.func.value
            if node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id == "torch":
                weights = {k.arg: k.value for k in node.keywords}.get("weights_only")
                if not (isinstance(weights, ast.Constant) and weights.value is True):
                    names.append("torch.load()")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [f"{node.func.id}()"] if node.func.id in CALLS else []
        else:
            continue
        found += [
            (node.lineno, name)
            for name in names
            if name.endswith("()") or name.split(".")[0] in MODULES or name in CALLS
        ]
    return found


def test_nothing_is_unpickled() -> None:
    found = [
        f"{relative(path)}:{line}: {name}"
        for path in python_files("deepep", "reference", "sim")
        if relative(path) not in ALLOWED
        for line, name in unpickling(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_exceptions_still_unpickle() -> None:
    for file in ALLOWED:
        (path,) = python_files(file)
        assert unpickling(path.read_text()), f"{file} no longer does"


def test_unpickling_is_seen() -> None:
    bad = [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "dist.all_gather_object(everyone, mine)",
        "from torch.distributed import gather_object",
    ]
    assert all(unpickling(source) for source in bad)
    good = [
        "torch.load(file, weights_only=True)",
        "json.loads(text)",
        "dist.all_gather(out, mine)",
        "import copy",
    ]
    assert not any(unpickling(source) for source in good)
