"""A rank is killed somewhere in a training step, and what the other one lives through.

The survivor must raise PeerTimeoutError, with a record that names the dead rank, within its deadline; its
device must work on; and once the dead rank is masked, dispatch and combine must give what the oracle gives
without it. One process survives all deaths, each in a buffer of its own; every victim is a fresh process.

Or the rank is frozen for longer than its peer's patience, and comes back when the other works without it: it
gets an error, too, and does the other no harm.

Only public calls of Buffer: any backend. tests/backends/cuda runs this on two GPUs, tests/sim without.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from deepep.runtime.control.transport import hang_up
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.faults.fault import freeze_process
from deepep.sim.fuzz.buffer_runs import run_on_buffer
from deepep.sim.worlds.gpus import take_gpu
from deepep.sim.worlds.outcomes import Outcome, Status
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World
from harness.steadiness import check_own
from harness.training_steps import CALLS, POINTS, REPLAY, CapturedStep, Step

#: Seconds a victim lives on after it has begun the call that it is to die in.
MOMENT = 0.3
#: Seconds for which the parts of a test that are not under test may wait.
PATIENCE = 60.0
#: Symmetric memory of each buffer: a survivor keeps that of every buffer that lost a rank.
SYMMETRIC_BYTES = 256 << 20


@dataclass(frozen=True)
class Death:
    """A death: the place where a rank is killed.

    Attributes:
        point: before this point of the step.
        inside: a moment after it, in the call, while its peer has not made it yet.
        victim: the rank.
        waits: whether the survivor goes on from that point only when the victim is dead.
        settles: whether the survivor waits for its device after every call; else calls queue up.
    """

    point: str
    inside: bool = False
    victim: int = 1
    waits: bool = True
    settles: bool = True

    def __str__(self) -> str:
        where = "in" if self.inside else "before"
        how = f"{', known' if self.waits else ''}{', settled' if self.settles else ''}"
        return f"{where} {self.point}, rank {self.victim}{how}"


def deaths(*, graphs: bool) -> list[Death]:
    """Before every point and in every call, with victims and ways of waiting in turn."""
    found = [
        Death(point, victim=(i + 1) % 2, waits=i % 4 < 2, settles=i % 3 != 2)
        for i, point in enumerate(POINTS)
    ]
    found += [Death(point, inside=True, victim=i % 2, settles=i % 3 != 1) for i, point in enumerate(CALLS)]
    if graphs:
        found += [Death(REPLAY, victim=0), Death(REPLAY, inside=True)]
    return found


@dataclass(frozen=True)
class Setting:
    """Placement of ranks: on GPUs with NCCL, or on CPUs with gloo.

    Attributes:
        num_tokens: T by rank, of the steps.
        few_tokens: T by rank, of what is compared with the oracle afterwards.
        timeout: of the buffers, in seconds.
        grace: what their errors may come later than that.
        num_sms: that high-throughput operations use.
    """

    cuda: bool
    num_tokens: tuple[int, int] = (24, 17)
    few_tokens: tuple[int, int] = (24, 17)
    hidden: int = 128
    num_experts: int = 8
    topk: int = 3
    backend: str | None = None
    timeout: float = 2.0
    grace: float = 3.0
    num_sms: int = 24

    def case(self, seed: int, num_tokens: tuple[int, int], **options: Any) -> Case:
        """A case of two ranks."""
        generator = torch.Generator().manual_seed(seed)
        idx = [
            torch.rand((tokens, self.num_experts), generator=generator).topk(self.topk, dim=1).indices
            for tokens in num_tokens
        ]
        case = Case(
            num_experts=self.num_experts,
            topk_idx=tuple(i.numpy() for i in idx),
            hidden=self.hidden,
            seed=seed,
            options=Options(values="normal", **options),
        )
        return case.legal()


@dataclass(frozen=True)
class Survived:
    """The survivor's account.

    Attributes:
        operation, phase, rank, waited_on: of the fault record.
        seconds: from the point of the death, or from the first call after it was known, to the error.
        made: calls that had been issued since then, the one that raised included.
        again: seconds that the next dispatch took to raise the same, with the rank not masked yet.
        leaving: seconds that `destroy` took in the end.
    """

    operation: str
    phase: str
    rank: int
    waited_on: tuple[int, ...]
    seconds: float
    made: int
    again: float
    leaving: float


def play(survivor: World, victim: World, death: Death, setting: Setting) -> Survived:
    """Kills the process of `victim`, a world of one rank, and returns the report of `survivor`, another.

    Raises AssertionError where a promise was not kept.
    """
    with TemporaryDirectory(prefix="deepep-death-", ignore_cleanup_errors=True) as folder:
        pending = survivor.submit(survive, death, setting, folder, timeout=2 * PATIENCE)
        (end,) = victim.try_run(die, death, setting, folder, timeout=PATIENCE)
        Path(folder, "dead").touch()
        (outcome,) = pending.outcomes()
    # The first failure says more.
    _demand_death(end, outcome)
    assert outcome.ok, f"{death}: {outcome.describe()}"
    report: Survived = outcome.value
    judge(death, setting, report)
    return report


def play_return(survivor: World, victim: World, death: Death, setting: Setting) -> Survived:
    """As `play`, but the victim is frozen, and thawed when the survivor works without it."""
    with TemporaryDirectory(prefix="deepep-death-", ignore_cleanup_errors=True) as folder:
        pending = survivor.submit(survive, death, setting, folder, returns=True, timeout=2 * PATIENCE)
        coming = victim.submit(freeze, death, setting, folder, timeout=2 * PATIENCE)
        survived = Path(folder, "survived")
        deadline = time.monotonic() + PATIENCE
        while not survived.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        before = time.monotonic()
        victim.resume(0)
        (end,) = coming.outcomes()
        seconds = time.monotonic() - before
        Path(folder, "back").touch()
        (outcome,) = pending.outcomes()
    assert outcome.ok, f"{death}: {outcome.describe()}"
    report: Survived = outcome.value
    judge(death, setting, report)
    assert end.ok, f"{death}: {end.describe()}"
    # Everything that it had queued may have to run out of time, and what it calls then.
    assert seconds < 5 * setting.timeout + setting.grace, f"{death}: the frozen rank took {seconds:.1f} s"
    assert end.value in ("PeerTimeoutError", "MismatchError"), f"{death}: the frozen rank: {end.value}"
    return report


def _demand_death(end: Outcome, other: Outcome) -> None:
    if end.status is not Status.DIED or end.exitcode != -signal.SIGKILL:
        also = "" if other.ok else f"\nand the survivor: {other.describe()}"
        raise AssertionError(f"the victim was not killed: {end.describe()}{also}")


def judge(death: Death, setting: Setting, report: Survived) -> None:
    """Raises AssertionError where a promise was not kept."""
    assert report.waited_on == (death.victim,), f"{death}: {report}"
    assert report.rank == 1 - death.victim, f"{death}: {report}"
    # Queued calls run out of time one after the other; a replay holds a dispatch and a combine.
    waits = (1 if death.settles else report.made) * (2 if death.point == REPLAY else 1)
    assert report.seconds < setting.timeout * waits + setting.grace, f"{death}: {report}"
    if report.operation in ("dispatch", "combine"):
        assert report.again < 1.0, f"{death}: {report}"
    assert report.leaving < setting.timeout + setting.grace, f"{death}: {report}"


# What the two ranks do


def prepare(ctx: RankContext, setting: Setting, rank: int) -> None:
    """In a process that is to die or survive, on rank `rank`'s GPU: wakes it up and loads the kernels."""
    torch.set_num_threads(1)
    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
    ctx.scratch["device"] = take_gpu(rank, 2) if setting.cuda else torch.device("cpu")
    case = setting.case(1, setting.few_tokens)
    alone = replace(case, topk_idx=case.topk_idx[:1])
    with TemporaryDirectory(prefix="deepep-alone-") as folder:
        buffer = _buffer(setting, folder, 0, 1)
        Step(buffer, alone, ctx.scratch["device"]).run()
        _settle(ctx.scratch["device"])
        buffer.destroy()
    dist.destroy_process_group()


