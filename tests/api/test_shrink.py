"""Low latency with enable_shrink: a rank that dies, freezes or is late is masked, and the calls go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep

pytestmark = [pytest.mark.alone, pytest.mark.own_backend]

RANKS, VICTIM, EXPERTS, TOPK, TOKENS, MOST = 3, 1, 6, 3, 4, 5
TIMEOUT = 3.0  # waited out, and longer than a busy machine holds a rank that comes


class Caller:
    """One rank's buffer and its inputs; every result is compared with the oracle's."""

    def __init__(self, ctx: Any, same_bits: Any, routing: Any, backend: str, options: Any) -> None:
        self.same_bits, self.hooks = same_bits, options.get("hooks", False)
        self.reduction = options.get("reduction", "exact")
        self.buffer = deepep.Buffer(
            ctx.group,
            low_latency_mode=True,
            enable_shrink=options.get("enable_shrink", True),
            timeout=options.get("timeout", TIMEOUT),
            backend=backend,
            reduction=self.reduction,
        )
        self.idx = [routing(r, RANKS, EXPERTS, TOPK, TOKENS) for r in range(RANKS)]
        self.idx[0][0] = -1
        self.xs = [
            torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(r)).bfloat16()
            for r in range(RANKS)
        ]
        self.weights = [
            torch.rand(TOKENS, TOPK, generator=torch.Generator().manual_seed(40 + r)) for r in range(RANKS)
        ]

    def round(self) -> list[tuple[int, ...]]:
        """A dispatch and a combine; the masks with which each of them has the oracle's bits."""
        from deepep.reference import low_latency as oracle

        buffer, rank = self.buffer, self.buffer.rank
        x, idx, weights = (t[rank].clone() for t in (self.xs, self.idx, self.weights))
        counted = torch.zeros(EXPERTS // RANKS, dtype=torch.int32)
        rows, count, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, MOST, EXPERTS, counted, use_fp8=False, return_recv_hook=self.hooks
        )
        if hook is not None:
            x.zero_()  # it has been sent
            idx.fill_(-1)
            hook()
        dispatched = self.received(rows, count, handle)
        assert torch.equal(counted, count)
        given = rows.clone()
        idx.copy_(self.idx[rank])
        combined, _, hook = buffer.low_latency_combine(
            given, idx, weights, handle, return_recv_hook=self.hooks
        )
        if hook is not None:
            given.zero_()
            weights.zero_()
            hook()
        outputs = self.dispatches(dispatched)
        for masked in ((), (VICTIM,)):
            if dispatched == (VICTIM,) and masked == ():
                continue
            wanted = oracle.combine(
                [o.recv_x for o in outputs],
                self.idx,
                self.weights,
                outputs,
                num_max_tokens=MOST,
                num_experts=EXPERTS,
                reduce="rank" if self.reduction == "expert_rank" else "token",
                masked=masked,
            )[rank]
            if self.same_bits(combined, wanted):
                return [dispatched, masked]
        raise AssertionError("the sums are nobody's")

    def dispatches(self, masked: tuple[int, ...]) -> Any:
        from deepep.reference import low_latency as oracle

        return oracle.dispatch(self.xs, self.idx, MOST, EXPERTS, fp8=False, masked=masked)

    def received(self, rows: Any, count: Any, handle: Any) -> tuple[int, ...]:
        for masked in ((), (VICTIM,)):
            wanted = self.dispatches(masked)[self.buffer.rank]
            if self.same_bits(count, wanted.recv_count) and self.same_bits(handle[1], wanted.layout_range):
                for expert, n in enumerate(count.tolist()):
                    assert self.same_bits(rows[expert, :n], wanted.recv_x[expert, :n])
                return masked
        raise AssertionError("the rows are nobody's")

    def masks(self) -> list[int]:
        status = torch.full((RANKS,), 7, dtype=torch.int32)
        self.buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    def strike(self, operation: str, phase: str, what: Any) -> None:
        """Calls `what` once, when this rank enters a phase."""

        def observe(now: str, where: str) -> None:
            if (now, where) == (operation, phase):
                self.buffer.runtime.observe(None)
                what()

        self.buffer.runtime.observe(observe)

    def error(self) -> deepep.PeerTimeoutError:
        try:
            self.round()
        except deepep.PeerTimeoutError as error:
            return error
        raise AssertionError("nothing was raised")


POINTS = [
    *[("low_latency_dispatch", phase) for phase in ("control", "send", "receive", "acknowledge")],
    *[("low_latency_combine", phase) for phase in ("control", "send", "receive", "acknowledge")],
]
KILLS = [
    *[("reference", point, hooks) for hooks in (False, True) for point in POINTS[hooks::2]],
    ("reference", POINTS[3], False),
    *[("emulator", point, True) for point in POINTS[2::3]],
]
VICTIM_ALONE = [int(rank == VICTIM) for rank in range(RANKS)]


