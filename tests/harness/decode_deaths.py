"""A process is killed somewhere in decoding, and the others go on in low latency without its rows.

Every survivor's results are judged bit for bit by what it has masked itself: received rows by its mask behind
the dispatch, sums by that behind the combine. At the end all have masked the dead rank, and no other.

Only public calls of Buffer: any backend. tests/backends/cuda runs it on GPUs, tests/sim without.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from deepep.reference import low_latency as oracle
from deepep.sim import World
from deepep.sim.worlds.outcomes import Status
from harness.low_latency_trips import LowLatencyShape, bits, prepare

RANKS = 3
PATIENCE = 120.0
#: Steps before the one that the victim may die in; steps that the others make with it and after it.
BEFORE, AFTER = 2, 5
#: Of a step; and somewhere in one or the next, by a clock.
POINTS = (
    "dispatch",
    "dispatch's hook",
    "combine",
    "combine's hook",
    "dispatch of one launch",
    "combine of one launch",
    "some moment",
)
#: Seconds from the beginning of its last steps within which a victim that dies at some moment is killed.
MOMENTS = 0.05


@dataclass(frozen=True)
class DecodeDeath:
    """A death: before this point, of this rank. seed: of the steps' inputs, and of the moment."""

    point: str
    victim: int
    seed: int

    def __str__(self) -> str:
        return f"{self.point}, rank {self.victim}, {self.seed}"


def decode_deaths(count: int) -> list[DecodeDeath]:
    """So many, over all points and ranks in turn."""
    return [DecodeDeath(POINTS[i % len(POINTS)], i // len(POINTS) % RANKS, 100 * i) for i in range(count)]


class Scene:
    """Processes that survive, one a rank; each death has a victim of its own, which wakes up meanwhile."""

    def __init__(self, cuda: bool, shape: LowLatencyShape, timeout: float) -> None:
        self._how = cuda, shape, timeout
        self._worlds = [World(1, timeout=2 * PATIENCE) for _ in range(RANKS)]

    def play(self, death: DecodeDeath) -> None:
        """Raises AssertionError where a promise was not kept."""
        with TemporaryDirectory(prefix="deepep-decode-", ignore_cleanup_errors=True) as folder:
            running = [
                world.submit(decode, rank, death, folder, *self._how, timeout=PATIENCE)
                for rank, world in enumerate(self._worlds)
            ]
            ends = [pending.outcomes()[0] for pending in running]
        self._worlds[death.victim].discard()
        self._worlds[death.victim] = World(1, timeout=2 * PATIENCE)
        lived = [(r, end) for r, end in enumerate(ends) if r != death.victim]
        problems = [f"rank {r}: {end.describe()}" for r, end in lived if not end.ok]
        assert not problems, f"{death}: " + "\n".join(problems)
        end = ends[death.victim]
        assert end.status is Status.DIED, f"{death}: the victim was not killed: {end.describe()}"
        assert end.exitcode == -signal.SIGKILL, f"{death}: {end.describe()}"

    def clear(self) -> None:
        """Ends all processes."""
        for world in self._worlds:
            world.discard()


def decode(
    ctx: Any, rank: int, death: DecodeDeath, folder: str, cuda: bool, shape: LowLatencyShape, timeout: float
) -> None:
    """One rank's steps. Its victim does not return."""
    torch.set_num_threads(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["DEEPEP_DEVICE"] = "cuda" if cuda else "cpu"
    device = torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    import deepep

    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE)
    )
    buffer = deepep.Buffer(
        dist.group.WORLD,
        low_latency_mode=True,
        enable_shrink=True,
        backend="cuda" if cuda else "reference",
        timeout=timeout,
    )
    steps = Steps(buffer, shape, device, death if rank == death.victim else None)
    for step in range(BEFORE + AFTER):
        steps.run(step, death.seed + step, hooked=step % 2 == 1 or not death.point.endswith("launch"))
    assert steps.masked() == (death.victim,), f"masked at the end: {steps.masked()}"
    buffer.destroy()
    dist.destroy_process_group()


def experts(received: torch.Tensor, rank: int) -> torch.Tensor:
    """[L, R*M, H] bf16: outputs of experts. They depend on the row and the expert, not on the row's place."""
    local = received.shape[0]
    scale = torch.arange(1 + rank * local, 1 + (rank + 1) * local, device=received.device)
    return (received.float() * scale.view(local, 1, 1)).to(torch.bfloat16)


def sums_of(shape: LowLatencyShape, seed: int, masked: tuple[int, ...]) -> list[torch.Tensor]:
    """[T, H] bf16 of each rank: what such a step gives without these ranks."""
    case = prepare(shape, seed, masked)
    rows = [experts(layout.recv_x, rank) for rank, layout in enumerate(case.layouts)]
    _, idx, weights = (list(each) for each in zip(*case.inputs, strict=True))
    return oracle.combine(
        *(rows, idx, weights, case.layouts),
        num_max_tokens=shape.num_max_tokens,
        num_experts=shape.num_experts,
        masked=masked,
        reduce="rank",
    )


class Steps:
    """A rank's decoding steps. death: its own, if it is to die."""

    def __init__(
        self, buffer: Any, shape: LowLatencyShape, device: torch.device, death: DecodeDeath | None
    ) -> None:
        self._buffer, self._shape, self._device, self._death = buffer, shape, device, death
        self._status = torch.zeros(RANKS, dtype=torch.int32, device=device)

    def masked(self) -> tuple[int, ...]:
        """The ranks that this one has masked."""
        self._buffer.low_latency_query_mask_buffer(self._status)
        return tuple(self._status.nonzero().flatten().tolist())

    def run(self, step: int, seed: int, *, hooked: bool) -> None:
        """A dispatch and a combine, both judged."""
        buffer, rank = self._buffer, self._buffer.rank
        shape = replace(self._shape, with_weights=step % 3 != 2)
        x, idx, weights = (t.to(self._device) for t in prepare(shape, seed).inputs[rank])
        self._arm(step)
        self._at(step, "dispatch", "dispatch of one launch")
        received, count, handle, _, hook = buffer.low_latency_dispatch(
            *(x, idx, shape.num_max_tokens, shape.num_experts),
            use_fp8=False,
            topk_weights=weights if shape.with_weights else None,
            return_recv_hook=hooked,
        )
        self._at(step, "dispatch's hook")
        if hook is not None:
            hook()
        layout = prepare(shape, seed, self.masked()).layouts[rank]
        assert torch.equal(count.cpu(), layout.recv_count), f"step {step}: counts"
        for expert, n in enumerate(count.tolist()):
            rows = received[expert, :n]
            assert torch.equal(bits(rows), bits(layout.recv_x[expert, :n])), f"step {step}: rows"
        self._at(step, "combine", "combine of one launch")
        sums, _, hook = buffer.low_latency_combine(
            experts(received, rank), idx, weights, handle, return_recv_hook=hooked
        )
        self._at(step, "combine's hook")
        if hook is not None:
            hook()
        wanted = sums_of(shape, seed, self.masked())[rank]
        assert torch.equal(bits(sums), bits(wanted)), f"step {step}: sums"

    def _arm(self, step: int) -> None:
        """Has this process killed at some moment, if that is how it dies."""
        death = self._death
        if death is None or death.point != "some moment":
            return
        if step == BEFORE:
            moment = random.Random(death.seed).uniform(0, MOMENTS)
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif step == BEFORE + 2:
            threading.Event().wait()  # its time comes

    def _at(self, step: int, *points: str) -> None:
        if self._death is not None and step == BEFORE and self._death.point in points:
            os.kill(os.getpid(), signal.SIGKILL)