def die(ctx: RankContext, death: Death, setting: Setting, folder: str) -> None:
    """The victim's part. Does not return."""
    device = ctx.scratch["device"]
    buffer = _buffer(setting, folder, death.victim, 2)
    step = _step(buffer, death, setting, device)
    step.run()
    _settle(device)
    _meet(folder, death.victim)
    called = False

    def kill_here(point: str) -> None:
        nonlocal called
        if called:
            threading.Event().wait()  # its time has come; it makes no further call
        if point != death.point:
            return
        if not death.inside:
            os.kill(os.getpid(), signal.SIGKILL)
        called = True
        timer = threading.Timer(MOMENT, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    step.at = kill_here
    step.run()
    _settle(device)
    step.run()


def freeze(ctx: RankContext, death: Death, setting: Setting, folder: str) -> str:
    """The victim's part if it comes back: the name of the error that it gets then."""
    from deepep.errors import DeepEPError

    device = ctx.scratch["device"]
    buffer = _buffer(setting, folder, death.victim, 2)
    step = _step(buffer, death, setting, device)
    step.run()
    _settle(device)
    _meet(folder, death.victim)
    frozen = False

    def stop() -> None:
        Path(folder, "dead").touch()
        freeze_process()

    def stop_here(point: str) -> None:
        nonlocal frozen
        if point == death.point and not frozen:
            frozen = True
            if death.inside:
                threading.Timer(MOMENT, stop).start()
            else:
                stop()

    step.at = stop_here
    try:
        for _ in range(3):
            step.run()
            _settle(device)
    except DeepEPError as error:
        _check_device(device)
        return type(error).__name__
    return "no error"


def survive(ctx: RankContext, death: Death, setting: Setting, folder: str, returns: bool = False) -> Survived:
    """The other rank's part. returns: the victim comes back, until when this rank works on."""
    from deepep.errors import PeerTimeoutError

    device, rank = ctx.scratch["device"], 1 - death.victim
    buffer = _buffer(setting, folder, rank, 2)
    step = _step(buffer, death, setting, device)
    step.run()
    _settle(device)
    _meet(folder, rank)
    begun, made = 0.0, 0

    def watch(point: str) -> None:
        nonlocal begun, made
        if death.settles:
            _settle(device)
        if point == death.point and not begun:
            if death.waits or death.inside:
                _wait_for(Path(folder, "dead"))
            begun = time.monotonic()
        made += bool(begun)

    step.at = watch
    try:
        for _ in range(3):
            step.run()
        raise AssertionError(f"{death}: nobody was missed in three steps")
    except PeerTimeoutError as error:
        seconds, record = time.monotonic() - begun, error.record
    _check_device(device)
    again = _raises_again(step, buffer)
    buffer.low_latency_update_mask_buffer(death.victim, True)
    _work_without(death, setting, buffer)
    if returns:
        Path(folder, "survived").touch()
        deadline = time.monotonic() + PATIENCE
        while not Path(folder, "back").exists() and time.monotonic() < deadline:
            _work_without(death, setting, buffer)
        _work_without(death, setting, buffer)
    _check_device(device)
    before = time.monotonic()
    buffer.destroy()
    leaving = time.monotonic() - before
    group = dist.group.WORLD
    if setting.cuda and returns and group is not None:
        hang_up(group)  # NCCL's end of a group waits for the other rank, which does not end it
    dist.destroy_process_group()
    return Survived(
        record.operation, record.phase, record.rank, record.waited_on, seconds, made, again, leaving
    )


def _work_without(death: Death, setting: Setting, buffer: Any) -> None:
    for seed in (3, 4):
        case = replace(
            setting.case(seed, setting.few_tokens, cached=True, biases=1, combine_weights=True),
            masked=(death.victim,),
        )
        view = run_on_buffer(case, buffer)
        check_own(case, buffer.rank, view, f"{death}: with rank {death.victim} masked")


def _raises_again(step: Step, buffer: Any) -> float:
    from deepep.errors import PeerTimeoutError

    before = time.monotonic()
    try:
        step.dispatch(buffer.get_dispatch_layout(step.mine.topk_idx, step.case.num_experts))
    except PeerTimeoutError:
        return time.monotonic() - before
    raise AssertionError("a dispatch with a rank that is dead, and not masked, went through")


def _check_device(device: torch.device) -> None:
    ones = torch.ones((128, 128), device=device)
    assert torch.equal(ones @ ones, ones * 128), "the device does not compute any more"


def _step(buffer: Any, death: Death, setting: Setting, device: torch.device) -> Step:
    kind = CapturedStep if death.point == REPLAY else Step
    return kind(buffer, setting.case(2, setting.num_tokens), device)


# Who meets whom


def _buffer(setting: Setting, folder: str, rank: int, num_ranks: int) -> Any:
    """A buffer over a process group of its own, whose ranks meet in `folder`."""
    from deepep import Buffer

    if dist.is_initialized():
        dist.destroy_process_group()
    store = FileStore(f"{folder}/store", num_ranks)
    wait = timedelta(seconds=PATIENCE)
    store.set_timeout(wait)
    kind = "nccl" if setting.cuda else "gloo"
    os.environ["DEEPEP_DEVICE"] = "cuda" if kind == "nccl" else "cpu"
    dist.init_process_group(kind, store=store, rank=rank, world_size=num_ranks, timeout=wait)
    if num_ranks > 1:
        _meet(folder, rank, "joined")  # a buffer's own deadline is short
    Buffer.set_num_sms(setting.num_sms)
    return Buffer(
        dist.group.WORLD,
        num_nvl_bytes=1 << 20,
        low_latency_mode=True,
        enable_shrink=True,
        backend=setting.backend,
        timeout=setting.timeout,
    )


def _meet(folder: str, rank: int, where: str = "met") -> None:
    """Waits until both ranks are here."""
    Path(folder, f"{where}-{rank}").touch()
    _wait_for(Path(folder, f"{where}-{1 - rank}"))


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path.name} did not appear within {PATIENCE} s")
        time.sleep(0.002)


def _settle(device: torch.device) -> None:
    """Waits for all that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