def killed(ctx: Any, same_bits: Any, routing: Any, backend: str, point: Any, options: Any) -> Any:
    import os
    import signal

    caller = Caller(ctx, same_bits, routing, backend, options)
    assert caller.round() == [(), ()]
    assert caller.masks() == [0] * RANKS
    if ctx.rank == VICTIM:
        caller.strike(*point, lambda: os.kill(os.getpid(), signal.SIGKILL))
    tale = [caller.round() for _ in range(3)]
    tale.append(caller.masks())
    caller.buffer.destroy()
    return tale


@pytest.mark.parametrize(("backend", "point", "hooks"), KILLS)
def test_a_killed_rank_is_masked(
    world_of: Any, same_bits: Any, routing: Any, backend: str, point: Any, hooks: bool
) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    reduction = "exact" if backend == "reference" else "expert_rank"
    options = {"hooks": hooks, "timeout": 20.0, "reduction": reduction}
    outcomes = world_of(RANKS).try_run(killed, same_bits, routing, backend, point, options)
    assert outcomes[VICTIM].status.name == "DIED"
    survivors = [outcome for outcome in outcomes if outcome.rank != VICTIM]
    assert all(outcome.ok for outcome in survivors), [o.describe() for o in survivors]
    first, *others = [outcome.value for outcome in survivors]
    assert all(other == first for other in others), "the survivors do not agree"
    assert first[-2] == [(VICTIM,), (VICTIM,)]
    assert first[-1] == VICTIM_ALONE


def absent(ctx: Any, same_bits: Any, routing: Any, how: str, point: Any, options: Any) -> Any:
    """The victim is late, or frozen at a point: the others go on, it learns of it, and is taken in again."""
    import os
    import signal

    import torch.distributed as dist

    from deepep.sim.faults.fault import freeze_process

    caller = Caller(ctx, same_bits, routing, "reference", options)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_gather(pids, torch.tensor([os.getpid()]), group=ctx.group)
    learned = []
    for _ in range(2):
        assert caller.round() == [(), ()]
        if ctx.rank == VICTIM:
            if how == "late":
                dist.barrier(group=ctx.group)
            else:
                caller.strike(*point, freeze_process)
            error = caller.error()
            again = caller.error()  # at once, and so on until it is taken in
            learned.append((error.record.waited_on, again.record.waited_on, "masked" in str(error)))
            assert "masked" in str(again)
            assert caller.masks() == [0] * RANKS
        else:
            caller.round()
            assert caller.round() == [(VICTIM,), (VICTIM,)]
            assert caller.masks() == VICTIM_ALONE
            if how == "late":
                dist.barrier(group=ctx.group)
            else:
                os.kill(int(pids[VICTIM]), signal.SIGCONT)
        dist.barrier(group=ctx.group)
        caller.buffer.low_latency_clean_mask_buffer()
        assert caller.masks() == [0] * RANKS
    assert caller.round() == [(), ()]
    caller.buffer.destroy()
    return learned


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
def test_a_late_rank_is_masked_and_taken_in_again(
    world_of: Any, same_bits: Any, routing: Any, hooks: bool
) -> None:
    learned = world_of(RANKS).run(absent, same_bits, routing, "late", ("", ""), {"hooks": hooks})
    assert learned[VICTIM] == [((VICTIM,), (VICTIM,), True)] * 2


@pytest.mark.parametrize(("point", "hooks"), [(POINTS[1], False), (POINTS[3], True), (POINTS[6], True)])
def test_a_frozen_rank_is_masked_and_taken_in_again(
    same_bits: Any, routing: Any, point: Any, hooks: bool
) -> None:
    from deepep.sim import World

    with World(RANKS, store="tcp") as world:
        learned = world.run(absent, same_bits, routing, "frozen", point, {"hooks": hooks})
    assert learned[VICTIM] == [((VICTIM,), (VICTIM,), True)] * 2


def left_behind(ctx: Any, same_bits: Any, routing: Any) -> Any:
    """A rank that comes back alone masks nobody: it is the one who was left out."""
    import torch.distributed as dist

    caller = Caller(ctx, same_bits, routing, "reference", {})
    assert caller.round() == [(), ()]
    found = None
    if ctx.rank == VICTIM:
        dist.barrier(group=ctx.group)
        caller.error()
        caller.buffer.low_latency_clean_mask_buffer()  # the others do not
        found = caller.error().record.waited_on, caller.masks()
    else:
        caller.round()
        dist.barrier(group=ctx.group)
    dist.barrier(group=ctx.group)
    if ctx.rank != VICTIM:
        assert caller.round() == [(VICTIM,), (VICTIM,)]
    dist.barrier(group=ctx.group)
    caller.buffer.low_latency_clean_mask_buffer()
    assert caller.round() == [(), ()]
    caller.buffer.destroy()
    return found


