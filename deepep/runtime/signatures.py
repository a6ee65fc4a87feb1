"""Checks of arguments from a function's signature, for the functions of deepep.layout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

from deepep.errors import ArgumentError, ArgumentTypeError
from deepep.runtime.checks import check_flag, check_int

_MOST_PARTS = 1 << 16  # of the tokens that a kernel's blocks share
_Function = TypeVar("_Function", bound=Callable[..., Any])


def checked(function: _Function, most: int = 2**63 - 1) -> _Function:
    """Has a function refuse arguments that are not of the kinds of its signature, and integers above `most`;
    and what the core refuses, which has the argument's name before a colon, is the library's own error.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            kind = signature.parameters[name].annotation
            limit = _MOST_PARTS if name == "num_parts" else most
            given.arguments[name] = (
                check_int(name, value, -(2**63), limit) if kind == "int" else _KINDS[kind](name, value)
            )
        try:
            return function(*given.args, **given.kwargs)
        except ArgumentError:
            raise
        except ValueError as error:
            name, _, rest = str(error).partition(": got ")
            name = _NAMES.get(name, name)
            if name not in signature.parameters:
                raise
            got, _, allowed = rest.partition("; expected ")
            raise ArgumentError(name, got, allowed) from None

    return cast(_Function, call)


def _array(name: str, value: object) -> Tensor | np.ndarray:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise ArgumentTypeError(name, type(value).__name__, "a tensor or an array")
    return value


def _arrays(name: str, value: object) -> list[Tensor | np.ndarray]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ArgumentTypeError(name, type(value).__name__, "a list of tensors")
    return [_array(name, entry) for entry in value]


_NAMES = {"first_rows": "first_row", "masks": "local_ranks"}
"""Names of the core for arguments that have others here."""
_KINDS: dict[str, Callable[[str, object], Any]] = {
    "bool": check_flag,
    "Array": _array,
    "Sequence[Array]": _arrays,
}
