"""The memory model, by small kernels: what may happen does over the seeds, what may not never does.

The names of the shapes are the field's: message passing, store buffering, independent reads of independent
writes, write-to-read causality. `writer` and `reader` number the orders in csrc/emulator/litmus/litmus.hpp.
"""

from __future__ import annotations

from typing import Any

import pytest

from deepep._emulator import MachineFault

RELAXED, ORDERED, FENCED, GPU_ORDERED, GPU_FENCED = range(5)
STRONG_ENOUGH = {(w, r) for w in (ORDERED, FENCED) for r in (ORDERED, FENCED)}
RACE = "data race"


def first_word(rank: int) -> Any:
    return lambda run: int(run.out[rank][0])


@pytest.mark.parametrize("writer", range(5))
@pytest.mark.parametrize("reader", range(5))
def test_message_passing_of_plain_data_needs_release_and_acquire_of_system_scope(
    litmus: Any, writer: int, reader: int
) -> None:
    run = litmus("mp_kernel", writer=writer, reader=reader)
    expected = {42} if (writer, reader) in STRONG_ENOUGH else {RACE}
    assert set(run.outcomes(range(8), first_word(1))) == expected


@pytest.mark.parametrize("writer", [RELAXED, ORDERED, FENCED, GPU_FENCED])
@pytest.mark.parametrize("reader", [RELAXED, ORDERED, FENCED, GPU_FENCED])
def test_message_passing_of_words_may_be_stale_where_nothing_orders(
    litmus: Any, writer: int, reader: int
) -> None:
    run = litmus("mp_words_kernel", writer=writer, reader=reader)
    expected = {42} if (writer, reader) in STRONG_ENOUGH else {0, 42}
    assert set(run.outcomes(range(60), first_word(1))) == expected


def test_a_wait_at_too_narrow_a_scope_races_with_the_flag_itself(litmus: Any) -> None:
    for writer, reader in ((GPU_ORDERED, ORDERED), (ORDERED, GPU_ORDERED)):
        assert set(litmus("mp_words_kernel", writer=writer, reader=reader).outcomes(range(5))) == {RACE}


def test_store_buffering_is_allowed(litmus: Any) -> None:
    """An acq_rel fence does not forbid it: only a sequentially consistent one would."""
    found = litmus("sb_kernel").outcomes(range(60), lambda run: (run.out[0][0], run.out[1][0]))
    assert set(found) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_coherence(litmus: Any) -> None:
    """A relaxed reader of one word may lag behind, and never goes back."""
    found = litmus("coherence_kernel").outcomes(range(60), lambda run: tuple(run.out[1][:6]))
    assert all(list(seen) == sorted(seen) for seen in found)
    assert any(0 < seen[0] < seen[-1] for seen in found)
    assert len(found) > 20


def test_independent_reads_of_independent_writes_may_disagree(litmus: Any) -> None:
    run = litmus("iriw_kernel", ranks=4)
    found = set()
    for seed in range(600):
        run.run(seed)
        found.add((tuple(run.out[2][:2]), tuple(run.out[3][:2])))
    assert ((1, 0), (1, 0)) in found  # each has seen the write that the other has not


@pytest.mark.parametrize(
    ("writer", "reader", "expected"),
    [
        (ORDERED, ORDERED, 42),
        (FENCED, FENCED, 42),
        (RELAXED, ORDERED, RACE),
        (ORDERED, RELAXED, RACE),
        (GPU_ORDERED, ORDERED, RACE),
    ],
)
def test_causality_passes_through_a_third_rank(litmus: Any, writer: int, reader: int, expected: Any) -> None:
    run = litmus("chain_kernel", ranks=3, writer=writer, reader=reader)
    assert set(run.outcomes(range(10), first_word(2))) == {expected}


def test_a_counter_orders_all_before_the_last(litmus: Any) -> None:
    def run(writer: int) -> Any:
        return litmus("counter_kernel", ranks=1, blocks=2, threads=64, writer=writer)

    assert set(run(0).outcomes(range(4))) == {RACE}  # relaxed
    assert set(run(1).outcomes(range(4))) == {RACE}  # release alone
    assert set(run(2).outcomes(range(4), first_word(0))) == {sum(range(128))}  # acq_rel


def test_an_atomic_hands_on_a_release_and_a_store_ends_it(litmus: Any) -> None:
    def run(writer: int) -> Any:
        return litmus("sequence_blocks_kernel", ranks=1, blocks=3, writer=writer)

    assert set(run(1).outcomes(range(30), first_word(0))) == {42}
    assert RACE in run(0).outcomes(range(30), first_word(0))


@pytest.mark.parametrize(
    ("between", "neighbour", "lawful"),
    [
        ("nothing", 1, False),
        ("sync_block", 1, True),
        ("sync_block", 32, True),
        ("sync_warp", 1, False),  # the last lane's neighbour is in the other warp
        ("sync_warp", 32, False),
        ("ballot", 1, False),
    ],
)
def test_shared_memory_needs_a_barrier_that_reaches(
    litmus: Any, between: str, neighbour: int, lawful: bool
) -> None:
    writer = ("nothing", "sync_block", "sync_warp", "ballot").index(between)
    run = litmus("shared_kernel", ranks=1, threads=64, shared=256, writer=writer, reader=neighbour)
    assert ("done" in run.outcomes(range(5))) == lawful


def test_a_ballot_orders_no_memory_within_a_warp(litmus: Any) -> None:
    run = litmus("shared_kernel", ranks=1, threads=32, shared=256, writer=3, reader=1)
    assert set(run.outcomes(range(5))) == {RACE}
    run = litmus("shared_kernel", ranks=1, threads=32, shared=256, writer=2, reader=1)
    assert set(run.outcomes(range(5))) == {"done"}


