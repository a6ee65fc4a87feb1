"""Sets of tensors, made at once or one by one: of the shapes asked for, apart, and like any others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepep import _core
from deepep.backends.cuda.memory import tensor_set
from deepep.backends.cuda.memory.tensor_set import SELDOM, Array, TensorSet, View, at_once, contiguous_strides
from deepep.runtime import checks

CPU = torch.device("cpu")
DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)
ARRAYS = [
    Array((3, 4, 8), torch.bfloat16),
    Array((40,), torch.int32),
    Array((3, 4, 2), torch.float32, (8, 1, 4)),
]
VIEWS = [View(1, (3,), 4), View(1, (3, 4), 8)]
SHAPES = [(3, 4, 8), (40,), (3, 4, 2), (3,), (3, 4)]
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def one_by_one(device: torch.device, arrays: Any, views: Any = ()) -> Callable[[], tuple[Any, ...]]:
    return tensor_set._one_by_one(device, arrays, views)


def seldom(device: torch.device, arrays: Any, views: Any = ()) -> Callable[[], tuple[Any, ...]]:
    return TensorSet(device, arrays, views)._seldom


WAYS = [at_once, one_by_one, seldom]


def test_this_torch_makes_them_at_once() -> None:
    """The versions that CI runs with do; one that does not must still run, and be noticed here."""
    assert _core.TensorSet.is_available()


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5))
def test_all_ways_make_what_torch_empty_makes(arrays: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    for make in WAYS:
        made = make(CPU, [Array(*array) for array in arrays])()
        assert len(made) == len(arrays)
        for tensor, (shape, dtype) in zip(made, arrays, strict=True):
            like = torch.empty(shape, dtype=dtype, device="cpu")
            assert type(tensor) is torch.Tensor
            assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
            assert tensor.stride() == contiguous_strides(shape)
            assert tensor.is_contiguous()
            assert tensor.storage_offset() == 0
            assert tensor.untyped_storage().nbytes() == like.untyped_storage().nbytes()
            assert not tensor.requires_grad
            assert tensor.is_leaf


@pytest.mark.parametrize("make", WAYS)
def test_strides_and_views_are_as_asked(make: Any) -> None:
    make_all = make(CPU, ARRAYS, VIEWS)
    x, words, scales, count, source = make_all()
    again = make_all()
    assert scales.stride() == (8, 1, 4)
    words.copy_(torch.arange(40, dtype=torch.int32))
    assert count.tolist() == [4, 5, 6]
    assert source.tolist() == torch.arange(8, 20).view(3, 4).tolist()
    count[0] = -1
    assert words[4] == -1
    pointers = [tensor.untyped_storage().data_ptr() for tensor in (x, words, scales, *again[:3])]
    assert len(set(pointers)) == 6  # each call and each array has memory of its own
    assert count.untyped_storage().data_ptr() == words.data_ptr()


@pytest.mark.parametrize("make", WAYS)
def test_they_are_freed_with_the_last_reference(make: Any) -> None:
    make_all = make(CPU, ARRAYS, VIEWS)
    x, words, _, count, _ = make_all()
    gone = weakref.ref(x)
    gc.disable()  # by reference counts alone
    try:
        count.fill_(7)
        del x, words
        assert gone() is None
        assert count.tolist() == [7, 7, 7]  # a view keeps the memory
    finally:
        gc.enable()


@pytest.mark.parametrize("make", WAYS)
def test_they_may_be_saved_written_and_copied(make: Any) -> None:
    x, words, *_ = make(CPU, ARRAYS, VIEWS)()
    x.zero_().requires_grad_()
    (x.float() * 2).sum().backward()
    assert x.grad.float().unique().tolist() == [2.0]
    words.zero_().add_(1)
    assert torch.equal(words.clone(), torch.ones(40, dtype=torch.int32))
    words.resize_(3)
    assert words.shape == (3,)


def test_torch_says_what_is_wrong_where_it_makes_none() -> None:
    """Made one by one then, which raises torch's own error."""
    make = at_once(CPU, [Array((1 << 62,), torch.uint8)])
    with pytest.raises(RuntimeError):
        make()


def test_without_torchs_functions_they_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def is_available() -> bool:
            return False

    monkeypatch.setattr(_core, "TensorSet", Missing)
    made = at_once(CPU, ARRAYS, VIEWS)()
    assert [tuple(tensor.shape) for tensor in made] == SHAPES


@pytest.mark.parametrize("dtype", checks.ROW_DTYPES + checks.BYTE_DTYPES + checks.SCALE_DTYPES)
def test_all_that_travels_can_be_made(dtype: torch.dtype) -> None:
    (tensor,) = at_once(CPU, [Array((2, 3), dtype)])()
    assert (tensor.dtype, tensor.shape) == (dtype, (2, 3))


def test_dtypes_that_have_no_number_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ignorant(_core.TensorSet):
        def add_array(self, dtype: str, sizes: Any, strides: Any) -> None:
            raise ValueError(f"dtype: torch knows no {dtype}")

    monkeypatch.setattr(_core, "TensorSet", Ignorant)
    assert [tuple(tensor.shape) for tensor in at_once(CPU, ARRAYS, VIEWS)()] == SHAPES


def test_what_cannot_be_made_is_refused() -> None:
    made = _core.TensorSet("cpu", 0, tuple)
    made.add_array("int32", (2,), (1,))
    with pytest.raises(ValueError, match="torch knows no int33"):
        made.add_array("int33", (2,), (1,))
    with pytest.raises(ValueError, match="a stride for each size"):
        made.add_array("int32", (2, 3), (1,))
    with pytest.raises(ValueError, match="not there"):
        made.add_view(1, (2,), (1,), 0)
    made.add_view(0, (2,), (1,), 0)
    with pytest.raises(ValueError, match="before views"):
        made.add_array("int32", (2,), (1,))
    with pytest.raises(ValueError, match="torch knows no hypercube"):
        _core.TensorSet("hypercube", 0, tuple)


def test_a_set_that_is_used_again_is_prepared() -> None:
    """Its tensors look alike before and after."""
    tensors = TensorSet(CPU, ARRAYS, VIEWS)
    first, *more = [
        [(t.shape, t.dtype, t.stride(), t.storage_offset()) for t in tensors.make()]
        for _ in range(SELDOM + 3)
    ]
    assert all(made == first for made in more)
    assert getattr(tensors.make, "__self__", None).__class__ is _core.TensorSet
