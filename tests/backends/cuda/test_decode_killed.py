"""Processes are killed in decoding, spread over the phases of its calls: the others go on, on GPUs.

DEEPEP_DECODE_DEATHS: how many of them, 50 if it is not set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from harness.decode_deaths import DecodeDeath, Scene, decode_deaths
from harness.low_latency_trips import LowLatencyShape

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SHAPE = LowLatencyShape((24, 30, 17), most=32, hidden=1024, topk=6, local_experts=8, pattern="distinct")
TIMEOUT = 5.0


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    made = Scene(True, SHAPE, TIMEOUT)
    yield made
    made.clear()


@pytest.mark.parametrize("death", decode_deaths(int(os.environ.get("DEEPEP_DECODE_DEATHS", "50"))), ids=str)
def test_the_others_go_on(scene: Scene, death: DecodeDeath) -> None:
    scene.play(death)
