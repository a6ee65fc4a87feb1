"""Committing: drawn steps of ranks that a fault interrupts anywhere, and what each does by the reports."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from deepep.runtime.control.committing import course_of_step
from deepep.runtime.control.meeting import Verdict
from deepep.runtime.control.shrinking import Course

MEMBERS = (0, 1, 2, 3)
STEP = ("collective", "all_reduce", "commit")
"""Operations of a step; a rank that is in one of them has come through those before it."""


class Reports:
    """In the place of a meeting that a fault has ended: its store, and who asks."""

    def __init__(self, posted: dict[str, bytes], verdict: Verdict, rank: int = 0) -> None:
        self.posted, self.ended, self.rank = posted, verdict, rank
        self.store = self

    def get(self, key: str) -> bytes | None:
        return self.posted.get(key)

    def verdict(self) -> Verdict:
        return self.ended


def courses(places: dict[int, int], dead: set[int]) -> dict[int, Course]:
    """Courses of the survivors. places: how many operations a rank has come through on the link, all steps
    after one another; it reports the next.
    """
    verdict = Verdict(tuple(dead), len(MEMBERS) - len(dead), "")
    posted = {
        f"report/{rank}": json.dumps({"at": [place + 1, STEP[place % 3], "control"]}).encode()
        for rank, place in places.items()
        if rank not in dead
    }
    return {
        rank: course_of_step(Reports(posted, verdict, rank), verdict, MEMBERS)  # type: ignore[arg-type]
        for rank in MEMBERS
        if rank not in dead
    }


@given(
    furthest=st.integers(0, 8),
    behind=st.lists(st.booleans(), min_size=4, max_size=4),
    dead=st.sets(st.sampled_from(MEMBERS), max_size=3),
)
def test_all_apply_a_step_or_none_does(furthest: int, behind: list[bool], dead: set[int]) -> None:
    """Nobody comes through an operation that another has not come to: places differ by one at most."""
    places = {rank: max(0, furthest - behind[rank]) for rank in MEMBERS}
    found = courses(places, dead)
    steps = {}  # that a rank has applied once it has done as it should
    for rank, course in found.items():
        steps[rank] = places[rank] // 3 + (course is Course.GO_ON)
        if course is Course.REPEAT:  # it has its own gradients still
            assert places[rank] % 3 in (1, 2)
    assert len(set(steps.values())) == 1
    # Who goes on begins a step, and those who were ahead begin the same from its beginning.
    if Course.GO_ON in found.values():
        assert set(found.values()) <= {Course.GO_ON, Course.RESTART}
    else:
        assert len(set(found.values())) == 1
    # Nobody who has come through a commit is asked to do that step again.
    assert all(steps[rank] >= places[rank] // 3 for rank in found)


def test_a_step_of_some_beside_a_commit_of_others() -> None:
    """One rank has given up in its backward, after its sums, which all the others have: nobody applies it."""
    verdict = Verdict((3,), 3, "")
    places = {0: [5, "commit", "control"], 1: [5, "commit", "control"], 2: [5, "step", "forward or backward"]}
    posted = {f"report/{rank}": json.dumps({"at": at}).encode() for rank, at in places.items()}
    for rank in places:
        meeting = Reports(posted, verdict, rank)
        assert course_of_step(meeting, verdict, MEMBERS) is Course.RESTART  # type: ignore[arg-type]


def test_the_one_that_is_missing_is_left_out_and_nobody_else() -> None:
    verdict = Verdict((2,), 3, "")
    posted = {f"arrived/{rank}": b"all_reduce" for rank in (0, 1, 3)}
    found = [course_of_step(Reports(posted, verdict, r), verdict, MEMBERS) for r in MEMBERS]  # type: ignore[arg-type]
    assert found == [Course.REPEAT, Course.REPEAT, Course.LEFT_OUT, Course.REPEAT]
    del posted["arrived/1"]  # had not come when the meeting ended
    assert course_of_step(Reports(posted, verdict), verdict, MEMBERS) is Course.RESTART  # type: ignore[arg-type]
    other = Reports(posted, Verdict((3,), 3, ""), 1)  # which looks at the meeting before
    assert course_of_step(other, verdict, MEMBERS) is Course.RESTART  # type: ignore[arg-type]


def test_nothing_is_done_where_nobody_can_be_named() -> None:
    verdict = Verdict((), 2, "")
    assert course_of_step(Reports({}, verdict), verdict, MEMBERS) is Course.RAISE  # type: ignore[arg-type]
