"""Tensors of the library are made on a device that is named: torch's default device is the user's affair."""

from __future__ import annotations

import ast

import pytest
from harness.sources import ROOT

#: what `torch.set_default_device` moves (torch.utils._device)
CONSTRUCTORS = frozenset(
    (
        *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones"),
        *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
        *("triu_indices", "zeros"),
    )
)
#: programs that make their own inputs, in processes of their own
PROGRAMS = ("deepep/bench", "deepep/demo", "deepep/cli")
FOLDERS = ("deepep", "reference", "sim/emulator")


def unnamed(source: str) -> list[int]:
    """Lines of calls that leave the device to torch."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in CONSTRUCTORS
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_every_tensor_names_its_device() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        if not str(path.relative_to(ROOT)).startswith(PROGRAMS)
        for line in unnamed(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.zeros(3)", [1]),
        ("\ntorch.tensor([1], dtype=torch.int32)", [2]),
        ("torch.zeros(3, device=x.device)", []),
        ("x.new_zeros(3)", []),
        ("torch.zeros_like(x)", []),
    ],
)
def test_it_is_found(source: str, lines: list[int]) -> None:
    assert unnamed(source) == lines


def test_the_list_is_torchs() -> None:
    import torch.utils._device as moved

    names = {function.__name__ for function in moved._device_constructors()}
    assert names >= CONSTRUCTORS
