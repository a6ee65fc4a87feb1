"""Labels of calls in profiles: torch.profiler's, and NVTX ranges.

Off unless somebody looks: while a profile of torch is taken in this thread (also torch's `emit_nvtx`), or
with DEEPEP_NVTX=1 in the environment, for `nsys profile`. Otherwise a call costs one question more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C._autograd import _profiler_enabled

Result = TypeVar("Result")
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
    with label(name):
        inside.on = True
        try:
            result = method(**given)
        finally:
            inside.on = False
    hook = getattr(result, "hook", None)
    if hook is None:
        return result

    def labelled_hook() -> None:
        with label(f"{name}.hook"):
            hook()

    replaced: Result = result._replace(hook=labelled_hook)  # type: ignore[attr-defined]
    return replaced


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
