"""The demo's text: the Python standard library's own sources, as bytes,
a different part of it for every rank.
"""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

from deepep.demo.config import DemoConfig

#: Left out: large, and not present in every distribution.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
#: Taken from the sorted list of files, this much is plenty.
MAX_BYTES = 8 << 20


@lru_cache(maxsize=1)
def library_text() -> bytes:
    """The standard library's .py files, sorted by path and joined.

    Raises FileNotFoundError if there are next to none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts))
    parts, size = [], 0
    for file in files:
        parts.append(file.read_bytes())
        size += len(parts[-1])
        if size >= MAX_BYTES:
            break
    if size < 1 << 20:
        raise FileNotFoundError(f"{root} holds only {size} bytes of .py files; the demo trains on them")
    return b"".join(parts)


class TextShard:
    """One rank's contiguous part of the text, and the batches it trains on.

    Parts differ in kind (the asyncio package here, character tables there), as they do in real
    data-parallel runs, so ranks differ in the experts they want.
    """

    def __init__(self, config: DemoConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        text = library_text()
        size = len(text) // config.num_ranks
        self.bytes = torch.frombuffer(bytearray(text[rank * size : (rank + 1) * size]), dtype=torch.uint8)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next bytes, [sequences, context] int64 each; a function of (seed, step, rank)."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step * 1009 + self.rank)
        last_start = len(self.bytes) - config.context - 1
        starts = torch.randint(last_start + 1, (config.sequences, 1), generator=generator)
        window = self.bytes[starts + torch.arange(config.context + 1)].long()
        return window[:, :-1], window[:, 1:]
