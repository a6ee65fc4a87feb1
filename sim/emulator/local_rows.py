"""Received rows to the rows of their lanes, and back, by the kernels of csrc/kernels/rows on the CPU.

A machine of one rank for each launch, under a schedule that follows from the seed and the launch's number.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from deepep import _emulator
from deepep.runtime.local_rows import LocalRows
from deepep.sim.emulator import shapes
from deepep.sim.emulator.leader import EmulatedFailure

#: shared memory of a launch: more than any of the kernels needs
_SHARED_BYTES = 8192
_WARPS = 2
_BLOCKS = 3


class EmulatedRows(LocalRows):
    """See the module. `seed`: DEEPEP_EMULATOR_SEED."""

    def __init__(self) -> None:
        self._seed = int(os.environ.get("DEEPEP_EMULATOR_SEED", "0"))
        self._launches = 0

    def sort(self, topk_idx: Tensor, slots: Tensor, counts: Tensor) -> None:
        num_local, ends = counts.shape[0], torch.empty_like(counts)
        run = _Launch(self._number(), num_local)
        run.launch(
            "sort_pairs",
            _emulator.sort_pairs_args(
                topk_idx=run.put(topk_idx),
                index_bytes=topk_idx.element_size(),
                num_local_experts=num_local,
                num_entries=topk_idx.numel(),
                num_pairs=topk_idx.numel(),
                pairs=run.room(8 * topk_idx.numel()),
                slots=(at := run.room(8 * topk_idx.numel())),
                ends=(ends_at := run.room(4 * num_local)),
            ),
        )
        run.read(at, slots)
        run.read(ends_at, ends)
        counts.copy_(ends.diff(prepend=ends.new_zeros(1)))

    def spread(self, x: Tensor, slots: Tensor, out: Tensor) -> None:
        if not slots.shape[0]:
            return
        run = _Launch(self._number(), _BLOCKS)
        at = run.put(out)
        run.launch("spread_rows", _emulator.spread_rows_args(**_span(run, slots, x), x=run.put(x), out=at))
        run.read(at, out)

    def reduce(self, y: Tensor, slots: Tensor, out: Tensor, biases: tuple[Tensor, ...] = ()) -> None:
        if biases or y.dtype != torch.bfloat16:
            super().reduce(y, slots, out, biases)
        elif slots.shape[0]:
            run = _Launch(self._number(), _BLOCKS)
            at = run.room(2 * out.numel())
            run.launch(
                "reduce_rows",
                _emulator.reduce_rows_args(**_span(run, slots, y), y=run.put(y), weights=0, out=at),
            )
            run.read(at, out)

    def _number(self) -> int:
        self._launches += 1
        return self._seed * 1_000_003 + self._launches


class _Launch:
    """One kernel on a machine of its own."""

    def __init__(self, number: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._machine = _emulator.Machine(
            num_ranks=1,
            max_blocks=num_blocks,
            max_threads=32 * _WARPS,
            strategy=shapes.STRATEGIES[number % len(shapes.STRATEGIES)],
            seed=number,
            max_steps=10**9,
        )

    def room(self, num_bytes: int) -> int:
        """The address of so many bytes that nobody has written."""
        return self._machine.allocate("rows", "device", 0, max(16, num_bytes))

    def put(self, values: Tensor) -> int:
        """The address of a tensor's values."""
        at = self.room(values.numel() * values.element_size())
        if values.numel():
            self._machine.write(0, at, values.contiguous().view(torch.uint8).numpy().tobytes())
        return at

    def launch(self, kernel: str, args: bytes) -> None:
        """Runs it to the end."""
        threads = 32 * _WARPS
        self._machine.launch(
            0, f"{kernel}_kernel", args, self._num_blocks, threads, _SHARED_BYTES, _emulator.own_kernels()
        )
        outcome = self._machine.run()
        if outcome.status == "failed":
            raise EmulatedFailure(f"{kernel}: {outcome.kind}: {outcome.text}")
        self._machine.meet()

    def read(self, at: int, out: Tensor) -> None:
        """Reads what is at an address into `out`."""
        if out.numel():
            raw = self._machine.read(0, at, out.numel() * out.element_size())
            flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            out.copy_(flat.view(out.dtype).view(out.shape))


def _span(run: _Launch, slots: Tensor, rows: Tensor) -> dict[str, int]:
    num_rows, num_topk = slots.shape
    row_bytes = rows.shape[1] * rows.element_size()
    return {"num_rows": num_rows, "row_bytes": row_bytes, "num_topk": num_topk, "slots": run.put(slots)}
