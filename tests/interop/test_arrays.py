"""Arrays of other libraries in and out of buffers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import dlpack

from deepep.errors import ArgumentError, ArgumentTypeError
from deepep.interop import ArrayBuffer, from_any, like


def test_memory_is_shared_both_ways() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = from_any(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert like(tensor, array).ctypes.data == array.ctypes.data
    assert from_any(tensor) is tensor
    assert like(tensor, tensor) is tensor


def test_what_numpy_does_not_share_is_copied() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    tensor = from_any(array)
    tensor += 1
    assert array.tolist() == [0, 1, 2]


def test_what_torch_cannot_share_is_copied_or_refused() -> None:
    array = np.arange(6).reshape(2, 3)
    for turned in (array[::-1], array[:, ::-1]):  # torch's own from_dlpack aborts the process
        tensor = from_any(turned)
        assert tensor.tolist() == turned.tolist()
        assert all(step > 0 for step in tensor.stride())
    for foreign in (np.arange(3, dtype=">i4"), np.array(["a"]), np.array([None])):
        with pytest.raises(ArgumentTypeError, match="ndarray of"):
            from_any(foreign)


def test_an_array_buffer_can_be_copied() -> None:
    arrays = ArrayBuffer(SimpleNamespace(rank=3))
    assert copy.copy(arrays).rank == copy.deepcopy(arrays).rank == 3


@pytest.mark.parametrize("call", [from_any, lambda value: like(torch.ones(1), value)], ids=["from", "like"])
def test_what_is_no_array_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentTypeError, match="__dlpack__"):
        call([1.0])


def test_tensorflow_goes_by_its_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for TensorFlow, whose tensors have functions in place of methods."""

    class EagerTensor:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    EagerTensor.__module__ = "tensorflow.python.framework.ops"
    functions = SimpleNamespace(
        to_dlpack=lambda array: dlpack.to_dlpack(array.tensor),
        from_dlpack=lambda capsule: EagerTensor(dlpack.from_dlpack(capsule)),
    )
    tensorflow = ModuleType("tensorflow")
    tensorflow.experimental = SimpleNamespace(dlpack=functions)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    values = torch.arange(4.0)
    taken = from_any(EagerTensor(values))
    assert taken.data_ptr() == values.data_ptr()
    given = like(taken, EagerTensor(values))
    assert isinstance(given, EagerTensor)
    assert torch.equal(given.tensor, values)


def exchanged(context: Any) -> list[bool]:
    """Dispatch and combine with arrays of numpy, beside the same with tensors."""
    import deepep

    generator = torch.Generator().manual_seed(context.rank)
    x = torch.randn(5, 16, generator=generator)
    topk_idx = torch.randint(-1, 4, (5, 2), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        arrays = ArrayBuffer(buffer)

        def round_trip(target: Any, take: Callable[[torch.Tensor], Any]) -> list[Any]:
            given = {"topk_idx": take(topk_idx), "topk_weights": take(weights), "num_experts": 4}
            found = target.dispatch(take(x), **given)
            rows, indices, _, counts, handle, _ = found
            back, _, _ = target.combine(rows, handle)
            return [rows, indices, back, counts]

        plain = round_trip(buffer, lambda tensor: tensor)
        foreign = round_trip(arrays, lambda tensor: tensor.numpy())
        same = [isinstance(array, np.ndarray) for array in foreign[:3]]
        same += [np.array_equal(a, b.numpy()) for a, b in zip(foreign[:3], plain[:3], strict=True)]
        try:
            arrays.low_latency_combine(foreign[0], out=foreign[2])
        except ArgumentTypeError as error:
            same.append("written into" in str(error))
        text = np.full((5, 16), "text") if context.rank == 0 else x.numpy()
        try:
            arrays.dispatch(text, topk_idx=topk_idx, topk_weights=weights, num_experts=4)
        except ArgumentError as error:
            same.append(error.argument == "x" and error.rank == 0)
        return [*same, foreign[3] == plain[3], arrays.group_size == 2]


def test_buffers_take_and_return_arrays(world_of: Callable[[int], Any]) -> None:
    for found in world_of(2).run(exchanged):
        assert all(found), found
        assert len(found) == 10
