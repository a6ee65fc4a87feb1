"""Construction: what one rank refuses or raises, all raise, and then the group is as good as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.rank_threads import Ranks, raised, works

import deepep
from deepep.api.arguments import timeout_of
from deepep.errors import ArgumentError, ArgumentTypeError, MismatchError, PeerTimeoutError, RangeError
from deepep.runtime import backends as registry
from deepep.runtime.control import connecting

pytestmark = pytest.mark.alone

LONG = 60.0  # a time-out that no test waits for
SHORT = 3.0  # waited out, and longer than a busy machine holds a rank that comes


def constructs(ranks: Ranks, rank: int, timeout: float = LONG) -> bool:
    buffer = deepep.Buffer(ranks.groups[rank], timeout=timeout)
    good = works(buffer, rank, ranks.num_ranks)
    buffer.destroy()
    return good


WRONG: list[tuple[dict[str, Any], type[ArgumentError], str]] = [
    ({"timeout": -1}, RangeError, "timeout"),
    ({"timeout": float("inf")}, RangeError, "timeout"),
    ({"timeout": float("nan")}, RangeError, "timeout"),
    ({"timeout": 10**400}, RangeError, "timeout"),
    ({"timeout": "1m"}, ArgumentTypeError, "timeout"),
    ({"timeout": True}, ArgumentTypeError, "timeout"),
    ({"backend": "refrence"}, RangeError, "backend"),
    ({"backend": 3}, ArgumentTypeError, "backend"),
    ({"backend": "cuda"}, RangeError, "backend"),
    ({"num_nvl_bytes": 3}, RangeError, "num_nvl_bytes"),
    ({"reduction": "none"}, RangeError, "reduction"),
    ({"service_level": 16}, RangeError, "service_level"),
    ({"traffic_class": "104"}, ArgumentTypeError, "traffic_class"),
]


def test_what_one_rank_refuses_all_raise_and_the_next_construction_works() -> None:
    ranks = Ranks(3)

    def part(rank: int) -> list[BaseException | None]:
        found = []
        for wrong, _, _ in WRONG:
            given = {"timeout": LONG, **(wrong if rank == 1 else {})}
            found.append(raised(lambda given=given: deepep.Buffer(ranks.groups[rank], **given)))  # type: ignore[misc]
        assert constructs(ranks, rank)
        return found

    for (wrong, kind, name), *errors in zip(WRONG, *ranks.run(part), strict=True):
        assert {str(error) for error in errors} == {str(errors[0])}, wrong
        for error in errors:
            assert type(error) is kind, (wrong, error)
            asked_for_all = wrong.get("backend") == "cuda"  # then every rank refuses it
            assert (error.argument, error.rank) == (name, 0 if asked_for_all else 1)


def test_environment_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("1m", "inf", "-3", "nan"):
        monkeypatch.setenv("DEEPEP_TIMEOUT", text)
        with pytest.raises(RangeError, match="DEEPEP_TIMEOUT"):
            timeout_of(None)
    monkeypatch.setenv("DEEPEP_TIMEOUT", "")
    assert timeout_of(None) == 100.0


def test_backends_that_differ() -> None:
    ranks = Ranks(2)

    def part(rank: int) -> BaseException | None:
        name = ("reference", "emulator")[rank]
        error = raised(lambda: deepep.Buffer(ranks.groups[rank], timeout=LONG, backend=name))
        assert constructs(ranks, rank)
        return error

    first, second = ranks.run(part)
    assert str(first) == str(second)
    assert isinstance(first, MismatchError)
    assert first.argument == "backend"


def test_a_backend_that_one_rank_names_serves_all() -> None:
    ranks = Ranks(2)

    def part(rank: int) -> str:
        buffer = deepep.Buffer(ranks.groups[rank], timeout=LONG, backend="reference" if rank else None)
        return buffer.info.backend

    assert ranks.run(part) == ["reference", "reference"]


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_what_one_rank_raises_by_itself(error: BaseException) -> None:
    """Before the ranks are connected, and out of a backend's own code."""
    ranks = Ranks(3)
    real = registry._backends["reference"]

    def create(options: Any, control: Any) -> Any:
        if control.rank == 1:
            raise error
        return real.create(options, control)

    registry.register(registry.Backend("breaks", real.available, real.supports, create, by_name_only=True))

    def part(rank: int) -> BaseException | None:
        found = raised(lambda: deepep.Buffer(ranks.groups[rank], timeout=LONG, backend="breaks"))
        assert constructs(ranks, rank)
        return found

    try:
        found = ranks.run(part)
    finally:
        del registry._backends["breaks"]
    assert found[1] is error
    for other in (found[0], found[2]):
        assert isinstance(other, PeerTimeoutError)
        assert other.record.waited_on == (1,)
        assert f"rank 1 raised {type(error).__name__}" in str(other)


def test_a_rank_that_does_not_come_is_named_and_comes_to_the_next() -> None:
    ranks = Ranks(3)

    def part(rank: int) -> list[Any]:
        tale: list[Any] = []
        for _ in range(2):
            if rank != 2:
                tale.append(raised(lambda: constructs(ranks, rank, SHORT)))
            ranks.meet()
        return [*tale, constructs(ranks, rank)]

    tales = ranks.run(part)
    for tale in tales[:2]:
        assert [error.record.waited_on for error in tale[:2]] == [(2,), (2,)]
    assert all(tale[-1] is True for tale in tales)


# Connecting


def broken(fails: Callable[[int, int], bool], hangs: bool = False) -> Any:
    """A constructor of groups that fails for (position, how often it was called there)."""
    real, calls = connecting.private_group, dict.fromkeys(range(8), 0)

    def build(store: Any, position: int, size: int, seconds: float, device_type: str) -> Any:
        calls[position] += 1
        if not fails(position, calls[position]):
            return real(store, position, size, seconds, device_type)
        if hangs:
            import time

            time.sleep(seconds + 1.0)
        raise RuntimeError("connectFullMesh failed, Connection closed by peer")

    return build, calls


@pytest.mark.parametrize("hangs", [False, True])
def test_connections_that_fail_by_themselves_are_made_again(
    monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    ranks = Ranks(3)
    build, calls = broken(lambda position, call: position == 1 and call == 1, hangs)
    monkeypatch.setattr(connecting, "private_group", build)
    monkeypatch.setattr(connecting, "_FIRST_PATIENCE", 0.5)
    assert ranks.run(lambda rank: constructs(ranks, rank, 8.0)) == [True] * 3
    assert [calls[rank] for rank in range(3)] == [2, 2, 2]


def test_connections_that_always_fail_end_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2)
    build, _ = broken(lambda position, call: position == 1)
    monkeypatch.setattr(connecting, "private_group", build)
    for error in ranks.run(lambda rank: constructs(ranks, rank)):
        assert isinstance(error, PeerTimeoutError)
        assert error.record.waited_on == ()
        assert "Connection closed by peer" in str(error)
    monkeypatch.undo()
    assert ranks.run(lambda rank: constructs(ranks, rank)) == [True, True]


def test_keys_do_not_stay_in_the_store() -> None:
    ranks = Ranks(3)
    counts = []
    for _ in range(6):
        assert ranks.run(lambda rank: constructs(ranks, rank)) == [True] * 3
        counts.append(ranks.store.num_keys())
    assert counts[-1] == counts[2], counts
