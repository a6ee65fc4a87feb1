"""Arrays of other libraries as tensors and back, by DLPack: without a copy where the device is the same.

No library is imported: whoever has one of its arrays has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import dlpack

from deepep.api.handles import LowLatencyHandle
from deepep.errors import ArgumentTypeError


def is_array(value: object) -> bool:
    """True for an array of another library: what has `__dlpack__`, or is a tensor of TensorFlow."""
    if isinstance(value, Tensor | type):
        return False
    return hasattr(value, "__dlpack__") or _is_tensorflow(value)


def from_any(array: Any, name: str = "array") -> Tensor:
    """The array as a tensor on its device, sharing its memory: what changes one changes the other.

    A tensor is returned as it is. Arrays that their library does not share (numpy's read-only ones), and
    those that no tensor can share (of negative strides), are copied. Raises ArgumentTypeError for what is no
    array, and for dtypes that torch or DLPack does not have.
    """
    if isinstance(array, Tensor):
        return array
    if not is_array(array):
        raise ArgumentTypeError(name, type(array).__name__, "a tensor, or an array with __dlpack__")
    if not hasattr(array, "__dlpack__"):
        return dlpack.from_dlpack(sys.modules["tensorflow"].experimental.dlpack.to_dlpack(array))
    flags, strides = getattr(array, "flags", None), getattr(array, "strides", None)
    is_reversed = isinstance(strides, tuple) and any(step < 0 for step in strides)  # torch aborts at these
    if is_reversed or not getattr(flags, "writeable", True):
        array = array.copy()
    try:
        return dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        got = f"{type(array).__name__} of {getattr(array, 'dtype', 'an unknown dtype')}"
        raise ArgumentTypeError(name, got, "an array that DLPack passes to torch") from error


def like(tensor: Tensor, array: Any) -> Any:
    """The tensor as an array of the library that `array` is of, sharing its memory; of a tensor, itself.

    Raises ArgumentTypeError for what is no array.
    """
    if isinstance(array, Tensor):
        return tensor
    if not is_array(array):
        raise ArgumentTypeError("array", type(array).__name__, "a tensor, or an array with __dlpack__")
    tensor = tensor.detach()
    if _is_tensorflow(array):
        return sys.modules["tensorflow"].experimental.dlpack.from_dlpack(tensor.__dlpack__())
    return _from_dlpack_of(array)(tensor)


class ArrayBuffer:
    """A Buffer or ElasticBuffer for callers with arrays: every method takes them where it takes tensors, and
    returns its tensors as arrays of the library of the first one, handles and events as they are.

        arrays = deepep.interop.ArrayBuffer(buffer)
        recv_x, recv_idx, recv_weights, per_expert, handle, event = arrays.dispatch(x, topk_idx=idx, ...)

    Inputs are read where they are, on CUDA in the order of the producer's stream, which DLPack passes on.
    What is written into (`out=`) has to be a tensor; asynchronous calls and hooks are for libraries whose
    arrays may change. Attributes are the buffer's.
    """

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # not set yet: copy and pickle look for names before they fill the object
            raise AttributeError(name)
        found = getattr(self.buffer, name)
        return _on_arrays(found) if callable(found) else found


def _on_arrays(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if is_array(options.get("out")):
            raise ArgumentTypeError("out", type(options["out"]).__name__, "a tensor: it is written into")
        arrays: list[Any] = []
        problems: list[ArgumentTypeError] = []

        def taken(value: Any) -> Any:
            if not is_array(value):
                return value
            try:
                tensor = from_any(value)
            except ArgumentTypeError as problem:
                problems.append(problem)
                return value  # the method refuses it, on all ranks
            arrays.append(value)
            return tensor

        given = _mapped(taken, args), _mapped(taken, options)
        try:
            result = method(*given[0], **given[1])
        except ArgumentTypeError as refused:
            raise refused from (problems[0] if problems else refused.__cause__)
        if not arrays:
            return result
        return _mapped(lambda v: like(v, arrays[0]) if isinstance(v, Tensor) else v, result)

    return call


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The value with its entries changed, through results, tuples, lists and dicts; handles as they are."""
    if isinstance(value, LowLatencyHandle):
        return value
    if hasattr(value, "_make"):
        return value._make(_mapped(change, entry) for entry in value)
    if isinstance(value, tuple | list):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_mapped(change, entry) for entry in value)
    if isinstance(value, dict):
        return {key: _mapped(change, entry) for key, entry in value.items()}
    return change(value)


def _is_tensorflow(value: object) -> bool:
    return type(value).__module__.split(".")[0] == "tensorflow"


def _from_dlpack_of(array: Any) -> Callable[[Any], Any]:
    """The function of the array's library that takes a tensor: numpy.from_dlpack, jax.numpy.from_dlpack."""
    root = type(array).__module__.split(".")[0].removesuffix("lib")  # jaxlib's arrays are jax's
    module = sys.modules["jax.numpy" if root == "jax" else root]
    found: Callable[[Any], Any] = module.from_dlpack
    return found
