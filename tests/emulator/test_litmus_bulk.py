"""Bulk copies, mbarriers and the async proxy, by small kernels (csrc/emulator/litmus/bulk.hpp).

Variant 0 of each is right, and never fails; every other lacks one thing, and fails as stated. Where a set is
given, all of its members must appear over the seeds and nothing else may.
"""

from __future__ import annotations

from typing import Any

import pytest

from deepep._emulator import MachineFault

RACE = "data race"
UNWRITTEN = "read of memory never written"
MISUSE = "mbarrier misuse"
OUTSTANDING = "copies outstanding"
DEADLOCK = "deadlock"
SHARED = 4096


@pytest.fixture
def litmus(litmus: Any) -> Any:
    """With patience: a copy may take a thousand times as long as a flag."""

    def run(kernel: str, **how: Any) -> Any:
        return litmus(kernel, timeout_ns=100_000_000, **how)

    return run


def first_word(rank: int) -> Any:
    return lambda run: int(run.out[rank][0])


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (0, {"done"}),
        (1, {RACE}),
        (2, {RACE, UNWRITTEN}),
        (3, {RACE}),
        (4, {RACE, UNWRITTEN}),
        (5, {RACE, UNWRITTEN, MISUSE}),
        (6, {DEADLOCK, MISUSE}),
        (7, {OUTSTANDING}),
        (8, {RACE, UNWRITTEN}),
    ],
)
def test_a_bulk_load_is_there_when_its_phase_was_waited_for(
    litmus: Any, variant: int, expected: set[Any]
) -> None:
    run = litmus("bulk_load_kernel", ranks=1, shared=SHARED, writer=variant)
    found = set(run.outcomes(range(60)))
    assert found <= expected, found
    assert ("done" in found) == (variant == 0)


@pytest.mark.parametrize(
    ("variant", "lawful"),
    [(0, True), (1, False), (2, True), (3, False), (4, False), (5, False), (6, False), (7, False), (9, True)],
)
def test_a_bulk_store_is_fenced_waited_for_and_released(litmus: Any, variant: int, lawful: bool) -> None:
    run = litmus("bulk_store_kernel", shared=SHARED, writer=variant)
    found = set(run.outcomes(range(40), lambda run: int(run.out[1][9])))
    assert found == {16} if lawful else found and found <= {RACE, UNWRITTEN}, found


def test_a_store_that_was_not_committed_is_never_waited_for(litmus: Any) -> None:
    run = litmus("bulk_store_kernel", shared=SHARED, writer=8)
    assert set(run.outcomes(range(20))) == {OUTSTANDING}


RELOADED = sum(100 * i + (5 + i) % 32 for i in range(5))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [(0, {RELOADED}), (1, {RACE}), (2, {RACE, MISUSE}), (3, {RACE}), (4, {RACE, MISUSE}), (5, {MISUSE})],
)
def test_a_stage_is_reloaded_behind_a_barrier_and_a_proxy_fence(
    litmus: Any, variant: int, expected: set[Any]
) -> None:
    run = litmus("reload_kernel", ranks=1, shared=SHARED, writer=variant)
    found = set(run.outcomes(range(30), lambda run: int(run.out[0][5])))
    assert found
    assert found <= expected


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (0, {sum(range(8 * 32))}),
        (1, {RACE}),
        (2, {RACE}),
        (3, {OUTSTANDING}),
        (4, {OUTSTANDING}),
        (5, {RACE}),
    ],
)
def test_a_stage_is_loaded_again_when_its_store_was_read(
    litmus: Any, variant: int, expected: set[Any]
) -> None:
    run = litmus("relay_kernel", ranks=1, shared=SHARED, writer=variant)
    assert set(run.outcomes(range(30), first_word(0))) == expected


@pytest.mark.parametrize(("group", "expected"), [(0, {1}), (1, {RACE, UNWRITTEN})])
def test_groups_complete_in_their_order(litmus: Any, group: int, expected: set[Any]) -> None:
    run = litmus("groups_kernel", ranks=1, shared=SHARED, writer=group)
    found = set(run.outcomes(range(30), first_word(0)))
    assert found
    assert found <= expected


@pytest.mark.parametrize(("variant", "expected"), [(0, 5), (1, RACE), (2, 5), (3, RACE), (4, RACE)])
def test_what_another_rank_stored_plainly_is_pulled_behind_a_proxy_fence(
    litmus: Any, variant: int, expected: Any
) -> None:
    run = litmus("pull_kernel", shared=SHARED, writer=variant)
    assert set(run.outcomes(range(20), first_word(1))) == {expected}


