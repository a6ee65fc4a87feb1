"""Registering an operator with torch: the Python function, its schema, its fake implementation, its gradient.

`torch.library.custom_op` does the same and imports the compiler at the first eager call, which costs every
rank process seconds; these are the functions below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
NAMESPACE = "deepep"


class Operator(Generic[P, T]):
    """`torch.ops.deepep.<name>`, callable with the types of the function it was made of."""

    def __init__(self, name: str, function: Callable[P, T]) -> None:
        self.qualified_name = f"{NAMESPACE}::{name}"
        self.__doc__ = function.__doc__
        torch.library.define(self.qualified_name, torch.library.infer_schema(function, mutates_args=()))
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


def operator(name: str) -> Callable[[Callable[P, T]], Operator[P, T]]:
    """Makes an operator of a function of tensors, ints, floats and bools that mutates and aliases none of
    its inputs.
    """
    return lambda function: Operator(name, function)
