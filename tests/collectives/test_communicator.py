"""Communicator: what is refused, on all ranks; results that are waited for; bytes; ranks that are missing."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.futures import Future

from deepep.collectives import Communicator, PendingReduction, ReductionPlan
from deepep.collectives.communicator import _settle
from deepep.collectives.transport import PointToPoint
from deepep.errors import ArgumentTypeError, DestroyedError, LayoutError, MismatchError, RangeError
from deepep.runtime.control.transport import Link, LinkError
from deepep.sim import World

COUNT = 128 * 60  # shares of whole blocks on 2, 3, 4 and 5 ranks


def in_communicator(context: Any, body: Callable[..., Any], *args: Any) -> Any:
    with Communicator(context.group, timeout=30.0) as comm:
        return body(comm, *args)


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"schedule": "star"}, "schedule: got 'star'; allowed: oneshot, direct"),
        ({"codec": "fp4"}, "codec: got 'fp4'"),
        ({"schedule": "ring", "codec": "fp8"}, "ring rounds at every rank"),
        ({"schedule": "native", "codec": "bf16"}, "allowed: plain or fixed32"),
        ({"codec": "plain", "inner": "fp8"}, "inner: got 'fp8'"),
        ({"codec": "fp8", "inner": "fixed32"}, "inner: got 'fixed32'"),
        ({"groups": [[0], []]}, "none of them empty"),
        ({"groups": "01"}, "groups: got str"),
        ({"groups": [[0, -1]]}, "groups: got -1"),
        ({"pieces": 0}, "pieces: got 0"),
    ],
)
def test_plans_that_mean_nothing_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((RangeError, ArgumentTypeError), match=match):
        ReductionPlan(**arguments)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = ReductionPlan("hierarchical", "fp8", "bf16", ((0, 2), (1, 3)), 4)
    plan.save(tmp_path / "plan.json")
    assert ReductionPlan.load(tmp_path / "plan.json") == plan
    for text in ("", "[]", '{"version": 9}', '{"version": 1, "speed": 3}', '{"version": 1, "codec": "fp4"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RangeError):
            ReductionPlan.load(tmp_path / "bad.json")


def refused(comm: Communicator) -> list[tuple[str, str]]:
    """Calls in which rank 1 alone is given something else, and what this rank raises."""
    odd, good = comm.rank == 1, torch.ones(8)
    plan = ReductionPlan(groups=((0, 1), (2, 7)) if odd else ((0, 1), (2,)))
    return [
        raised(lambda: comm.all_reduce(good.int() if odd else good)),
        raised(lambda: comm.all_reduce(torch.ones(8, 2).T if odd else torch.ones(2, 8))),
        raised(lambda: comm.all_reduce([1.0] if odd else good)),  # type: ignore[arg-type]
        raised(lambda: comm.all_reduce(good, plan)),
        raised(lambda: comm.all_reduce(good, dice=(1, 2) if odd else None)),  # type: ignore[arg-type]
        raised(lambda: comm.all_reduce(torch.ones(9) if odd else good)),
        raised(lambda: comm.all_reduce(good.bfloat16() if odd else good)),
        raised(lambda: comm.all_reduce(good, mean=odd)),
        raised(lambda: comm.all_reduce(good, ReductionPlan("ring" if odd else "direct"))),
        raised(lambda: comm.all_reduce(good, dice=(1, 2, 3 + odd))),
        raised(lambda: comm.all_reduce(good)),
    ]


def test_what_one_rank_is_given_all_refuse(world_of: Callable[[int], Any]) -> None:
    outcomes = world_of(3).run(in_communicator, refused)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    kinds = [kind for kind, _ in outcomes[0]]
    wanted = [ArgumentTypeError, LayoutError, ArgumentTypeError, RangeError, ArgumentTypeError]
    assert kinds == [*(kind.__name__ for kind in wanted), *[MismatchError.__name__] * 5, ""]
    assert all("rank 1" in text for _, text in outcomes[0][:-1])


def asynchronous(comm: Communicator) -> bool:
    tensors = [torch.full((1000,), float(comm.rank + number)) for number in range(4)]
    plans = [ReductionPlan(schedule) for schedule in ("direct", "ring", "tree", "native")]
    pending = [comm.all_reduce(t, plan, async_op=True) for t, plan in zip(tensors, plans, strict=True)]
    for number, entry in reversed(list(enumerate(pending))):
        assert isinstance(entry, PendingReduction)
        assert torch.equal(entry.get_future().wait(), torch.full((1000,), 3.0 + 3 * number))
        assert entry.is_completed()
        assert entry.wait() is tensors[number]
    return True


def test_results_may_be_waited_for_in_any_order(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(3).run(in_communicator, asynchronous))


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt("odd")])
def test_whatever_an_operation_raises_ends_its_future(error: BaseException) -> None:
    done: Future[torch.Tensor] = Future()
    _settle(done, torch.ones(1), error)
    assert done.done()
    with pytest.raises(Exception, match="odd"):
        done.wait()


class OnGpu:
    """In the place of a message on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def numel(self) -> int:
        return 1


