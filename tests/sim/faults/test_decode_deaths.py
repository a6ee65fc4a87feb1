"""A process is killed in decoding, on CPUs: the others go on without it in the same call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.decode_deaths import DecodeDeath, Scene
from harness.low_latency_trips import LowLatencyShape

SHAPE = LowLatencyShape((6, 8, 5), most=8, hidden=128, topk=3, local_experts=2, pattern="distinct")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    made = Scene(False, SHAPE, timeout=3.0)
    yield made
    made.clear()


@pytest.mark.parametrize(
    "death",
    [DecodeDeath("dispatch's hook", 2, 0), DecodeDeath("combine of one launch", 0, 100)],
    ids=str,
)
def test_the_others_go_on(scene: Scene, death: DecodeDeath) -> None:
    scene.play(death)
