"""Symmetric memory by nvshmem4py: started once, joined, checked on all ranks alike, carved, ended.

On a stand-in whose PEs are threads; the real one: test_nvshmem_processes.py.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.stand_in_nvshmem import InternalInitStatus, NvshmemInvalid, Pe, StandIn

from deepep.backends.cuda.memory import nvshmem4py
from deepep.backends.cuda.memory.nvshmem import NvshmemOwner, NvshmemProcess, SymmetricPart
from deepep.backends.cuda.memory.nvshmem_checks import CONNECTIONS, RELAXED, TRANSPORT, is_on
from deepep.backends.cuda.memory.store_exchange import StoreExchange
from deepep.errors import (
    CapacityError,
    DeepEPError,
    MismatchError,
    ModeError,
    PeerTimeoutError,
    RangeError,
)
from deepep.runtime.traffic_lanes import TrafficLanes

SLAB = 1 << 16


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    made.install(monkeypatch)
    for name in (RELAXED, CONNECTIONS, TRANSPORT, "NVSHMEM_IB_SL", "NVSHMEM_IB_TRAFFIC_CLASS"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards, whatever is set meanwhile
        monkeypatch.delenv(name)
    return made


class Rank:
    """A rank of a test: a thread with a process's NVSHMEM, and exchanges with others through one store."""

    def __init__(self, rank: int, stand_in: StandIn, store: dist.Store, pe: Pe) -> None:
        self.rank, self.stand_in, self.store, self.pe = rank, stand_in, store, pe
        self.owner = NvshmemOwner()

    def exchange(self, name: str, ranks: list[int], timeout: float = 60.0) -> StoreExchange:
        return StoreExchange(self.store, name, ranks.index(self.rank), len(ranks), timeout)

    def open(self, name: str, ranks: list[int], num_bytes: int = SLAB, **options: Any) -> NvshmemProcess:
        exchange = self.exchange(name, ranks)
        place = ranks.index(self.rank)
        opened = self.owner.open(exchange, place, len(ranks), device_index=0, num_bytes=num_bytes, **options)
        opened._finalizer.detach()  # tests end what they have started
        return opened


