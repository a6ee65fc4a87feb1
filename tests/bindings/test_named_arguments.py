"""Operations take their arguments by name, in any order, and name the one that is wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

_emulator = pytest.importorskip("deepep._emulator", reason="deepep._emulator is not built")


class Blocks(NamedTuple):
    total: int
    remote: int
    local: int


@pytest.fixture
def domain() -> Any:
    """Of one rank, with zeroed memory."""
    machine = _emulator.Machine(num_ranks=1, max_blocks=2, max_threads=64)

    def zeros(space: str, size: int) -> int:
        address = machine.allocate(space, space, 0, size)
        machine.write(0, address, bytes(size))
        return int(address)

    made = _emulator.Domain(
        machine=machine,
        kernels=_emulator.own_kernels(),
        num_threads=64,
        rank=0,
        heaps=[zeros("symmetric", 1 << 16)],
        max_local_experts=4,
        max_blocks=2,
        staging_bytes=4096,
        state=zeros("device", _emulator.STATE_BYTES),
        fault=zeros("host", _emulator.FAULT_BYTES),
        timeout_seconds=1.0,
    )
    machine.meet()
    return made


CACHED = {
    "blocks": Blocks(2, 1, 1),
    "num_tokens": 3,
    "num_scales": 0,
    "row_bytes": 16,
    "scale_strides": (0, 0),
    "counts": 4096,
    "send_row": 4096,
    "capacity": 3,
}


def test_any_order_and_names_that_are_not_interned(domain: Any) -> None:
    for names in (list(CACHED), list(reversed(CACHED))):
        given = {"".join(list(name)): CACHED[name] for name in names}
        assert isinstance(domain.prepare_cached(**given), _emulator.CachedDispatch)


@pytest.mark.parametrize("name", CACHED)
def test_none_may_be_left_out(domain: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"prepare_cached: lacks the argument {name}"):
        domain.prepare_cached(**{n: value for n, value in CACHED.items() if n != name})


def test_what_is_wrong_is_named(domain: Any) -> None:
    def refused(error: type[Exception], match: str, **other: Any) -> None:
        with pytest.raises(error, match=match):
            domain.prepare_cached(**{**CACHED, **other})

    refused(TypeError, "prepare_cached: takes no argument tokens", tokens=3)
    refused(TypeError, "prepare_cached: num_tokens", num_tokens=3.5)
    refused(TypeError, "prepare_cached: num_tokens", num_tokens=None)
    refused(OverflowError, "prepare_cached: num_tokens", num_tokens=2**63)
    refused(AttributeError, "prepare_cached: blocks", blocks=(2, 1, 1))
    refused(ValueError, "prepare_cached: num_scales: out of range: 2147483648", num_scales=2**31)
    refused(ValueError, "prepare_cached: counts: out of range: -1", counts=-1)
    refused(ValueError, "blocks of two kinds", blocks=Blocks(3, 1, 1))
    with pytest.raises(TypeError, match="prepare_cached: takes arguments by name alone"):
        domain.prepare_cached(1, **CACHED)
    with pytest.raises(TypeError):
        _emulator.Domain.prepare_cached(3, **CACHED)


def test_integers_of_other_kinds(domain: Any) -> None:
    domain.prepare_cached(**{**CACHED, "num_tokens": np.int64(3), "counts": np.int64(4096)})


def test_a_rank_of_the_emulator_has_one_stream(domain: Any) -> None:
    with pytest.raises(ValueError, match="stream"):
        domain.barrier(1)
    domain.barrier()
