"""Shapes of launches and strategies of schedules: what the emulator's users take turns with."""

from __future__ import annotations

from deepep.sim.emulator.calls import Gpu

#: Strategies of the scheduler, csrc/emulator/run/scheduler.hpp.
STRATEGIES = ("random", "pct", "starve")

#: Launch shapes: one block with both roles, a block a role, roles that overlap, several blocks, fewer SMs
#: than blocks, blocks that do both in a combine where rows are few, copy engines that return the rows.
GPUS = (
    Gpu(num_blocks=2, num_threads=64, push_blocks=1, local_blocks=1),
    Gpu(num_blocks=1, num_threads=64, push_blocks=1, local_blocks=1),
    Gpu(num_blocks=2, num_threads=128, push_blocks=2, local_blocks=2),
    Gpu(num_blocks=3, num_threads=64, push_blocks=1, local_blocks=2),
    Gpu(num_blocks=4, num_threads=64, push_blocks=2, local_blocks=2),
    Gpu(num_blocks=3, num_threads=64, push_blocks=2, local_blocks=1, num_sms=1),
    Gpu(num_blocks=3, num_threads=64, push_blocks=1, local_blocks=2, reduce_blocks=3),
    Gpu(num_blocks=2, num_threads=64, push_blocks=1, local_blocks=1, ce_chunks=2),
    Gpu(
        num_blocks=3,
        num_threads=64,
        push_blocks=1,
        local_blocks=2,
        num_sms=1,
        ce_chunks=4,
        engine_shrink=57,
    ),
)

#: Between domains: two blocks, one, wide ones, and fewer SMs than blocks; windows of one chunk and of two.
TWO_LEVEL_GPUS = (
    Gpu(num_blocks=2, num_threads=64),
    Gpu(num_blocks=1, num_threads=64, window=32),
    Gpu(num_blocks=2, num_threads=128),
    Gpu(num_blocks=4, num_threads=64, num_sms=2),
)