def on_ranks(
    stand_in: StandIn, size: int, function: Callable[[Rank], Any], facts: Callable[[int], dict] | None = None
) -> list[Any]:
    """Results of `function`, or what it raised, by rank."""
    store, given = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        pe = stand_in.enter(**(facts(rank) if facts else {}))
        try:
            given[rank] = function(Rank(rank, stand_in, store, pe))
        except BaseException as error:
            given[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def raised(given: list[Any], kind: type[DeepEPError]) -> str:
    """The text of the error that all ranks have raised, the same."""
    assert [type(each) for each in given] == [kind] * len(given), given
    texts = {str(each) for each in given}
    assert len(texts) == 1, texts
    return texts.pop()


def test_it_is_started_from_the_store_and_ended(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: Rank) -> tuple[int, int, int, list[str], int]:
        opened = rank.open("first", [0, 1, 2])
        place = opened.pe, opened.num_pes, opened.slab.numel()
        opened.end()
        opened.end()
        return *place, rank.pe.calls, rank.pe.status

    given = on_ranks(stand_in, 3, work)
    once = ["init", "tensor", "free_tensor", "finalize"]
    assert given == [(rank, 3, SLAB, once, 1) for rank in range(3)]


def test_there_is_one_a_process_and_smaller_groups_map_onto_it(stand_in: StandIn) -> None:
    def work(rank: Rank) -> tuple[tuple[int, ...], int, bool]:
        first = rank.open("all", [0, 1, 2, 3])
        pair = [2, 0] if rank.rank % 2 == 0 else [1, 3]
        name = f"pair {pair}"
        second = rank.open(name, pair, num_bytes=1)
        part = second.carve(rank.exchange(name + " part", pair), 1000)
        found = part.pes, rank.pe.calls.count("init"), second is first
        first.end()
        return found

    assert on_ranks(stand_in, 4, work) == [((2, 0), 1, True), ((1, 3), 1, True)] * 2


def test_parts_lie_at_the_same_place_on_all_ranks_and_do_not_overlap(stand_in: StandIn) -> None:
    def work(rank: Rank) -> list[tuple[int, int]]:
        opened = rank.open("all", [0, 1, 2])
        parts: list[SymmetricPart] = []
        if rank.rank < 2:  # a pair first, so that rank 2 has other ranges free
            parts.append(opened.carve(rank.exchange("pair", [0, 1]), 5000))
        parts.append(opened.carve(rank.exchange("everyone", [0, 1, 2]), 300))
        if rank.rank < 2:
            parts.pop(0).release()
            parts.append(opened.carve(rank.exchange("again", [0, 1]), 4000))
        for part in parts:
            part.memory.fill_(1)
        assert int(opened.slab.sum()) == sum(part.memory.numel() for part in parts)
        opened.end()
        return [(part.offset, part.memory.numel()) for part in parts]

    assert on_ranks(stand_in, 3, work) == [[(5120, 300), (0, 4000)]] * 2 + [[(5120, 300)]]


def test_a_slab_that_is_full_is_said_on_all_ranks(stand_in: StandIn) -> None:
    def work(rank: Rank) -> None:
        opened = rank.open("all", [0, 1])
        part = opened.carve(rank.exchange("a", [0, 1]), SLAB - 256)
        try:
            opened.carve(rank.exchange("b", [0, 1]), 257)
        finally:
            part.release()
            part.release()  # no effect
            assert opened._free.ranges == [(0, SLAB)]
            opened.end()

    text = raised(on_ranks(stand_in, 2, work), CapacityError)
    assert text == f"num_bytes: got 257; allowed: at most 256, of {SLAB} bytes of symmetric memory"


def test_a_second_buffer_of_all_ranks_has_a_slab_of_its_own(stand_in: StandIn) -> None:
    """If it finds no room, on any rank; parts lie in one or the other, and both are freed."""

    def work(rank: Rank) -> list[str]:
        opened = rank.open("first", [0, 1])
        parts = [opened.carve(rank.exchange("a", [0, 1]), SLAB // 2)]
        assert rank.open("fits", [0, 1], num_bytes=SLAB // 2) is opened
        if rank.rank == 1:
            parts.append(opened.carve(rank.exchange("alone", [1]), 300))
        assert rank.pe.calls.count("tensor") == 1
        assert rank.open("second", [0, 1], num_bytes=SLAB // 2) is opened
        assert rank.pe.calls.count("tensor") == 2
        for size, at_end in ((SLAB // 4, False), (SLAB // 2, False), (SLAB // 8, True)):
            parts.append(opened.carve(rank.exchange(f"b{size}", [0, 1]), size, at_end=at_end))
        for number, part in enumerate(parts, 1):
            part.memory.fill_(number)
        assert all(bool((part.memory == number).all()) for number, part in enumerate(parts, 1))
        free = opened._free.largest
        for part in parts:
            part.release()
        assert opened._free.largest == SLAB > free
        assert len(opened._free.ranges) == 2
        opened.end()
        return rank.pe.calls[-3:]

    assert on_ranks(stand_in, 2, work) == [["free_tensor", "free_tensor", "finalize"]] * 2


def test_a_smaller_group_makes_do_with_what_is_free(stand_in: StandIn) -> None:
    """It cannot allocate: that takes all PEs."""

    def work(rank: Rank) -> None:
        opened = rank.open("all", [0, 1, 2])
        if rank.rank < 2:
            opened = rank.open("pair", [0, 1], num_bytes=2 * SLAB)
        try:
            assert rank.pe.calls.count("tensor") == 1
            opened.carve(rank.exchange("part", [0, 1, 2]), 2 * SLAB)
        finally:
            opened.end()

    assert f"at most {SLAB}" in raised(on_ranks(stand_in, 3, work), CapacityError)


def test_one_that_runs_through_nvshmem4py_is_joined_and_left_running(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RELAXED, "0")

    def work(rank: Rank) -> tuple[int, list[str], int, int]:
        nvshmem4py.Nvshmem4py(0).start(b"\x07" * 128, rank.rank, 2)
        users = stand_in.tensor((8,))
        opened = rank.open("joined", [1, 0])  # a group with another order than the PEs'
        pe = opened.carve(rank.exchange("part", [1, 0]), 8).pes
        opened.end()
        assert users.data_ptr() in rank.pe.allocated
        return pe, rank.pe.calls[2:], rank.pe.status, rank.pe.counted

    assert on_ranks(stand_in, 2, work) == [((1, 0), ["tensor", "free_tensor"], 2, 1)] * 2


def test_one_that_something_else_started_is_joined_and_counted(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RELAXED, "n")

    def work(rank: Rank) -> tuple[int, int, int]:
        stand_in.start_elsewhere(rank.rank, 2)
        with pytest.raises(NvshmemInvalid):  # nvshmem4py knows nothing of it
            stand_in.tensor((8,))
        opened = rank.open("joined", [0, 1])
        assert rank.pe.counted == 2
        opened.end()
        return opened.pe, rank.pe.status, rank.pe.counted

    assert on_ranks(stand_in, 2, work) == [(0, 2, 1), (1, 2, 1)]


def test_some_that_run_it_and_some_that_do_not_are_refused(stand_in: StandIn) -> None:
    def work(rank: Rank) -> None:
        if rank.rank == 1:
            stand_in.start_elsewhere(0, 1)
        rank.open("mixed", [0, 1, 2])

    text = raised(on_ranks(stand_in, 3, work), MismatchError)
    assert text == "rank 1: NVSHMEM: got running; allowed: stopped, as on rank 0"


def test_it_is_not_started_again(stand_in: StandIn) -> None:
    def work(rank: Rank) -> None:
        rank.open("once", [0, 1]).end()
        rank.open("twice", [0, 1])

    text = raised(on_ranks(stand_in, 2, work), ModeError)
    assert "one start a process" in text


def test_an_earlier_start_of_another_size_is_noticed(stand_in: StandIn) -> None:
    def work(rank: Rank) -> None:  # its bootstrap stays
        nvshmem4py.Nvshmem4py(0).start(bytes([rank.rank + 1] * 128), 0, 1)
        stand_in.finalize()
        rank.open("larger", [0, 1])

    text = raised(on_ranks(stand_in, 2, work), ModeError)
    assert text.startswith("rank 0: NVSHMEM: got PE 0 of 1, of an earlier start in this process")


@pytest.mark.parametrize(
    ("settings", "runs", "text"),
    [
        ({RELAXED: "1"}, False, f"{RELAXED}: got '1'; allowed: 0"),
        ({RELAXED: "true"}, False, f"{RELAXED}: got 'true'; allowed: 0"),
        ({}, True, f"{RELAXED}: got not set, which is on; allowed: 0"),
        ({RELAXED: "0", CONNECTIONS: "4"}, True, f"{CONNECTIONS}: got '4'; allowed: 1"),
        ({CONNECTIONS: "2"}, False, f"{CONNECTIONS}: got '2'; allowed: 1"),
        ({TRANSPORT: "ucx"}, False, f"{TRANSPORT}: got 'ucx'; allowed: ibrc or ibdevx"),
    ],
)
def test_settings_that_lose_rows_are_refused(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, settings: dict, runs: bool, text: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def work(rank: Rank) -> None:
        if runs:
            stand_in.start_elsewhere(rank.rank, 2)
        rank.open("refused", [0, 1])

    assert text in raised(on_ranks(stand_in, 2, work), RangeError)


def test_relaxed_ordering_is_switched_off_before_the_start(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    real_init = stand_in.init
    core = sys.modules["nvshmem.core"]
    names = (RELAXED, "NVSHMEM_IB_SL", "NVSHMEM_IB_TRAFFIC_CLASS")

    def init(**options: Any) -> None:
        seen.extend(os.environ.get(name) for name in names)
        real_init(**options)

    monkeypatch.setattr(core, "init", init)
    lanes = TrafficLanes(service_level=3, traffic_class=104)
    on_ranks(stand_in, 1, lambda rank: rank.open("alone", [0], lanes=lanes).end())
    assert seen == ["0", "3", "104"]


def test_lanes_come_too_late_for_one_that_runs(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: Rank) -> None:
        opened = rank.open("first", [0, 1], lanes=TrafficLanes(service_level=3))
        assert rank.open("same", [0, 1], lanes=TrafficLanes(service_level=3)) is opened
        assert rank.open("none", [0, 1]) is opened
        try:
            rank.open("other", [0, 1], lanes=TrafficLanes(service_level=5))
        finally:
            opened.end()

    text = raised(on_ranks(stand_in, 2, work), RangeError)
    assert text.startswith(
        "rank 0: service_level: got 5; allowed: None or 3: NVSHMEM runs in this process already"
    )


@pytest.mark.parametrize(
    ("facts", "kind", "text"),
    [
        ({"version": "3.3.24"}, RangeError, "rank 1: NVSHMEM: got 3.3.24; allowed: 3.4.5 or later, of 3"),
        ({"version": "4.0.0"}, RangeError, "rank 1: NVSHMEM: got 4.0.0; allowed: 3.4.5 or later, of 3"),
        ({"version": "3.6.5"}, MismatchError, "rank 1: NVSHMEM: got 3.6.5; allowed: 3.4.5, as on rank 0"),
        (
            {"write_ordering": 0},
            RangeError,
            "rank 1: GPUDirect RDMA write ordering: got 0; allowed: at least 100",
        ),
    ],
)
def test_machines_that_cannot_are_refused_on_all_ranks(
    stand_in: StandIn, facts: dict, kind: type[DeepEPError], text: str
) -> None:
    given = on_ranks(stand_in, 2, lambda rank: rank.open("x", [0, 1]), lambda rank: facts if rank else {})
    assert raised(given, kind).startswith(text)


def test_ranks_that_ask_for_different_things_are_refused(stand_in: StandIn) -> None:
    given = on_ranks(stand_in, 2, lambda rank: rank.open("x", [0, 1], num_bytes=SLAB << rank.rank))
    assert raised(given, MismatchError) == f"rank 1: num_bytes: got {2 * SLAB}; allowed: {SLAB}, as on rank 0"
    lanes = [TrafficLanes(service_level=2), TrafficLanes()]
    given = on_ranks(stand_in, 2, lambda rank: rank.open("y", [0, 1], lanes=lanes[rank.rank]))
    assert raised(given, MismatchError) == "rank 1: service_level: got -1; allowed: 2, as on rank 0"


def test_a_start_that_fails_on_one_rank_is_learnt_by_all(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stand_in.tensor

    def tensor(*shape: Any, **options: Any) -> torch.Tensor:
        made = real(*shape, **options)
        if stand_in.pe.rank == 1:
            raise NvshmemInvalid("Failed to allocate memory of bytes 65536")
        return made

    monkeypatch.setattr(sys.modules["nvshmem.core"], "tensor", tensor)
    text = raised(on_ranks(stand_in, 2, lambda rank: rank.open("x", [0, 1])), ModeError)
    assert text.startswith("rank 1: NVSHMEM: got NvshmemInvalid: Failed to allocate memory")


def test_a_rank_that_does_not_come_is_named_in_time(stand_in: StandIn) -> None:
    def work(rank: Rank) -> None:
        if rank.rank != 1:
            exchange = rank.exchange("some", [0, 1, 2], timeout=0.3)
            rank.owner.open(exchange, rank.rank, 3, device_index=0, num_bytes=SLAB)

    given = on_ranks(stand_in, 3, work)
    assert given[1] is None
    for error in (given[0], given[2]):
        assert isinstance(error, PeerTimeoutError)
        assert error.record.waited_on == (1,)


def test_the_end_without_a_peer_waits_for_its_time_out_and_no_longer(stand_in: StandIn) -> None:
    def work(rank: Rank) -> tuple[int, bool]:
        exchange = rank.exchange("all", [0, 1], timeout=2.0)
        opened = rank.owner.open(exchange, rank.rank, 2, device_index=0, num_bytes=SLAB)
        opened._finalizer.detach()
        if rank.rank == 0:  # rank 1 has died
            opened.end()
        return rank.pe.status, "finalize" in rank.pe.calls

    assert on_ranks(stand_in, 2, work) == [(2, False), (2, False)]


def test_an_end_after_the_users_own_does_nothing(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RELAXED, "0")

    def work(rank: Rank) -> list[str]:
        nvshmem4py.Nvshmem4py(0).start(b"\x07" * 128, rank.rank, 2)
        opened = rank.open("joined", [0, 1])
        stand_in.finalize()
        opened.end()
        return rank.pe.calls

    assert on_ranks(stand_in, 2, work) == [["init", "tensor", "finalize"]] * 2


def test_the_stand_in_fails_as_the_real_one_does(stand_in: StandIn) -> None:
    pe = stand_in.enter()
    with pytest.raises(RuntimeError, match="dlopen"):  # before its library was loaded
        stand_in.init_status()
    with pytest.raises(NvshmemInvalid, match="not initialized"):
        stand_in.tensor((8,))
    with pytest.raises(Exception, match="mutex destroy failed"):  # without a context
        stand_in.init(uid=stand_in.get_unique_id(), rank=0, nranks=1, initializer_method="uid")
    with pytest.raises(NvshmemInvalid, match="Invalid init method"):
        stand_in.init()
    pe.has_context = True
    stand_in.init(uid=stand_in.get_unique_id(), rank=0, nranks=1, initializer_method="uid")
    stand_in.init(uid=stand_in.get_unique_id(), rank=3, nranks=7, initializer_method="uid")
    assert (stand_in.my_pe(), stand_in.n_pes(), pe.counted) == (0, 1, 2)  # ignored, and counted
    assert pe.python_status == InternalInitStatus.INITIALIZED


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem4py, "installed", lambda package: "")
    monkeypatch.setattr(nvshmem4py, "_has_module", lambda name: name == "numpy")
    assert nvshmem4py.missing() == (
        "not installed: nvshmem4py-cu13==0.4.1, nvidia-nvshmem-cu13==3.4.5, cuda.core, cuda.bindings, "
        "cuda.pathfinder (pip install 'deepep[nvshmem]')"
    )
    store = dist.HashStore()
    opened = NvshmemOwner()
    with pytest.raises(RangeError, match="rank 0: NVSHMEM: got not installed: nvshmem4py-cu13"):
        opened.open(StoreExchange(store, "x", 0, 1, 10.0), 0, 1, device_index=0, num_bytes=SLAB)


def test_a_binding_that_does_not_load_is_a_reason(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_version() -> None:
        raise OSError("libnvshmem_host.so.3: cannot open shared object file\nmore")

    monkeypatch.setattr(sys.modules["nvshmem.core"], "get_version", get_version)
    text = raised(on_ranks(stand_in, 2, lambda rank: rank.open("x", [0, 1])), RangeError)
    assert "OSError: libnvshmem_host.so.3: cannot open shared object file;" in text


@pytest.mark.parametrize(
    ("text", "on"),
    [("0", False), ("n", False), ("No", False), ("f", False), ("1", True), ("y", True), ("", True)],
)
def test_switches_are_read_as_nvshmem_reads_them(text: str, on: bool) -> None:
    assert is_on(text) == on
