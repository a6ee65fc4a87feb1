"""Puts to other domains, by small kernels (csrc/emulator/litmus/put.hpp): NVSHMEM's ordering, no more."""

from __future__ import annotations

from typing import Any

import pytest

RACE = "data race"


@pytest.fixture
def litmus(litmus: Any) -> Any:
    """Each rank on a node of its own, unless given one; with patience for the network."""

    def run(kernel: str, **how: Any) -> Any:
        return litmus(kernel, **{"ranks_per_node": 1, "timeout_ns": 100_000_000, "shared": 4096, **how})

    return run


def first_word(rank: int) -> Any:
    return lambda run: int(run.out[rank][0])


@pytest.mark.parametrize(
    ("variant", "expected"),
    [(0, 42), (1, RACE), (2, 42), (3, RACE), (4, RACE), (5, RACE), (6, 42), (7, 42), (8, RACE)],
)
def test_a_signal_tells_of_its_put_and_of_those_a_fence_puts_before_it(
    litmus: Any, variant: int, expected: Any
) -> None:
    run = litmus("put_signal_kernel", writer=variant)
    found = set(run.outcomes(range(40), first_word(1)))
    assert found == {42} if expected == 42 else 42 not in found
    assert expected in found


def test_another_node_is_not_reached_by_pointers(litmus: Any) -> None:
    assert set(litmus("put_signal_kernel", writer=9).outcomes(range(4))) == {"foreign memory"}
    assert set(litmus("put_signal_kernel", writer=9, ranks_per_node=2).outcomes(range(4))) != {
        "foreign memory"
    }


@pytest.mark.parametrize(("variant", "expected"), [(0, 106), (1, RACE), (2, RACE)])
def test_a_source_is_written_again_behind_a_quiet(litmus: Any, variant: int, expected: Any) -> None:
    run = litmus("put_source_kernel", writer=variant)
    assert set(run.outcomes(range(30), first_word(1))) == {expected}


@pytest.mark.parametrize(("variant", "expected"), [(0, 303), (1, RACE), (2, RACE)])
def test_a_slot_is_given_back_behind_a_fence_of_the_system(litmus: Any, variant: int, expected: Any) -> None:
    run = litmus("put_again_kernel", writer=variant)
    assert set(run.outcomes(range(30), first_word(1))) == {expected}


@pytest.mark.parametrize(("variant", "expected"), [(0, 42), (1, RACE), (2, RACE), (3, "foreign memory")])
def test_what_came_from_another_node_is_handed_on_over_nvlink(
    litmus: Any, variant: int, expected: Any
) -> None:
    run = litmus("put_relay_kernel", ranks=4, ranks_per_node=2, writer=variant)
    assert set(run.outcomes(range(20), first_word(3))) == {expected}


def test_a_signal_that_is_added_to_tells_of_all_its_puts(litmus: Any) -> None:
    assert set(litmus("put_count_kernel", ranks=3).outcomes(range(30), first_word(2))) == {80}
    found = set(litmus("put_count_kernel", ranks=3, writer=1).outcomes(range(30), first_word(2)))
    assert RACE in found or "read of memory never written" in found


@pytest.mark.parametrize(("variant", "expected"), [(0, 42), (1, RACE)])
def test_what_came_is_copied_on_behind_a_proxy_fence(litmus: Any, variant: int, expected: Any) -> None:
    run = litmus("put_then_bulk_kernel", writer=variant)
    assert set(run.outcomes(range(20), first_word(1))) == {expected}


@pytest.mark.parametrize(("variant", "lawful"), [(0, True), (1, False), (2, False)])
def test_the_end_of_a_kernel_completes_no_put(litmus: Any, variant: int, lawful: bool) -> None:
    run = litmus("put_cleaning_kernel", launches=2, writer=variant)
    run.launches_of = {1: 1}
    found = set(run.outcomes(range(60), first_word(1)))
    assert found == ({3} if lawful else {RACE}), found


@pytest.mark.parametrize(("variant", "expected"), [(0, "done"), (1, RACE)])
def test_a_quiet_completes_what_its_thread_knows_of(litmus: Any, variant: int, expected: str) -> None:
    run = litmus("put_quiet_kernel", threads=64, writer=variant)
    found = set(run.outcomes(range(30)))
    assert expected in found
    assert found <= {expected, "done"}


@pytest.mark.parametrize(("variant", "carries"), [(0, False), (10, True)])
def test_on_a_weak_network_only_a_signal_that_is_added_carries_its_put(
    litmus: Any, variant: int, carries: bool
) -> None:
    run = litmus("put_signal_kernel", writer=variant, weak_signals=True)
    assert set(run.outcomes(range(30), first_word(1))) == ({42} if carries else {RACE})


def test_more_open_puts_than_the_queue_holds_are_found_out(litmus: Any) -> None:
    for limit, expected in ((4, {40}), (3, {40, "too many open puts"}), (0, {40})):
        run = litmus("put_open_kernel", reader=4, max_open_puts=limit)
        assert set(run.outcomes(range(30), first_word(1))) == expected


def test_memory_of_a_nic_is_reached_by_no_mapping(litmus: Any) -> None:
    """Nor is another domain's: in one domain the links of a neighbour are."""
    for variant, kind in ((0, "done"), (1, "done"), (8, "foreign memory")):
        run = litmus("put_mistake_kernel", writer=variant, ranks_per_node=2)
        assert set(run.outcomes(range(4))) == {kind}


MISTAKES = (
    *(*["foreign memory"] * 5, "out of bounds", "foreign memory", "out of bounds"),
    *(*["foreign memory"] * 3, "empty put"),
)


@pytest.mark.parametrize(("number", "kind"), tuple(enumerate(MISTAKES)))
def test_mistakes_fail_under_every_schedule(litmus: Any, number: int, kind: str) -> None:
    run = litmus("put_mistake_kernel", writer=number)
    assert set(run.outcomes(range(4))) == {kind}


def test_a_race_with_a_put_is_told(litmus: Any) -> None:
    texts = [litmus("put_source_kernel", writer=1).run(seed).text for seed in range(30)]
    later = "rank 0 put_source#1 block 0 thread 0: plain store of 4 bytes, words@0+0, at put.hpp"
    told = [text for text in texts if text.startswith(later)]
    assert told
    assert "put of 64 bytes, words@0+0 to words@1+0x100, issued at put.hpp" in told[0]
    assert "nobody had seen that put delivered" in told[0]
