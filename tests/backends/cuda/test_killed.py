"""A rank is killed at every point of a training step; one process survives it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from harness.deaths import Death, Setting, Survived, deaths, play, play_return, prepare

from deepep.sim import World
from deepep.sim.worlds.world import PendingRun

pytestmark = pytest.mark.gpu

SETTING = Setting(
    cuda=True,
    num_tokens=(1024, 700),
    few_tokens=(100, 77),
    hidden=7168,
    num_experts=256,
    topk=8,
    backend="cuda",
    timeout=1.5,
)


#: So few SMs that the copy engine returns the rows of a combine: some 12 MB from each to the other.
FEW_SMS = replace(SETTING, num_sms=8)


class Stage:
    """A survivor, and a victim on another GPU if there is one; the next victim wakes up meanwhile."""

    def __init__(self) -> None:
        self._survivor: World | None = None
        self._next: tuple[World, PendingRun] = self._wake_victim()

    @staticmethod
    def _wake_victim() -> tuple[World, PendingRun]:
        world = World(1, timeout=120.0)
        return world, world.submit(prepare, SETTING, 1)

    @property
    def survivor(self) -> World:
        if self._survivor is None or not self._survivor.healthy:
            self._survivor = World(1, timeout=120.0)
            self._survivor.run(prepare, SETTING, 0)
        return self._survivor

    def victim(self) -> World:
        """A process that has its device and its kernels ready."""
        world, waking = self._next
        self._next = self._wake_victim()
        waking.results()
        return world

    def act(self, how: Callable[..., Survived], death: Death, setting: Setting) -> None:
        """Plays a death with a new victim."""
        survivor, victim = self.survivor, self.victim()
        try:
            print(how(survivor, victim, death, setting))
        finally:
            victim.discard()

    def clear(self) -> None:
        """Ends all processes."""
        for world in (self._survivor, self._next[0]):
            if world is not None:
                world.discard()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.clear()


@pytest.mark.parametrize("death", deaths(graphs=True), ids=str)
def test_the_survivor_names_the_dead_and_works_on(stage: Stage, death: Death) -> None:
    stage.act(play, death, SETTING)


@pytest.mark.parametrize(
    "death",
    [
        Death("combine"),
        Death("combine", inside=True, victim=0),
        Death("async combine", inside=True, settles=False),
        Death("combine event", waits=False, settles=False),
    ],
    ids=str,
)
def test_a_death_beside_copy_engines(stage: Stage, death: Death) -> None:
    stage.act(play, death, FEW_SMS)


@pytest.mark.parametrize("setting", [SETTING, FEW_SMS], ids=["24 SMs", "8 SMs"])
@pytest.mark.parametrize(
    "death", [Death("combine", victim=0), Death("dispatch", inside=True, settles=False)], ids=str
)
def test_a_rank_that_comes_back_late_does_no_harm(stage: Stage, death: Death, setting: Setting) -> None:
    stage.act(play_return, death, setting)
