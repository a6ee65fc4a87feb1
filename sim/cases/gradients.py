"""Drawn gradients: float32 values with everything that a sum of ranks or a number format may stumble over."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ("any bits", "one scale", "many scales", "specials", "ties", "denormals", "normal")
_SPECIALS = (np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 448.0, 449.0, 65504.0)


def draw_gradient(rng: np.random.Generator, count: int, kind: str = "") -> Tensor:
    """[count] float32 of a kind, drawn as well if not given."""
    kind = kind or KINDS[int(rng.integers(len(KINDS)))]
    normal = rng.standard_normal(count).astype(np.float32)
    if kind == "any bits":
        values = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    elif kind == "one scale":
        values = normal * np.float32(10.0 ** rng.integers(-44, 38))
    elif kind == "many scales":
        values = normal * np.exp2(rng.integers(-40, 10, count)).astype(np.float32)
    elif kind == "specials":
        values = normal
        for special in _SPECIALS if count else ():
            if rng.random() < 0.3:
                values[rng.integers(count)] = special
    elif kind == "ties":  # half-way between codes, of every format
        values = (rng.integers(-4096, 4096, count) * 2.0**-12).astype(np.float32)
    elif kind == "denormals":
        low = rng.integers(0, 1 << 23, count, dtype=np.uint32)
        high = rng.integers(0, 3, count, dtype=np.uint32) << 23
        values = (low | high).view(np.float32)
    else:
        values = normal
    return torch.from_numpy(values.copy())