def test_a_rank_that_was_left_out_masks_nobody(world_of: Any, same_bits: Any, routing: Any) -> None:
    found = world_of(RANKS).run(left_behind, same_bits, routing)[VICTIM]
    assert found == ((0, 2), [0] * RANKS)


def two_gone(ctx: Any, same_bits: Any, routing: Any) -> Any:
    """All others die, one while the other is being masked."""
    import os
    import signal

    caller = Caller(ctx, same_bits, routing, "reference", {"timeout": 20.0})
    assert caller.round() == [(), ()]
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if ctx.rank == VICTIM:
        caller.strike("low_latency_dispatch", "control", die)
        caller.round()
    x, idx = caller.xs[ctx.rank], caller.idx[ctx.rank]
    if ctx.rank == 2:
        seen = []

        def observe(operation: str, phase: str) -> None:
            seen.append(phase)
            if seen.count("send") == 1:
                die()

        caller.buffer.runtime.observe(observe)
    _, count, _, _, _ = caller.buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)
    wanted = caller.dispatches((1, 2))[ctx.rank]
    return torch.equal(count, wanted.recv_count), caller.masks()


def test_ranks_that_die_one_after_the_other(fresh_world: Any, same_bits: Any, routing: Any) -> None:
    outcomes = fresh_world(RANKS).try_run(two_gone, same_bits, routing)
    assert outcomes[0].ok, outcomes[0].describe()
    assert outcomes[0].value == (True, [0, 1, 1])


def unmasked(ctx: Any, same_bits: Any, routing: Any, options: Any) -> Any:
    """Nothing is masked after a fault without enable_shrink, and one in a call that is not low latency."""
    import torch.distributed as dist

    caller = Caller(ctx, same_bits, routing, "reference", options)
    assert caller.round() == [(), ()]
    waited_on = None
    if ctx.rank != VICTIM:
        if options["enable_shrink"]:
            try:
                caller.buffer.clean_low_latency_buffer(MOST, 128, EXPERTS)
            except deepep.PeerTimeoutError as error:
                waited_on = error.record.waited_on
            assert caller.error().record.waited_on == (VICTIM,)
            assert caller.masks() == [0] * RANKS
        else:
            waited_on = caller.error().record.waited_on
    dist.barrier(group=ctx.group)
    return waited_on


@pytest.mark.parametrize("enable_shrink", [False, True])
def test_other_faults_are_raised(fresh_world: Any, same_bits: Any, routing: Any, enable_shrink: bool) -> None:
    found = fresh_world(RANKS).run(unmasked, same_bits, routing, {"enable_shrink": enable_shrink})
    assert [named for rank, named in enumerate(found) if rank != VICTIM] == [(VICTIM,)] * 2


def hook_forgotten(ctx: Any, same_bits: Any, routing: Any) -> Any:
    """A rank begins another operation before its hook: all learn it, and all stay in step."""
    caller = Caller(ctx, same_bits, routing, "reference", {"timeout": 20.0, "hooks": True})
    found = []
    for _ in range(2):
        assert caller.round() == [(), ()]
        given = (caller.xs[ctx.rank], caller.idx[ctx.rank], MOST, EXPERTS)
        *_, hook = caller.buffer.low_latency_dispatch(*given, return_recv_hook=True)
        try:
            if ctx.rank == VICTIM:
                caller.buffer.low_latency_dispatch(*given)
            hook()
        except deepep.ArgumentError as error:
            found.append((type(error).__name__, error.rank))
        if ctx.rank == VICTIM:
            hook()
    assert caller.masks() == [0] * RANKS
    caller.buffer.destroy()
    return found


def test_a_hook_that_is_forgotten(world_of: Any, same_bits: Any, routing: Any) -> None:
    found = world_of(RANKS).run(hook_forgotten, same_bits, routing)
    assert found == [[("HookPendingError", VICTIM)] * 2] * RANKS


def raising(ctx: Any, same_bits: Any, routing: Any) -> Any:
    """A rank that raises something of its own has not timed out: the others learn it, as ever."""
    import torch.distributed as dist

    caller = Caller(ctx, same_bits, routing, "reference", {"timeout": 20.0})

    def fail() -> None:
        raise KeyError("a bug")

    if ctx.rank == VICTIM:
        caller.strike("low_latency_dispatch", "send", fail)
        with pytest.raises(KeyError):
            caller.round()
    else:
        assert caller.error().record.waited_on == (VICTIM,)
    dist.barrier(group=ctx.group)
    assert caller.round() == [(), ()]
    caller.buffer.destroy()


def test_what_a_rank_raises_is_posted_and_not_masked(world_of: Any, same_bits: Any, routing: Any) -> None:
    world_of(RANKS).run(raising, same_bits, routing)