class Coalescing:
    """In the place of a group of NCCL, whose works keep no tensor."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: object()


def test_messages_live_until_their_works_are_waited_for() -> None:
    """Or another piece could be given their memory before NCCL's stream has read it."""
    net = PointToPoint(Link(Coalescing(), 0, 2, (0, 1)))  # type: ignore[arg-type]
    message: Any = OnGpu()
    alive = weakref.ref(message)
    works = net.exchange([(message, 1)], [], 0)
    del message
    assert alive() is not None
    del works
    assert alive() is None


class Failing:
    """A group of NCCL whose sends fail at first: by name of a call, the threads that have made it."""

    def __init__(self) -> None:
        self.threads: dict[str, list[threading.Thread]] = {}
        self.fails = True

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.threads.setdefault(name, []).append(threading.current_thread())
            if name == "send" and self.fails:
                raise RuntimeError("a peer is gone")
            return object()

        return call


def test_a_thread_that_left_a_group_open_makes_no_other_calls() -> None:
    """Nothing that it called would be launched: the group that failed is not known to be closed."""
    group, message = Failing(), OnGpu()
    net = PointToPoint(Link(group, 0, 2, (0, 1)))  # type: ignore[arg-type]
    with pytest.raises(LinkError, match="gone"):
        net.exchange([(message, 1)], [], 0)  # type: ignore[list-item]
    before, group.threads = group.threads["_start_coalescing"], {}
    group.fails = False
    for _ in range(2):
        net.exchange([(message, 1)], [], 0)  # type: ignore[list-item]
    assert list(group.threads) == ["_start_coalescing", "send", "_end_coalescing"]
    assert len({thread for threads in group.threads.values() for thread in threads}) == 1
    assert {threading.current_thread(), *before}.isdisjoint(group.threads["send"])


def sent_bytes(comm: Communicator, plans: list[ReductionPlan]) -> list[int]:
    sent = []
    for plan in plans:
        before = comm.bytes_sent
        comm.all_reduce(torch.ones(COUNT), plan)
        sent.append(comm.bytes_sent - before)
    return sent


