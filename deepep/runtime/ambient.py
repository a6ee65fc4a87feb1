"""Ambient modes of torch: what the caller has set for its own work must change nothing of what is returned.

Default device: every tensor that the library makes names its device (tests/house/test_devices.py). Default
dtype: and its dtype, where it is no integer's. Inference mode, gradients, autocast: here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from deepep.runtime.labels import inside, is_profiled, labelled


def plainly(method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls `method` outside of inference mode, under its label while a profile is taken (labels.py).
    arguments: all of it by name, `self` as well.

    Memory is made now and used by later calls, in whatever mode those are: what is made in inference mode
    could not be written, resized or saved for a backward outside of it.
    """
    plain = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with plain:
        if is_profiled() and not inside.on:
            return labelled(method, arguments)
        return method(**arguments)


@contextlib.contextmanager
def job_modes() -> Iterator[None]:
    """Modes of a job of the communication queue, on whichever thread it runs.

    Nothing there is differentiated; and what the caller made in inference mode may be written only in
    inference mode, where all else may be written as well. Sums have the dtype they are written with.
    """
    with torch.inference_mode():
        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
