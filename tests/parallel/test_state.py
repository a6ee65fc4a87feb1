"""PackedState: what state_dicts hold, as a text and tensors, and nothing that would have to be unpickled."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch

from deepep.errors import ArgumentError, ArgumentTypeError
from deepep.parallel.state import PackedState, check_objects, differing, load_states, states_of

STATE = {
    "model": OrderedDict(a=torch.arange(6.0).view(2, 3).t(), b=torch.tensor(3, dtype=torch.int64)),
    "objects": {0: {"lr": 0.1, "betas": (0.9, float("inf")), "on": True, "none": None}, "names": ["x", 2]},
    "milestones": Counter({30: 1}),
    "few": [torch.zeros(0), torch.ones(3, dtype=torch.bfloat16), torch.tensor([True, False])],
}


def test_a_state_comes_back_as_it_was() -> None:
    packed = PackedState.of(STATE)
    assert packed.names == ["model.a", "model.b", "few.0", "few.1", "few.2"]
    there = PackedState.room_for(packed.text)
    assert (there.text, there.names) == (packed.text, packed.names)
    for tensor, other in zip(there.tensors, packed.tensors, strict=True):
        tensor.copy_(other)
    found = there.unpack()
    assert torch.equal(found["model"]["a"], STATE["model"]["a"])  # type: ignore[index]
    assert [t.dtype for t in found["few"]] == [torch.float32, torch.bfloat16, torch.bool]
    for name in ("objects", "milestones"):
        assert found[name] == STATE[name]
        assert type(found[name]) is type(STATE[name])
    assert not differing([packed.digests(), there.digests()])


def test_one_bit_is_another_state() -> None:
    packed = PackedState.of(STATE)
    before = packed.digests()
    packed.tensors[3].view(torch.int16)[1] ^= 1
    assert differing([before, packed.digests(), before]) == [3]


@pytest.mark.parametrize("value", [object(), {1.5: 2}, b"", torch.zeros(2).to_sparse(), lambda: None])
def test_what_is_no_state_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"objects\.it"):
        PackedState.of({"objects": {"it": value}})


def test_a_text_makes_nothing_but_values() -> None:
    with pytest.raises(ArgumentTypeError):
        PackedState.room_for('["dict", [["x", ["tensor", "load", [1]]]]]')
    with pytest.raises(KeyError):
        PackedState.room_for('["dict", [["x", ["eval", ["1"]]]]]')


def test_objects() -> None:
    class Broken:
        def state_dict(self) -> Any:
            raise ValueError("not consolidated")

        load_state_dict = None

    generator = torch.Generator().manual_seed(1)
    with pytest.raises(ArgumentTypeError, match="broken"):
        check_objects({"broken": Broken()})
    with pytest.raises(ArgumentError, match="broken: not consolidated"):
        states_of({"draws": generator, "broken": Broken()})
    other = torch.Generator()
    load_states({"draws": other}, states_of({"draws": generator}))
    assert torch.equal(other.get_state(), generator.get_state())