@pytest.mark.parametrize("sender_meets", [0, 1])
@pytest.mark.parametrize("receiver_meets", [0, 1])
def test_one_thread_releases_for_its_block_behind_a_barrier(
    litmus: Any, sender_meets: int, receiver_meets: int
) -> None:
    run = litmus("block_release_kernel", threads=64, writer=sender_meets, reader=receiver_meets)
    expected = {"done"} if sender_meets and receiver_meets else {RACE}
    assert set(run.outcomes(range(6))) == expected


MISTAKES = (
    "divergence",
    "divergence",
    "divergence",
    "divergence",
    "read of memory never written",
    "out of bounds",
    "out of bounds",
    "out of bounds",
    "misaligned access",
    RACE,
    RACE,
    RACE,
    RACE,
    RACE,
    RACE,
)


@pytest.mark.parametrize(("number", "kind"), tuple(enumerate(MISTAKES)))
def test_mistakes_fail_under_every_schedule(litmus: Any, number: int, kind: str) -> None:
    run = litmus("mistake_kernel", ranks=1, threads=64, shared=256, writer=number)
    assert set(run.outcomes(range(5))) == {kind}


def test_bytes_of_one_word_are_apart(litmus: Any) -> None:
    run = litmus("bytes_kernel", ranks=1, threads=64)
    assert set(run.outcomes(range(5), lambda run: hex(run.out[0][1]))) == {"0x7060504"}


def test_a_flag_nobody_raises_is_a_deadlock(litmus: Any) -> None:
    outcome = litmus("wait_kernel", writer=0).run(0)
    assert outcome.kind == "deadlock"
    assert "rank 1 wait#1 block 0 thread 0 waits at litmus.hpp" in outcome.text
    assert "words@0+0 == 1 (acquire.sys); it holds 0, never written since the start" in outcome.text


def test_a_flag_that_moves_on_is_a_lost_wake_up(litmus: Any) -> None:
    """Raised to 1 and then to 2: whoever waits for exactly 1 may miss it."""
    found = litmus("wait_kernel", writer=1, reader=1).outcomes(range(40), first_word(1))
    assert set(found) == {1, "deadlock"}


def test_a_stopped_writer_ends_in_the_deadline(litmus: Any) -> None:
    found = set()
    for seed in range(60):
        run = litmus("wait_kernel", writer=1, faults=[MachineFault(rank=0, at=seed % 15 + 1)])
        outcome = run.run(seed)
        assert outcome.status == "done"
        if run.out[1][0] == 2:
            assert outcome.now_ns > run.timeout_ns
        found.add(int(run.out[1][0]))
    assert found == {1, 2}


def test_a_write_may_be_lost_with_its_rank(litmus: Any) -> None:
    """Stopped right after its only write: that arrives, or it does not."""
    found = set()
    for seed in range(60):
        stop = MachineFault(rank=0, at=1, counts_writes=True, loses_writes=True)
        run = litmus("wait_kernel", writer=1, faults=[stop])
        assert run.run(seed).status == "done"
        found.add(int(run.out[1][0]))
    assert found == {1, 2}


@pytest.mark.parametrize("strategy", ["random", "pct", "starve"])
def test_a_deadline_is_met_while_others_poll(litmus: Any, strategy: str) -> None:
    """A second of patience beside a warp that polls: time passes in leaps, and the waiting warp notices."""
    for seed in range(20):
        run = litmus(
            "watching_kernel",
            threads=64,
            shared=16,
            timeout_ns=1_000_000_000,
            faults=[MachineFault(rank=0, at=1, loses_writes=True)],
        )
        outcome = run.run(seed, strategy)
        assert outcome.status == "done", outcome.text
        assert run.out[1][0] in (1, 2)
        assert run.out[1][0] == 1 or outcome.now_ns > run.timeout_ns


def test_hand_made_spins_end(litmus: Any) -> None:
    assert set(litmus("spin_kernel", reader=0).outcomes(range(15), first_word(1))) == {2}
    assert set(litmus("spin_kernel", reader=1).outcomes(range(15), first_word(1))) == {1}


def test_blocks_beyond_the_sms_wait_their_turn(litmus: Any) -> None:
    run = litmus("counter_kernel", ranks=1, blocks=3, threads=64, num_sms=1, writer=2)
    assert set(run.outcomes(range(4), first_word(0))) == {sum(range(192))}


def test_a_seed_replays_exactly(litmus: Any) -> None:
    for strategy in ("random", "pct", "starve"):
        for seed in range(10):
            runs = [litmus("iriw_kernel", ranks=4) for _ in range(2)]
            first, second = (run.run(seed, strategy) for run in runs)
            assert (first.steps, first.switches, first.now_ns) == (
                second.steps,
                second.switches,
                second.now_ns,
            )
            assert all((a == b).all() for a, b in zip(runs[0].out, runs[1].out, strict=True))


def test_a_race_is_told_from_both_sides(litmus: Any) -> None:
    """Both accesses are reported: who, where, what, and the ordered operations that lie between."""
    text = litmus("mp_kernel", writer=ORDERED, reader=RELAXED).run(0).text
    assert "rank 1 mp#1 block 0 thread 0: plain load of 4 bytes, words@0+0, at litmus.hpp" in text
    assert "after rank 0 mp#1 block 0 thread 0: plain store at litmus.hpp" in text
    assert "nothing orders the earlier before the later" in text
    assert "release.sys store words@0+0x100 = 1" in text
    assert "relaxed.sys load words@0+0x100 -> 1" in text
