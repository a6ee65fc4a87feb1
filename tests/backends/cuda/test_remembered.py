"""Remembered calls: like ones are known, and no others; a comparison that torch does not have is not used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepep.backends.cuda import remembered
from deepep.backends.cuda.remembered import Remembered, sees_differences


def calls(tokens: int = 4) -> tuple[Tensor, Tensor]:
    return torch.zeros((tokens, 16), dtype=torch.bfloat16), torch.zeros((tokens, 2), dtype=torch.int64)


def has(known: Remembered, tensors: tuple[Tensor, ...], others: tuple[object, ...]) -> bool:
    """True if a call is like the known one."""
    return others == known.others and known.are_alike(*tensors)


def test_this_torch_compares_as_is_expected() -> None:
    """The versions that CI runs with do; one that does not must still run, and be noticed here."""
    assert remembered._is_trusted()


def test_a_call_is_known_from_its_second_time_on() -> None:
    known = Remembered()
    assert not has(known, calls(), (8, 2))
    known.note(calls(), (8, 2), "first")
    assert not has(known, calls(), (8, 2))
    assert known.value is None
    known.note(calls(), (8, 2), "second")
    assert known.value == "second"
    assert has(known, calls(), (8, 2))  # other memory, of the same kind
    assert not has(known, calls(), (9, 2))
    assert not has(known, calls(5), (8, 2))
    known.note(calls(5), (8, 2), "third")  # one of another kind leaves what is known
    assert has(known, calls(), (8, 2))
    assert not has(known, calls(5), (8, 2))


def test_tensors_are_not_kept() -> None:
    known = Remembered()
    first = calls()
    gone = [weakref.ref(tensor) for tensor in first]
    for _ in range(3):
        known.note(first, ())
    assert has(known, first, ())
    del first
    assert all(ref() is None for ref in gone)


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64])


@st.composite
def drawn(draw: Callable[..., Any]) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    tensor = torch.zeros(shape, dtype=draw(DTYPES))
    change = draw(st.sampled_from(["", "negated", "strided", "transposed", "meta", "grad"]))
    if change == "negated":
        return torch._neg_view(tensor)
    if change == "strided":
        return tensor[..., ::2]
    if change == "transposed":
        return tensor.transpose(0, -1)
    if change == "meta":
        return tensor.to("meta")
    return tensor.requires_grad_(change == "grad" and tensor.is_floating_point())


def looks(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg(), type(tensor)


@given(st.lists(drawn(), min_size=1, max_size=3), st.lists(drawn(), min_size=3, max_size=3))
def test_none_is_known_that_looks_otherwise(first: list[Tensor], others: list[Tensor]) -> None:
    """Strict, not complete: one that looks alike may still be unknown, and is checked then."""
    known = Remembered()
    for _ in range(2):
        known.note(tuple(first), ())
    assert has(known, tuple(first), ())
    second = tuple(others[: len(first)])
    if has(known, second, ()):
        assert [looks(t) for t in second] == [looks(t) for t in first]


def test_a_comparison_that_misses_something_is_not_trusted() -> None:
    """One that says yes or no to everything; that overlooks one property; that raises."""

    def by(*properties: Callable[[Tensor], object]) -> Callable[[tuple[Tensor, ...]], Callable[..., bool]]:
        def comparison(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
            def look(t: Any) -> list[object]:
                return [type(t), *(p(t) for p in properties)] if isinstance(t, Tensor) else []

            wanted = [look(t) for t in tensors]
            return lambda *given: [look(t) for t in given] == wanted

        return comparison

    def strides(t: Tensor) -> object:
        return t.stride() if t.layout is torch.strided else t.layout

    everything: tuple[Callable[[Tensor], object], ...] = (
        *(lambda t: t.dtype, lambda t: t.device, lambda t: t.shape, strides),
        *(lambda t: t.is_neg(), lambda t: t.requires_grad),
    )
    assert sees_differences(by(*everything))
    for left_out in range(len(everything)):
        assert not sees_differences(by(*everything[:left_out], *everything[left_out + 1 :])), left_out
    assert not sees_differences(lambda tensors: lambda *given: True)
    assert not sees_differences(lambda tensors: lambda *given: False)


def test_without_it_every_call_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
        raise AttributeError("TensorGuards")

    monkeypatch.setattr(remembered, "_comparison", missing)
    remembered._is_trusted.cache_clear()
    try:
        known = Remembered()
        for _ in range(3):
            known.note(calls(), ())
        assert not has(known, calls(), ())
    finally:
        remembered._is_trusted.cache_clear()
