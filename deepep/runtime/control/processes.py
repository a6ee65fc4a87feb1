"""Forks of a rank's process: what a child inherits of the library is its parent's, and is let alone."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any

_living: weakref.WeakSet[Any] = weakref.WeakSet()


def leak_in_children(owner: Any) -> None:
    """In children forked from now on, calls `owner.forked()`, and frees `owner` in none of them.

    A child shares its parent's epoll sets: connections that it closed would end those of the parent.
    """
    _living.add(owner)


def weak_method(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function that calls a bound method as long as its object lives, and does not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call(argument: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(argument)

    return call


def only_here(function: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `function` in this process, and does nothing in its forks."""
    creator = os.getpid()

    def call() -> None:
        if os.getpid() == creator:
            function()

    return call


def _in_child() -> None:
    for owner in list(_living):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))
        owner.forked()


os.register_at_fork(after_in_child=_in_child)
