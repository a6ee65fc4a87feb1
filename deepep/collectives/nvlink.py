"""NvlinkReducer: all-reduces of CUDA tensors over symmetric memory, by this library's own kernels.

Each rank maps the memory of all others (CUDA IPC), so they have to be on one host. The kernels are those of
csrc/kernels/all_reduce: one round up to `ONESHOT_BYTES`, else two; encoding, sums and decoding in them. Bits
are those of the schedule "direct".
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from deepep.collectives.codecs import BLOCK, FIXED, LOSSY, PLAIN, num_blocks, rounding_key
from deepep.collectives.schedules import ADDEND, ANYBODY, RESULT
from deepep.runtime.control.transport import Link, LinkError, gather_bytes, transport

ONESHOT_BYTES = 256 << 10
"""Of a message that every rank sends whole to every other."""
ROOM = 32 << 20
"""Bytes that a rank's messages of a launch take, in two rounds and two places each: 128 MiB a rank."""
MOST_BLOCKS, WARPS = 32, 16
"""Blocks of a launch, which hold an SM each, and warps of a block."""
DTYPES = (torch.float32, torch.bfloat16)
_FAR = 1 << 30  # epochs ahead of any that is waited for

_left: list[object] = []
"""Memory that peers' kernels may still write to, after a fault: kept until the process ends."""


class NvlinkReducer:
    """One rank's part. `open` makes it."""

    def __init__(self, heap: Any, rank: int, device: torch.device, timeout: float) -> None:
        kernels: Any = importlib.import_module("deepep._cuda")
        self._kernels, self._heap, self.rank = kernels, heap, rank
        self.num_ranks = len(heap.mapped)
        self._state = torch.zeros(kernels.ALL_REDUCE_STATE_WORDS, dtype=torch.int32, device=device)
        self._missing = torch.zeros(1, dtype=torch.int32, device="cpu").pin_memory()
        self._launches = 0
        self._reduce = kernels.AllReduce(
            rank=rank,
            heaps=heap.addresses,
            pair_bytes=_pair_bytes(self.num_ranks),
            state=self._state.data_ptr(),
            host_missing=self._missing.data_ptr(),
            timeout_seconds=timeout,
        )

    @classmethod
    def open(cls, link: Link, device: torch.device, timeout: float) -> NvlinkReducer | None:
        """Maps the memory of a link's members; None, on all of them, where one cannot. Collective.

        link: of words on the host. timeout: seconds that a kernel waits for a peer.
        """
        from deepep.backends.cuda.memory.ipc import export_heap, map_heaps

        heap, mine, problem = None, b"", False
        rank, num_ranks = link.members.index(link.rank), len(link.members)
        try:
            kernels: Any = importlib.import_module("deepep._cuda")
            size = kernels.all_reduce_bytes(num_ranks, _pair_bytes(num_ranks))
            memory = torch.empty(size, dtype=torch.uint8, device=device)
            memory[: kernels.all_reduce_control_bytes(num_ranks)].zero_()
            mine = export_heap(memory)
        except (ImportError, RuntimeError):
            problem = True
        with transport():
            exported = gather_bytes(link.group, mine)
        if not problem and all(exported):
            try:
                heap = map_heaps(memory, rank, list(exported))
            except (RuntimeError, ValueError):
                problem = True
        # Nobody pushes before all have mapped; and nobody does if one could not.
        failed = link.all_gather(torch.tensor([problem or heap is None], dtype=torch.uint8, device="cpu"))
        if heap is None or any(bool(flag.item()) for flag in failed.values()):
            return None
        return cls(heap, rank, device, timeout)

    def all_reduce(self, out: Tensor, codec: str, divisor: int, dice: tuple[int, int, int] | None) -> int:
        """Replaces `out` [N] by its sum over the ranks, divided, on the current stream; bytes sent.

        Raises LinkError if a rank was waited for in vain in a call before.
        """
        self.check()
        form = codec if codec in LOSSY else PLAIN
        is_bf16 = out.dtype == torch.bfloat16
        keys: list[int] = []
        if codec in LOSSY and dice is not None:
            keys = [*rounding_key(*dice, self.rank, ADDEND), *rounding_key(*dice, ANYBODY, RESULT)]
        block_bytes = self._kernels.all_reduce_block_bytes(form, is_bf16)
        is_oneshot = num_blocks(out.numel()) * block_bytes <= ONESHOT_BYTES
        chunk = _pair_bytes(self.num_ranks) // block_bytes * (1 if is_oneshot else self.num_ranks) * BLOCK
        stream, sent = torch.cuda.current_stream(out.device).cuda_stream, 0
        for begin in range(0, out.numel(), chunk):
            count = min(chunk, out.numel() - begin)
            parts = num_blocks(count) if is_oneshot else -(-num_blocks(count) // self.num_ranks)
            self._reduce.launch(
                tensor=out.data_ptr() + begin * out.itemsize,
                count=count,
                is_bf16=is_bf16,
                is_oneshot=is_oneshot,
                format=form,
                is_fixed=codec == FIXED,
                divisor=float(divisor),
                keys=keys,
                first_index=begin,
                num_blocks=max(1, min(MOST_BLOCKS, -(-parts // WARPS))),
                stream=stream,
            )
            self._launches += 1
            sent += (1 if is_oneshot else 2) * (self.num_ranks - 1) * parts * block_bytes
        return sent

    def check(self) -> None:
        """Raises LinkError if a kernel has waited for a rank in vain; those after it do nothing."""
        missing = int(self._missing.item())
        if missing:
            places = [rank for rank in range(self.num_ranks) if missing >> rank & 1]
            raise LinkError(f"all-reduce in symmetric memory: members {places} did not come in time")

    def release(self) -> None:
        """Ends what kernels of this rank wait for, after a fault: as if all peers had come, so what is under
        way has no result. Its memory stays, since peers' kernels may write to it.
        """
        _left.append(self._heap)
        flags = self._heap.own[: self._kernels.all_reduce_control_bytes(self.num_ranks)].view(torch.int32)
        with torch.cuda.stream(torch.cuda.Stream(device=flags.device)):
            flags.fill_(self._launches + _FAR)


def _pair_bytes(num_ranks: int) -> int:
    return ROOM // num_ranks
