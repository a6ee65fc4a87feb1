"""Waits of the host for sums on a device: who is missing is looked for, since no connection says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from deepep.collectives.step_operations import StepOperations
from deepep.runtime.control import transport
from deepep.runtime.control.transport import LinkError


class Waiting(StepOperations):
    """On a device that is done after so many looks. failing: raised by the second look for who is missing."""

    def __init__(self, looks: int, failing: Exception | None, timeout: float = 60.0) -> None:
        self.left, self.asked = looks, 0

        def query() -> bool:
            self.left -= 1
            return self.left < 0

        def check_members() -> None:
            self.asked += 1
            if self.asked == 2 and failing is not None:
                raise failing

        def locally(job: Callable[[], None], schedule: object) -> None:
            job()

        control: Any = SimpleNamespace(
            session=SimpleNamespace(stream=SimpleNamespace(query=query)),
            membership=SimpleNamespace(check_members=check_members),
            timeout=timeout,
            locally=locally,
        )
        self._control = control


def test_a_device_that_is_done_asks_for_nobody() -> None:
    waiting = Waiting(0, None)
    waiting._await_device()
    assert waiting.asked == 0


def test_sums_that_never_end_are_given_up_when_a_rank_is_gone() -> None:
    waiting = Waiting(1 << 40, LinkError("[1] are gone"))
    with pytest.raises(LinkError, match="gone"):
        waiting._await_device()


def test_or_at_the_time_out() -> None:
    with pytest.raises(LinkError, match="in time"):
        Waiting(1 << 40, None, timeout=0.05)._await_device()


def test_on_the_cpu_there_is_no_device() -> None:
    waiting = Waiting(1 << 40, None)
    waiting._control.session.stream = None
    waiting._await_device()


@pytest.mark.parametrize("before", [None, "3"])
def test_nccls_watchdog_does_not_end_the_process(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads its setting where a group is made; the user's own groups keep theirs."""
    name, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)

    class Refusing:
        Options = SimpleNamespace

        def __init__(self, *arguments: object) -> None:
            seen.append(os.environ.get(name))
            raise RuntimeError("no GPUs found")

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Refusing, raising=False)
    with pytest.raises(LinkError, match="no GPUs"):
        transport.private_group(dist.HashStore(), 0, 1, 1.0, "cuda")
    assert seen == ["0"]
    assert os.environ.get(name) == before
