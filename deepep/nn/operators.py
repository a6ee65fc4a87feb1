"""Operators of this library in torch: the Python function, its schema, its fake implementation, its gradient.

`torch.library.custom_op` does the same and imports the compiler at the first eager call, which costs every
rank process seconds; these are the functions below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
#: Of this library alone: torchtitan defines `deepep::dispatch` and `deepep::combine` for itself.
NAMESPACE = "deepep_nn"


class Operator(Generic[P, T]):
    """`torch.ops.deepep_nn.<name>`, callable with the types of the function it was made of."""

    def __init__(self, name: str, function: Callable[P, T], mutates: tuple[str, ...] = ()) -> None:
        self.qualified_name = f"{NAMESPACE}::{name}"
        self.__doc__ = function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(self.qualified_name, schema)
        torch.library.impl(self.qualified_name, "default", function)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function that makes outputs of the right shape and dtype without computing them."""
        torch.library.register_fake(self.qualified_name, function)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """As `torch.library.register_autograd`: backward(ctx, *grads), setup_context(ctx, inputs, output)."""
        torch.library.register_autograd(self.qualified_name, backward, setup_context=setup_context)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, T]], Operator[P, T]]:
    """Makes an operator of a function of tensors, ints, floats and bools.

    The function aliases none of its inputs and changes only those in `mutates`.
    """
    return lambda function: Operator(name, function, mutates)
