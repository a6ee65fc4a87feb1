"""Threads in virtual time: one runs at a time, and how long each step takes is drawn.

The order of all steps follows from a seed alone: it is that of their times. For protocols between ranks that
read clocks, sleep and wait for each other, whose deadlines are far too long to be waited for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

FOREVER = float("inf")
REAL_SECONDS = 60.0
"""Seconds of real time after which a test is taken to hang."""


class Gone(BaseException):
    """Ends a thread whose process was killed."""


class _Thread:
    def __init__(self, allowance: float) -> None:
        self.turn = threading.Semaphore(0)
        self.wakes = 0.0
        self.left = self.allowance = allowance
        self.dies = FOREVER
        self.stalls = FOREVER, 0.0
        self.is_alive = True


class Schedule:
    """Runs functions as threads.

    longest: of a step, in seconds; drawn for each. allowance: what one thread may take in long steps until
    `refresh`. rarity: one of so many steps is a long one.
    """

    def __init__(
        self, seed: int, num_threads: int, allowance: float, longest: float = 0.002, rarity: int = 60
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self._longest, self._rarity = longest, rarity
        self._threads = [_Thread(allowance) for _ in range(num_threads)]
        self._current = -1

    def run(self, parts: list[Callable[[], Any]]) -> list[Any]:
        """Runs one function a thread. Returns what each returned, or raised."""
        outcomes: list[Any] = [None] * len(parts)
        over = threading.Semaphore(0)

        def play(number: int) -> None:
            thread = self._threads[number]
            thread.turn.acquire()
            try:
                outcomes[number] = parts[number]()
            except BaseException as error:  # it is what the test asks for
                outcomes[number] = error
            thread.is_alive = False
            if any(t.is_alive for t in self._threads):
                self._pass_on()
            else:
                over.release()

        for number in range(len(parts)):
            threading.Thread(target=play, args=(number,), daemon=True).start()
        self._pass_on()
        assert over.acquire(timeout=REAL_SECONDS), "nobody goes on"
        return outcomes

    @property
    def current(self) -> int:
        """The thread that runs."""
        return self._current

    def _pass_on(self) -> bool:
        """Lets the thread go on that is the next to wake; whether it is another."""
        number = min(
            (n for n, t in enumerate(self._threads) if t.is_alive), key=lambda n: self._threads[n].wakes
        )
        assert self._threads[number].wakes < FOREVER, "all wait for each other"
        self.now = max(self.now, self._threads[number].wakes)
        is_another = number != self._current
        if is_another:
            self._current = number
            self._threads[number].turn.release()
        return is_another

    def sleep(self, seconds: float) -> None:
        """Lets the others go on for so long."""
        thread = self._threads[self._current]
        moment, longer = thread.stalls
        if self.now >= moment:
            thread.stalls = FOREVER, 0.0
            seconds += longer
        thread.wakes = min(self.now + seconds, thread.dies)
        if self._pass_on():
            thread.turn.acquire()
        if self.now >= thread.dies:
            thread.dies = -FOREVER
            raise Gone

    def step(self) -> None:
        """Takes a step of a drawn length."""
        thread = self._threads[self._current]
        seconds = self.random.uniform(0.0, self._longest)
        if self.random.randrange(self._rarity) == 0:
            seconds += self.random.uniform(0.0, thread.left)
            thread.left -= max(0.0, seconds - self._longest)
        self.sleep(seconds)

    def wait(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Waits for a condition, so long at most; whether it came."""
        until = self.now + seconds
        while not is_so():
            if self.now >= until:
                return False
            self.sleep(min(0.005, until - self.now))
        return True

    def refresh(self) -> None:
        """Gives the thread that runs its allowance back."""
        self._threads[self._current].left = self._threads[self._current].allowance

    def stall(self, number: int, moment: float, seconds: float) -> None:
        """Has a thread take a step of so many seconds, once it is `moment` or later."""
        self._threads[number].stalls = moment, seconds

    def kill(self, number: int, moment: float) -> None:
        """Ends a thread then."""
        self._threads[number].dies = moment

    def is_dead(self, number: int) -> bool:
        """True if a thread was killed."""
        return self._threads[number].dies == -FOREVER
