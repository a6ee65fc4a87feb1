"""Operators of this library in torch: the Python function, its schema, its fake implementation, its gradient.

`torch.library.custom_op` does the same and imports the compiler at the first eager call, which costs every
rank process seconds; these are the functions below it.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
#: Of this library alone: torchtitan defines `deepep::dispatch` and `deepep::combine` for itself.
NAMESPACE = "deepep_nn"


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_SCALARS = frozenset((int, bool, float, type(None)))


def _is_plain(arg: object) -> bool:
    """True for what needs no dispatcher: no subclass of a tensor, such as a DTensor, and no meta tensor."""
    if isinstance(arg, Tensor):
        return type(arg) in _TENSORS and not arg.is_meta
    return type(arg) in _SCALARS


def _is_watched() -> bool:
    """True where torch does something else with operators than to run them: modes, transforms, profiles."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


class Operator(Generic[P, T]):
    """`torch.ops.deepep_nn.<name>`, callable with the types of the function it was made of."""

    def __init__(self, name: str, function: Callable[P, T], mutates: tuple[str, ...] = ()) -> None:
        self.qualified_name = f"{NAMESPACE}::{name}"
        self.__doc__ = function.__doc__
        self.function = function
        self._defaults = tuple(p.default for p in signature(function).parameters.values())
        self._differentiable: Any = None
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(self.qualified_name, schema)
        torch.library.impl(self.qualified_name, "default", function)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        # The way through torch's dispatcher costs tens of microseconds, and where nothing is traced or
        # transformed it leads to this function: by way of one like `_differentiable`, if there are gradients.
        if torch.compiler.is_compiling() or _is_watched() or kwargs:
            return self.overload(*args, **kwargs)
        if not all(_is_plain(arg) for arg in args):
            return self.overload(*args, **kwargs)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            return self.function(*args, **kwargs)
        if self._differentiable is None:
            return self.overload(*args, **kwargs)
        result: T = self._differentiable.apply(*args, *self._defaults[len(args) :])
        return result

    def register_fake(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function that makes outputs of the right shape and dtype without computing them."""
        torch.library.register_fake(self.qualified_name, function)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """As `torch.library.register_autograd`: backward(ctx, *grads), setup_context(ctx, inputs, output)."""
        torch.library.register_autograd(self.qualified_name, backward, setup_context=setup_context)
        function: Callable[..., Any] = self.function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(self.qualified_name, (torch.autograd.Function,), body)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, T]], Operator[P, T]]:
    """Makes an operator of a function of tensors, ints, floats and bools.

    The function aliases none of its inputs and changes only those in `mutates`.
    """
    return lambda function: Operator(name, function, mutates)
