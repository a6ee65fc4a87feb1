"""Memory that a rank's host fills with zeros: as if written, though each cell takes note of it later."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepep import _emulator


def _allocated(machine: _emulator.Machine) -> int:
    return machine.allocate_zeros("words", "symmetric", 0, 256)


def _written(machine: _emulator.Machine) -> int:
    at = machine.allocate("words", "symmetric", 0, 256)
    machine.write(0, at, bytes(256))
    return at


WAYS = pytest.mark.parametrize("zeros", [_allocated, _written])


def machine_of_two() -> _emulator.Machine:
    return _emulator.Machine(num_ranks=2, max_blocks=1, max_threads=32)


@WAYS
def test_whoever_does_not_know_of_the_zeros_races_with_them(
    zeros: Callable[[_emulator.Machine], int],
) -> None:
    machine = machine_of_two()
    at = zeros(machine)
    for access in (
        lambda: machine.read(1, at + 128, 4),
        lambda: machine.write(1, at + 64, bytes(1)),
        lambda: machine.forget(1, at, 256),
    ):
        with pytest.raises(_emulator.HostFailure, match=r"race(.|\n)*after rank 0's host: plain store"):
            access()
    machine.meet()
    assert machine.read(1, at, 256) == bytes(256)


@WAYS
def test_zeros_are_read_until_the_memory_is_handed_to_new_use(
    zeros: Callable[[_emulator.Machine], int],
) -> None:
    machine = machine_of_two()
    at = zeros(machine)
    machine.write(0, at + 6, b"\1")
    assert machine.read(0, at, 12) == bytes(6) + b"\1" + bytes(5)
    machine.forget(0, at, 64)
    for word in range(0, 64, 4):
        with pytest.raises(_emulator.HostFailure, match="read of memory never written"):
            machine.read(0, at + word, 4)
    assert machine.read(0, at + 64, 192) == bytes(192)
    with pytest.raises(_emulator.HostFailure, match="out of bounds"):
        machine.read(0, at + 253, 4)


def test_zeros_are_filled_in_by_a_host_that_may_touch_memory() -> None:
    machine = machine_of_two()
    machine.host_step(0)
    with pytest.raises(RuntimeError, match="while its stream is busy"):
        _allocated(machine)