def test_bytes_are_those_of_the_schedules(world_of: Callable[[int], Any]) -> None:
    """docs/parallel.md, "Schedules", in bytes per rank."""
    ranks, size, fp8 = 4, 4 * COUNT, COUNT + COUNT // 128
    pairs = ((0, 1), (2, 3))
    plans = {
        ReductionPlan("oneshot", "plain"): [3 * size] * ranks,
        ReductionPlan("direct", "plain"): [2 * size * 3 // 4] * ranks,
        ReductionPlan("direct", "fp8"): [2 * fp8 * 3 // 4] * ranks,
        ReductionPlan("ring", "plain"): [2 * size * 3 // 4] * ranks,
        ReductionPlan("hierarchical", "plain", groups=pairs): [size // 2 * 2 + size // 4 * 2] * ranks,
        ReductionPlan("hierarchical", "fp8", "bf16", pairs): [size // 4 + fp8 // 2 + fp8 // 4 * 2] * ranks,
        ReductionPlan("chain", "plain"): [size, 2 * size, 2 * size, size],
        ReductionPlan("tree", "plain"): [2 * size, size, 2 * size, size],
        ReductionPlan("direct", "fixed32"): [2 * size * 3 // 4] * ranks,
        ReductionPlan("ring", "fixed32"): [2 * size * 3 // 4 + 3 * (COUNT // 128)] * ranks,
    }
    outcomes = world_of(ranks).run(in_communicator, sent_bytes, list(plans))
    for number, (plan, wanted) in enumerate(plans.items()):
        assert [sent[number] for sent in outcomes] == wanted, plan


def test_fp8_takes_a_quarter_of_the_bytes(world_of: Callable[[int], Any]) -> None:
    plans = [ReductionPlan("direct", codec) for codec in ("plain", "fp8", "bf16")]
    plain, fp8, bf16 = world_of(2).run(in_communicator, sent_bytes, plans)[0]
    assert fp8 / plain <= 0.27
    assert bf16 / plain <= 0.52


def lonely(context: Any) -> tuple[str, str]:
    """Rank 2 dies; what the others raise."""
    from deepep.errors import PeerTimeoutError

    comm = Communicator(context.group, timeout=600.0)
    comm.all_reduce(torch.ones(5))
    if context.rank == 2:
        os._exit(7)
    try:
        comm.all_reduce(torch.ones(100_000), ReductionPlan("hierarchical", groups=((0, 1), (2,))))
    except PeerTimeoutError as error:
        return error.record.operation, str(error.record.waited_on)
    return "", ""


def test_a_rank_that_dies_is_named() -> None:
    """Long before the time-out, which the world would not wait for: a process's end closes connections."""
    with World(3, timeout=60.0) as world:
        outcomes = world.try_run(lonely)
    assert [outcome.value for outcome in outcomes[:2]] == [("all_reduce", "(2,)")] * 2


def closed(comm: Communicator) -> tuple[str, str]:
    comm.close()
    comm.close()
    return raised(lambda: comm.all_reduce(torch.ones(3)))


def test_nothing_works_after_the_end(world_of: Callable[[int], Any]) -> None:
    assert {kind for kind, _ in world_of(2).run(in_communicator, closed)} == {DestroyedError.__name__}


def scattered(comm: Communicator, codec: str, count: int, dtype: torch.dtype) -> tuple[bool, float, int]:
    """True if a part is that of an all-reduce; its error in proportion; the bytes that this rank sent."""
    generator = torch.Generator().manual_seed(comm.rank)
    values = torch.randn(count * comm.num_ranks, generator=generator).to(dtype)
    whole = comm.all_reduce(
        values.clone(), ReductionPlan("oneshot", codec if codec == "fixed32" else "plain")
    )
    before, out = comm.bytes_sent, torch.empty(count, dtype=dtype)
    comm.reduce_scatter(out, values, codec, dice=(1, 2, 3) if codec == "fp8" else None)
    wanted = whole[count * comm.rank :][:count]
    error = float((out - wanted).double().norm() / wanted.double().norm())
    return torch.equal(out, wanted), error, comm.bytes_sent - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reduce_scatter_gives_the_parts_of_an_all_reduce(
    world_of: Callable[[int], Any], dtype: torch.dtype
) -> None:
    # In fixed point a part has blocks of its own: those of the whole, if it is of whole blocks.
    for codec, count in (("plain", 300), ("fixed32", 384), ("fp8", 300)):
        for is_equal, error, num_bytes in world_of(3).run(in_communicator, scattered, codec, count, dtype):
            if codec == "fp8" and dtype != torch.float64:
                assert 0.005 < error < 0.06  # one rounding by dice of 3.7 %
                assert num_bytes == 2 * (300 + 3)  # a scale per 128
            else:
                assert is_equal
                assert num_bytes == 2 * count * dtype.itemsize


def wrong_parts(comm: Communicator) -> list[str]:
    found = []
    for count, codec in ((5 + comm.rank // 2, "plain"), (5, ("plain", "fp8", "plain")[comm.rank])):
        tensor, out = torch.ones(15), torch.zeros(count)
        found.append(
            raised(lambda tensor=tensor, out=out, codec=codec: comm.reduce_scatter(out, tensor, codec))
        )
    return [kind for kind, _ in found]


def test_reduce_scatters_that_differ_raise_on_all_ranks(world_of: Callable[[int], Any]) -> None:
    assert world_of(3).run(in_communicator, wrong_parts) == [["ShapeError", "MismatchError"]] * 3
