"""Compute capabilities: the GPUs that the kernels of this installation run on.

Kernels are compiled for one or several (DEEPEP_CUDA_ARCHS, setup.py), and the driver takes what fits each
rank's GPU. So ranks of a group may have GPUs of different ones, and one installation may serve them all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache


@cache
def compiled() -> tuple[str, ...]:
    """Capabilities of the kernels, as DEEPEP_CUDA_ARCHS named them; () where there are no kernels."""
    try:
        from deepep import _cuda
    except ImportError:
        return ()
    return tuple(_cuda.ARCHS.split())


def can_run(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """True if code for one of `archs` ("8.0", "9.0a", "8.0+PTX") runs on a GPU of this compute capability.

    By CUDA's rules: machine code runs on GPUs of its major version from its minor one on, with an "a" behind
    it on no other GPU; PTX is compiled by the driver for any newer GPU.
    """
    for arch in archs:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            continue
        least = (int(found[1]), int(found[2]))
        if found[3] == "a":
            runs = capability == least
        else:
            runs = capability >= least and (capability[0] == least[0] or found[4] is not None)
        if runs:
            return True
    return False
