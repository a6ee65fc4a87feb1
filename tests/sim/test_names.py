"""deepep.sim's public names, loaded when used; hypothesis and cloudpickle only by what needs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deepep.sim


@pytest.mark.parametrize("name", deepep.sim.__all__)
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(deepep.sim, name).__name__ == name
    assert name in dir(deepep.sim)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Wrold'"):
        deepep.sim.Wrold  # noqa: B018


def test_every_name_is_listed() -> None:
    assert sorted(deepep.sim._HOMES) == deepep.sim.__all__


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import deepep.sim", ("hypothesis", "cloudpickle", "matplotlib")),
        ("from deepep.sim import Case, Fuzzer, World, judge_fault", ("hypothesis", "matplotlib")),
        ("from deepep.sim import Case, Property", ("hypothesis", "cloudpickle", "matplotlib")),
    ],
)
def test_it_loads_no_more_than_it_needs(statement: str, absent: tuple[str, ...]) -> None:
    source = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
