"""Bad arguments, from signatures: odd values for every parameter, and the judge of what comes of them.

What is allowed: the call takes the value (a flag of 1, say), or it raises the library's own error, which
names the argument.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

from deepep import ArgumentError, DeepEPError

ODD: dict[str, Any] = {
    "nothing": None,
    "an object": object(),
    "a class": int,
    "a function": len,
    "text": "8",
    "bytes": b"8",
    "a list": [1, 2],
    "a tuple": (1, 2, 3),
    "a dictionary": {"x": 1},
    "an array": numpy.array([1, 0]),
    "a tensor of two": torch.tensor([8, 8]),
    "a tensor of none": torch.empty(0),
    "a 0-d float": torch.tensor(1.5),
    "a dtype": torch.float32,
    "a float": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a complex number": 1j,
    "minus one": -1,
    "zero": 0,
    "true": True,
    "2^31": 1 << 31,
    "2^40": 1 << 40,
    "2^63": 1 << 63,
    "2^70": 1 << 70,
    "-2^70": -(1 << 70),
}

#: made of the good tensor
CHANGED: dict[str, Callable[[torch.Tensor], Any]] = {
    "another dimension": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t.flatten() if t.dim() != 1 else t[0],
    "wider": lambda t: torch.cat([t, t], -1),
    "longer": lambda t: torch.cat([t, t]),
    "narrower": lambda t: t[..., :-1],
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "of half": lambda t: t.to(torch.float16),
    "of int16": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "negated in place": lambda t: torch._neg_view(t.clone()) if t.dtype != torch.bool else None,
    "as an array": lambda t: t.float().numpy(),
    "as a list": lambda t: t.tolist(),
    "without memory": lambda t: Unreadable(t),
}


class Unreadable(torch.Tensor):
    """A tensor without memory that says it lies on the CPU, as DTensor and FakeTensor do."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, like: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: there is nothing to read")


def parameters(function: Any) -> list[str]:
    """Names of a callable's parameters, but for self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def odd_values(good: Any) -> Iterator[tuple[str, Any]]:
    """Odd values for a parameter whose good one is this, with their names."""
    yield from ODD.items()
    if isinstance(good, torch.Tensor):
        for name, change in CHANGED.items():
            try:
                yield name, change(good)
            except (RuntimeError, TypeError, IndexError):
                continue  # such a tensor there is not


Outcome = tuple[str, str, str]
"""("took it", "", "") or (type, argument, text)."""


def outcome_of(call: Callable[[], Any]) -> Outcome:
    """Outcome of a call. Raises what is not the library's own."""
    try:
        call()
    except ArgumentError as error:
        return type(error).__name__, error.argument, str(error)
    except DeepEPError as error:
        return type(error).__name__, "", str(error)
    return "took it", "", ""


def judge(parameter: str, call: Callable[[], Any], names: tuple[str, ...] = ()) -> tuple[Outcome | None, str]:
    """The outcome, and what is wrong with it ("": nothing). names: other arguments that may be to blame."""
    try:
        outcome = outcome_of(call)
    except BaseException as error:  # whatever it is: it is not the library's own
        return None, f"{type(error).__name__}: {str(error)[:150]}"
    kind, argument, text = outcome
    named = any(name in text.split("; allowed")[0] for name in (parameter, *names))
    if kind not in ("took it", "MismatchError") and not (argument and named):
        return outcome, f"does not name the argument: {text[:150]}"
    return outcome, ""


#: tensors that are none for whoever reads memory
NO_TENSORS = {"sparse", "negated in place", "on meta", "complex", "without memory"}
#: those of them that functions of torch alone may take: torch reads them as what they say
OF_TORCH = {"negated in place", "on meta", "without memory"}


def fits(words: set[str], name: str, value: Any) -> bool:
    """True if a value may be taken where an annotation consists of these words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds: dict[str, bool] = {
        "None": value is None,
        "bool": value is None or (isinstance(value, (bool, int, numpy.bool_)) and value in (0, 1)),
        "int": is_number and isinstance(value, int) and abs(value) < 1 << 63,
        "float": is_number and math.isfinite(value),
        "Tensor": isinstance(value, torch.Tensor) and name not in NO_TENSORS,
        "Array": isinstance(value, (torch.Tensor, numpy.ndarray)) and name not in NO_TENSORS,
        "Rows": isinstance(value, (tuple, torch.Tensor)) and name not in NO_TENSORS,
        "str": isinstance(value, str),
        "dtype": isinstance(value, torch.dtype),
        "Size": isinstance(value, (tuple, list)),
        "Collection": isinstance(value, (tuple, list, numpy.ndarray)),
        "Mapping": isinstance(value, dict),
        "Callable": callable(value),
        "Gate": callable(value),
        "Any": True,
    }
    return any(kinds.get(word, type(value).__name__ == word) for word in words)


def wrongly_taken(function: Callable[..., Any], parameter: str, name: str, value: Any) -> str:
    """The complaint about a value that was taken and is plainly wrong, or nothing."""
    annotation = inspect.signature(function).parameters[parameter].annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")
    words = set(re.findall(r"\w+", text)) - {"torch", "os"}
    return "" if fits(words, name, value) else f"took it, as {text}"


def other_value(function: Callable[..., Any], good: dict[str, Any], parameter: str, value: Any) -> str:
    """The complaint if a negated view does not give what its values in memory give, or nothing."""
    with torch.no_grad():
        got, wanted = (function(**{**good, parameter: v}) for v in (value, value.resolve_neg()))
    parts = [x if isinstance(x, tuple) else (x,) for x in (got, wanted)]
    same = all(
        torch.equal(a.float(), b.float()) for a, b in zip(*parts, strict=True) if isinstance(a, torch.Tensor)
    )
    return "" if same else "took its memory for its values"


def complaints_of(
    function: Callable[..., Any], good: dict[str, Any], is_of_torch: bool = False, names: tuple[str, ...] = ()
) -> list[str]:
    """Complaints about a local callable's answers to odd values; names: other names of its arguments."""
    function(**good)
    found = []
    for parameter in parameters(function):
        for name, value in odd_values(good.get(parameter)):
            if name == "without memory" and is_of_torch:
                continue  # torch.compile traces these functions with tensors like these
            outcome, wrong = judge(
                parameter, lambda v=value, p=parameter: function(**{**good, p: v}), (*good, *names)
            )
            if outcome is not None and outcome[0] == "took it":
                wrong = wrongly_taken(function, parameter, name, value)
                if is_of_torch and name in OF_TORCH:
                    wrong = other_value(function, good, parameter, value) if value.is_neg() else ""
            if wrong:
                found.append(f"{function.__qualname__}: {parameter} is {name}: {wrong}")
    return found
