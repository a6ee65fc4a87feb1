"""Labels of calls in profiles: torch.profiler's, and NVTX ranges.

Off unless somebody looks: while a profile of torch is taken in this thread (also torch's `emit_nvtx`), or
with DEEPEP_NVTX=1 in the environment, for `nsys profile`. Otherwise a call costs one question more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._autograd import _profiler_enabled

Result = TypeVar("Result")
Given = ParamSpec("Given")
_NVTX = os.environ.get("DEEPEP_NVTX", "") not in ("", "0")


class _Inside(threading.local):
    """State of a thread: True in a call that has its label already."""

    on = False


inside = _Inside()
is_profiled: Callable[[], bool] = (lambda: True) if _NVTX else _profiler_enabled
"""True if calls are labelled: a function of torch itself, so that asking costs next to nothing."""


def labelled(method: Callable[..., Result], arguments: Mapping[str, Any]) -> Result:
    """Calls a method, given its own `locals()`, under the label "deepep.<name>"; a hook that it returns runs
    under "deepep.<name>.hook".
    """
    given = {name: value for name, value in arguments.items() if not name.startswith("__")}
    name = f"deepep.{method.__name__}"
    with _inside(name):
        result: Any = method(**given)
    if getattr(result, "hook", None) is not None:
        result = result._replace(hook=_hook(name, result.hook))
    labelled_result: Result = result
    return labelled_result


def with_label(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """A method that runs under its label while somebody looks; what it returns to be called later, alone or
    at a tuple's end, runs under "deepep.<name>.hook". For calls that need not be the fastest: it is one
    function more.
    """

    @wraps(method)
    def call(*words: Given.args, **named: Given.kwargs) -> Result:
        if not is_profiled() or inside.on:
            return method(*words, **named)
        name = f"deepep.{method.__name__}"
        with _inside(name):
            result: Any = method(*words, **named)
        if callable(result):
            result = _hook(name, result)
        elif type(result) is tuple and result and callable(result[-1]):
            result = (*result[:-1], _hook(name, result[-1]))
        labelled_result: Result = result
        return labelled_result

    return call


@contextmanager
def _inside(name: str) -> Iterator[None]:
    with label(name):
        inside.on = True
        try:
            yield
        finally:
            inside.on = False


def _hook(name: str, hook: Callable[[], Any]) -> Callable[[], Any]:
    def labelled_hook() -> Any:
        with label(f"{name}.hook"):
            return hook()

    return labelled_hook


@contextmanager
def label(name: str) -> Iterator[None]:
    """A range of this name, in torch's profile, and in NVTX where that was asked for."""
    pushes = _NVTX and torch.version.cuda is not None
    if pushes:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if pushes:
            torch.cuda.nvtx.range_pop()