@pytest.mark.parametrize(("variant", "expected"), [(0, 60), (1, RACE), (2, 60)])
def test_what_another_rank_read_plainly_is_stored_to_behind_a_proxy_fence(
    litmus: Any, variant: int, expected: Any
) -> None:
    run = litmus("give_back_kernel", shared=SHARED, writer=variant)
    assert set(run.outcomes(range(20), first_word(1))) == {expected}


@pytest.mark.parametrize("launches", [2, 50])
def test_the_end_of_a_kernel_is_a_proxy_fence(litmus: Any, launches: int) -> None:
    run = litmus("boundary_kernel", ranks=1, shared=SHARED, launches=launches)
    assert set(run.outcomes(range(10), first_word(0))) == {5}


@pytest.mark.parametrize(("variant", "expected"), [(0, "done"), (1, RACE), (2, RACE)])
def test_an_mbarrier_releases_and_acquires(litmus: Any, variant: int, expected: str) -> None:
    run = litmus("hand_over_kernel", ranks=1, threads=64, shared=SHARED, writer=variant)
    assert set(run.outcomes(range(10))) == {expected}


@pytest.mark.parametrize(("variant", "expected"), [(0, {60}), (1, {RACE})])
def test_a_flag_without_a_generation_takes_a_stale_signal(
    litmus: Any, variant: int, expected: set[Any]
) -> None:
    run = litmus("generation_kernel", writer=variant)
    found = set(run.outcomes(range(40), first_word(1)))
    assert found == expected if variant == 0 else found >= expected, found


@pytest.mark.parametrize(("variant", "expected"), [(0, {1}), (1, {RACE})])
def test_a_slot_is_cleaned_when_no_write_is_in_flight(litmus: Any, variant: int, expected: set[Any]) -> None:
    run = litmus("cleaning_kernel", shared=SHARED, writer=variant)
    assert set(run.outcomes(range(40), first_word(1))) == expected


@pytest.mark.parametrize("kernel", ["bulk_store_kernel", "put_signal_kernel"])
@pytest.mark.parametrize("loses", [False, True])
def test_copies_of_a_rank_that_stops_arrive_or_do_not(litmus: Any, kernel: str, loses: bool) -> None:
    """Its peer then ends in its deadline, or has everything."""
    nodes = {"ranks_per_node": 1} if kernel.startswith("put") else {}
    arrived = {"bulk_store_kernel": 16, "put_signal_kernel": 42}[kernel]
    found = set()
    for seed in range(120):
        stop = MachineFault(rank=0, at=seed + 1, loses_writes=loses)
        run = litmus(kernel, shared=SHARED, faults=[stop], **nodes)
        outcome = run.run(seed)
        assert outcome.status == "done", outcome.text
        found.add(int(run.out[1][9 if arrived == 16 else 0]))
    assert found == {0, arrived}


MISTAKES = (
    "misaligned access",
    "misaligned access",
    "out of bounds",
    "foreign memory",
    "foreign memory",
    UNWRITTEN,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
    MISUSE,
)


@pytest.mark.parametrize(("number", "kind"), tuple(enumerate(MISTAKES)))
def test_mistakes_fail_under_every_schedule(litmus: Any, number: int, kind: str) -> None:
    run = litmus("bulk_mistake_kernel", ranks=1, shared=SHARED, writer=number)
    found = set(run.outcomes(range(8)))
    assert found == {kind}, found


def test_an_mbarrier_lives_and_lives_again(litmus: Any) -> None:
    run = litmus("barrier_life_kernel", ranks=1, shared=SHARED)
    assert set(run.outcomes(range(5), first_word(0))) == {1}


def test_a_race_with_a_copy_is_told(litmus: Any) -> None:
    """The copy is named, from where to where, and what was missing."""
    text = litmus("relay_kernel", ranks=1, shared=SHARED, writer=2).run(3).text
    assert "bulk store of 128 bytes, shared memory of rank 0 block 0+0x40 to words@0+0x400" in text
    assert "nobody had waited for that copy" in text
    text = litmus("pull_kernel", shared=SHARED, writer=1).run(3).text
    assert "rank 1 pull#1 block 0 thread 0: bulk load's read of 128 bytes, words@0+0" in text
    assert "after rank 0 pull#1 block 0 thread 0: plain store at bulk.hpp" in text
    assert "but no proxy fence (fence_async) lies between" in text
