"""A rank killed at every point of a training step, without a GPU: the reference, and the kernels' source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness.deaths import Death, Setting, deaths, play, play_return, prepare

from deepep.sim import World

pytestmark = pytest.mark.alone

POINTS = deaths(graphs=False)


@pytest.fixture(scope="module")
def survivors() -> Iterator[dict[str, World]]:
    """One process for each backend, which survives all deaths."""
    worlds: dict[str, World] = {}
    yield worlds
    for world in worlds.values():
        world.discard()


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize("death", POINTS, ids=str)
def test_the_survivor_names_the_dead_and_works_on(
    survivors: dict[str, World], death: Death, backend: str
) -> None:
    play_with(play, survivors, death, backend)


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize(
    "death", [Death("combine", victim=0), Death("dispatch", inside=True, settles=False)], ids=str
)
def test_a_rank_that_comes_back_late_does_no_harm(
    survivors: dict[str, World], death: Death, backend: str
) -> None:
    play_with(play_return, survivors, death, backend)


def test_a_victim_that_lives_is_reported(survivors: dict[str, World]) -> None:
    with pytest.raises(AssertionError, match="was not killed"):
        play_with(play, survivors, Death("nowhere"), "reference")


def play_with(run: Any, survivors: dict[str, World], death: Death, backend: str) -> None:
    """One death, with a victim of its own."""
    setting = Setting(cuda=False, backend=backend)
    if backend not in survivors or not survivors[backend].healthy:
        survivors[backend] = World(1)
        survivors[backend].run(prepare, setting, 0)
    victim = World(1)
    try:
        victim.run(prepare, setting, 1)
        run(survivors[backend], victim, death, setting)
    finally:
        victim.discard()
