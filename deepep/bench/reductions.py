"""All-reduces of gradients as one rank measures them: this library's beside torch's, in one run, in turn.

On CUDA a sample is the time between two events of the slowest rank's stream, of a reduction that needs no
word between the hosts (`Communicator.continue_with`), as all buckets of a backward but the first; on the CPU
it is the caller's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.collectives import Communicator, ReductionPlan
from deepep.collectives.codecs import FIXED as FIXED32
from deepep.collectives.codecs import LOSSY
from deepep.errors import PeerTimeoutError
from deepep.parallel.config import ParallelConfig
from deepep.parallel.planning import plan_of, table_of

TORCH, TORCH_BF16 = "torch fp32", "torch bf16"
"""torch.distributed's all_reduce (NCCL, gloo) of as many elements, in float32 and in bfloat16."""
AUTO, FIXED, FP8 = "auto", "auto, reproducible", "auto, fp8"
"""What the options choose without compression, in the order of sums that a schedule has; with
`reproducible=True`, the default; with FP8.
"""
KERNELS = {"nvlink": "plain", "nvlink, reproducible": FIXED32, "nvlink, fp8": "fp8"}
"""This library's kernels over symmetric memory, by codec, on CUDA."""
HEAD_START_CYCLES = 400_000
"""That the device is kept busy before a sample, so that the host has launched all of it by then."""
DRAWN = 24


@dataclass
class ReductionTimes:
    """Seconds of the slowest rank, by bytes of float32, then by way: one for each round. plans: in words."""

    device: str
    ranks: int
    shares_gpus: bool
    absent: str = ""
    seconds: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    plans: dict[int, dict[str, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def measure_reductions(
    group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int], rounds: int, drawn: int = DRAWN
) -> ReductionTimes:
    """Compares results with the oracle's on the CPU, then times all ways. Collective; the same on every rank.

    sizes: bytes of float32. drawn: cases to compare beside the plans that are timed.
    """
    from deepep.sim.rules.reductions import differing_plans, failing_reductions

    is_cuda = device.type == "cuda"
    shares = is_cuda and group.size() > torch.cuda.device_count()
    found = ReductionTimes(device.type, group.size(), shares)
    found.absent = _absence_of_torchs(group, device)
    with Communicator(group, device=device, timeout=300.0) as comm:
        ways = {AUTO: ("off", False), FIXED: ("off", True), FP8: ("fp8", True)}
        chosen: dict[int, dict[str, ReductionPlan]] = {size: {} for size in sizes}
        for way, (compression, reproducible) in ways.items():
            config = ParallelConfig(compression=compression, reproducible=reproducible)
            table = table_of(comm, config)
            for size in sizes:
                plan = plan_of(config, size, torch.float32, comm.hosts, device.type, table=table)
                chosen[size][way] = plan.for_ranks(comm.num_ranks)
        for way, codec in KERNELS.items() if is_cuda else ():
            for size in sizes:
                chosen[size][way] = ReductionPlan("nvlink", codec).for_ranks(comm.num_ranks)
        every_plan = {plan for of_size in chosen.values() for plan in of_size.values()}
        here = SimpleNamespace(group=group, rank=group.rank(), num_ranks=group.size())
        wrong = differing_plans(comm, sorted(every_plan, key=repr))
        wrong += failing_reductions(here, range(drawn), device.type)
        everywhere = comm.gather([float(len(wrong))])
        found.wrong = wrong or [f"rank {r}: {n[0]:.0f} results" for r, n in enumerate(everywhere) if n[0]]
        for size in sizes:
            found.plans[size] = {way: _words(plan) for way, plan in chosen[size].items()}
            found.seconds[size] = _timed(comm, group, device, size, chosen[size], rounds, found.absent)
    return found


def _timed(
    comm: Communicator,
    group: dist.ProcessGroup,
    device: torch.device,
    size: int,
    plans: dict[str, ReductionPlan],
    rounds: int,
    absent: str,
) -> dict[str, list[float]]:
    values = torch.zeros(max(size // 4, 1), device=device)
    narrow = torch.zeros(max(size // 4, 1), dtype=torch.bfloat16, device=device)
    ways: dict[str, Callable[[], object]] = {}
    if not absent:
        ways[TORCH] = lambda: dist.all_reduce(values, group=group)
        ways[TORCH_BF16] = lambda: dist.all_reduce(narrow, group=group)
    ways.update({way: _reduction(comm, values, plan) for way, plan in plans.items()})
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first is for what is allocated and connected on the way
        for way, run in ways.items():
            comm.gather([0.0])
            mine = _sample(run, device)
            slowest = max(row[0] for row in comm.gather([mine]))
            if number:
                times[way].append(slowest)
    return times


def _reduction(comm: Communicator, values: Tensor, plan: ReductionPlan) -> Callable[[], object]:
    dice = (0, 1, 2) if plan.codec in LOSSY else None

    def run() -> None:
        pending = comm.continue_with(values, plan, mean=False, dice=dice, unless=lambda: False)
        pending.wait()

    return run


def _sample(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _absence_of_torchs(group: dist.ProcessGroup, device: torch.device) -> str:
    """Reason for which torch's own all-reduce does not run here, or nothing: the same on all ranks."""
    try:
        tensor = torch.ones(1, device=device)
        dist.all_reduce(tensor, group=group)
        return "" if float(tensor.item()) == group.size() else "torch's all-reduce: a wrong sum"
    except (RuntimeError, ValueError) as error:  # NCCL: two ranks on one GPU
        return str(error).strip().splitlines()[0]


def _words(plan: ReductionPlan) -> str:
    text = plan.schedule if plan.codec == "plain" else f"{plan.schedule} {plan.codec}"
    return f"{text} x{plan.pieces}" if plan.pieces > 1 else text


def median_and_spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(samples), min(samples), max(samples)


@dataclass(frozen=True)
class Survival:
    """One survivor of a run in which a rank died in an all-reduce. when: of its first sum without it, by the
    host's clock. is_right: that sum, and another operation of this process on the device.
    """

    when: float
    is_right: bool
    members: tuple[int, ...]


def lose_a_rank(
    group: dist.ProcessGroup, device: torch.device, victim: int, step: int, die: Callable[[], None]
) -> Survival:
    """All-reduces of 1 MiB until rank `victim` dies in the one of number `step`, then goes on without it.

    die: ends the victim's process, with a reduction under way. Raises AssertionError if nobody was missed.
    """
    comm = Communicator(group, device=device, timeout=20.0)
    plan = ReductionPlan("native", "plain")
    for number in range(step + 50):
        values = torch.full((1 << 18,), float(number), device=device)
        if comm.rank == victim and number == step:
            comm.all_reduce(values, plan, async_op=True)
            die()
        try:
            comm.all_reduce(values, plan)
        except PeerTimeoutError as fault:
            comm.survive(fault, 1)
            again = torch.full((1 << 18,), 3.0, device=device)
            comm.all_reduce(again, plan)
            is_right = bool((again == 3.0 * comm.num_ranks).all().item())
            when = time.monotonic()
            alive = float(torch.arange(1000, device=device, dtype=torch.float32).sum().item()) == 499500.0
            members = comm.members
            comm.abandon()
            return Survival(when, is_right and alive, members)
    raise AssertionError("a rank died, and none of the others missed it")
