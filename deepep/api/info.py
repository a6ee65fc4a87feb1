"""BufferInfo: what a Buffer is made of, for users to read and to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deepep.runtime.engine import Reduction

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class BufferInfo:
    """A Buffer's place, backend and settings when `info` was read. `print` shows it as a table.

    backend: "cuda", "reference", ... device: where its tensors have to be.
    rank, num_ranks: this rank and R. ranks_per_domain: ranks that `get_dispatch_layout` counts as one
        scale-up domain.
    operations: by operation, what runs it. memory: bytes this rank holds, by what for.
    timeout: seconds to wait for peers. num_sms: SMs of calls that pass no config.
    low_latency_mode, enable_shrink: as constructed. reduction: where a low-latency combine sums.
    masked_ranks: ranks left out, ascending.
    """

    backend: str
    device: torch.device
    rank: int
    num_ranks: int
    ranks_per_domain: int
    operations: Mapping[str, str]
    memory: Mapping[str, int]
    timeout: float
    num_sms: int
    low_latency_mode: bool
    enable_shrink: bool
    reduction: Reduction
    masked_ranks: tuple[int, ...]

    def __str__(self) -> str:
        domains = -(-self.num_ranks // self.ranks_per_domain)
        masked = ", ".join(map(str, self.masked_ranks)) or "none"
        lines = {
            "backend": f"{self.backend}, on {self.device}",
            "rank": f"{self.rank} of {self.num_ranks}",
            "scale-up domains": f"{domains} of up to {self.ranks_per_domain} ranks",
            **self.operations,
            **{f"memory: {name}": _readable(size) for name, size in self.memory.items()},
            "time-out": f"{self.timeout:g} s",
            "SMs": str(self.num_sms),
            "low-latency mode": "yes" if self.low_latency_mode else "no",
            "low-latency combine sums": self.reduction,
            "masked ranks": masked if self.enable_shrink else "none, and none may be (enable_shrink=False)",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _readable(num_bytes: int) -> str:
    """ "1.50 GiB" """
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{size:.2f} {_UNITS[unit]}"
