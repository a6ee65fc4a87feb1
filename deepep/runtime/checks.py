"""Checks of inputs: pure functions that raise the typed error for the first thing that is wrong.

None of them communicates or knows a rank; the engine adds the rank and refuses the call on all ranks. Those
in the first two parts look at descriptions alone (dtype, device, shape), those in the last read values and
may wait for the device.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy
import torch

from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapacityError,
    DeviceError,
    HandleError,
    LayoutError,
    RangeError,
    ShapeError,
)

if TYPE_CHECKING:
    from deepep.runtime.engine import Engine
    from deepep.runtime.requests import CombineRequest, DispatchRequest, LowLatencyRoute, Route

INDEX_DTYPES = (torch.int32, torch.int64)
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SUM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
BYTE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8)
SCALE_DTYPES = (torch.float32, torch.int32)
ROW_ALIGNMENT = 16  # bytes: what bulk copies move
MOST = 2**31 - 1  # of what is counted in int32
FP8_GROUP = 128  # channels that share a scale
UE8M0_PACK = 4 * FP8_GROUP  # channels whose scales share an int32


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """ "int32 or int64" """
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def shape_text(shape: Sequence[int | str]) -> str:
    """ "[4, 128]" """
    return "[" + ", ".join(map(str, shape)) + "]"


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype],
    device_type: str,
    shape: Sequence[int | str],
    contiguous: bool = True,
) -> torch.Tensor:
    """A tensor of one of `dtypes`, on `device_type`, of `shape` (a string: of any size, its name)."""
    check_memory(name, value)
    assert isinstance(value, torch.Tensor)
    if value.dtype not in dtypes:
        raise ArgumentTypeError(name, str(value.dtype).removeprefix("torch."), dtype_names(dtypes))
    if value.device.type != device_type:
        raise DeviceError(name, str(value.device), f"{device_type}, the buffer's device")
    fits = value.dim() == len(shape) and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ShapeError(name, shape_text(value.shape), shape_text(shape))
    if contiguous and not value.is_contiguous():
        raise LayoutError(name, f"strides {shape_text(value.stride())}", "a contiguous tensor")
    return value


def check_memory(name: str, value: object) -> None:
    """A tensor whose elements lie in its own memory, as they are."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(name, type(value).__name__, "a tensor")
    if type(value).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:  # DTensor, FakeTensor and the like
        raise ArgumentTypeError(name, type(value).__name__, "a plain tensor")
    if value.layout != torch.strided:
        raise LayoutError(name, str(value.layout).removeprefix("torch."), "a dense tensor")
    if value.is_neg() or value.is_conj():
        raise LayoutError(name, "a view that negates its memory", "a tensor in memory, as of resolve_neg()")


def flat_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [num_bytes], where they lie."""
    # One element may have a stride of 0 and be contiguous; its bytes could not be viewed.
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """An integer in [low, high]; numpy's count, booleans do not."""
    if isinstance(value, bool):
        raise ArgumentTypeError(name, "bool", "an integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # also of arrays and tensors of more than one element
        raise ArgumentTypeError(name, type(value).__name__, "an integer") from None
    if number < low or (high is not None and number > high):
        # Python refuses to print a number of thousands of digits.
        got = str(number) if abs(number) < 1 << 128 else f"a number of {number.bit_length()} bits"
        raise RangeError(name, got, f"{low} or more" if high is None else f"{low} to {high}")
    return number


def check_ints(name: str, values: object, low: int, high: int) -> list[int]:
    """Integers in [low, high], of a list, tuple, set, array or the like."""
    if not isinstance(values, Collection) or isinstance(values, (str, bytes, Mapping, torch.Tensor)):
        raise ArgumentTypeError(name, type(values).__name__, "integers, in a list or the like")
    return [check_int(name, value, low, high) for value in values]


def check_flag(name: str, value: object) -> bool:
    """True or False; 1, 0, numpy's booleans and None (False) are taken for it, as V1's bindings do."""
    if value is None or (isinstance(value, (int, numpy.bool_)) and value in (0, 1)):
        return bool(value)
    raise ArgumentTypeError(name, type(value).__name__, "True or False")


def check_num_experts(num_experts: object, num_ranks: int, name: str = "num_experts") -> int:
    """E, a positive multiple of R. Returns L."""
    count = check_int(name, num_experts, 1, MOST)
    if count % num_ranks:
        raise RangeError(name, str(count), f"a multiple of the {num_ranks} ranks")
    return count // num_ranks


def check_rows(x: object, device_type: str, with_scales: bool) -> torch.Tensor:
    """x [T, H]: rows to dispatch; one byte per element if scales come with it."""
    dtypes = BYTE_DTYPES if with_scales else ROW_DTYPES
    rows = check_tensor("x", x, dtypes=dtypes, device_type=device_type, shape=("T", "H"))
    check_row_bytes(rows)
    return rows


def check_row_bytes(x: torch.Tensor, name: str = "x") -> None:
    """x [*, H]: a row is a positive multiple of 16 bytes."""
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT:
        raise ShapeError(
            name,
            f"{shape_text(x.shape)}, {row_bytes} bytes per row",
            f"rows of a multiple of {ROW_ALIGNMENT} bytes",
        )


def check_scales(scales: object, num_tokens: int, device_type: str) -> torch.Tensor:
    """scales [T, P], any strides."""
    return check_tensor(
        "scales",
        scales,
        dtypes=SCALE_DTYPES,
        device_type=device_type,
        shape=(num_tokens, "P"),
        contiguous=False,
    )


def check_topk_idx(topk_idx: object, device_type: str, num_tokens: int | None = None) -> torch.Tensor:
    """topk_idx [T, K]."""
    tokens: int | str = "T" if num_tokens is None else num_tokens
    found = check_tensor(
        "topk_idx", topk_idx, dtypes=INDEX_DTYPES, device_type=device_type, shape=(tokens, "K")
    )
    from deepep._core import MAX_TOPK  # `import deepep` needs no extension

    if not 1 <= found.shape[1] <= MAX_TOPK:
        raise ShapeError("topk_idx", shape_text(found.shape), f"K from 1 to {MAX_TOPK}")
    return found


def check_topk_weights(topk_weights: object, shape: Sequence[int | str], device_type: str) -> torch.Tensor:
    """topk_weights, float32."""
    return check_tensor(
        "topk_weights", topk_weights, dtypes=(torch.float32,), device_type=device_type, shape=shape
    )


def check_together(**pair: object) -> None:
    """Two arguments that are given both or not at all."""
    (first, a), (second, b) = pair.items()
    if (a is None) != (b is None):
        given, absent = (first, second) if b is None else (second, first)
        raise ArgumentError(absent, f"None, with {given} given", f"{first} and {second} together, or neither")


def check_max_tokens(num_tokens: int, num_max_tokens: object) -> int:
    """T <= M."""
    most = check_int("num_max_dispatch_tokens_per_rank", num_max_tokens, 1, MOST)
    if num_tokens > most:
        raise CapacityError(
            "x", f"{num_tokens} tokens", f"at most num_max_dispatch_tokens_per_rank = {most} tokens"
        )
    return most


@contextlib.contextmanager
def memory_for(argument: str, got: object) -> Iterator[None]:
    """Memory of the size that an argument asks for is made inside. Raises CapacityError if there is none."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY.search(text)):
            raise
        raise CapacityError(argument, str(got), "a size that there is memory for") from error


_NO_MEMORY = re.compile("allocate memory|not enough memory|out of memory|[Ss]torage size|overflow")


# Requests


def check_own(route: Route | LowLatencyRoute, engine: Engine) -> None:
    """The route is one of this engine's."""
    if route.engine is not engine:
        raise HandleError("handle", "the handle of another buffer", "a handle of this buffer")


def check_dispatch(request: DispatchRequest, device_type: str, num_ranks: int) -> None:
    """A high-throughput dispatch: shapes, dtypes, devices and what goes with what."""
    check_rows(request.x, device_type, request.scales is not None)
    num_tokens = request.x.shape[0]
    if request.scales is not None:
        check_scales(request.scales, num_tokens, device_type)
    check_int("expert_alignment", request.expert_alignment, 1, MOST)
    check_int("num_worst_tokens", request.num_worst_tokens, 0, MOST)
    if request.route is not None:
        if num_tokens != request.route.num_tokens:
            allowed = f"[{request.route.num_tokens}, H], the tokens of the handle"
            raise ShapeError("x", shape_text(request.x.shape), allowed)
        return
    if request.layout is None:
        check_num_experts(request.num_experts, num_ranks)
        check_topk_idx(request.topk_idx, device_type, num_tokens)
    else:
        for name, dtype, shape in (
            ("num_tokens_per_rank", torch.int32, (num_ranks,)),
            ("is_token_in_rank", torch.bool, (num_tokens, num_ranks)),
            ("num_tokens_per_expert", torch.int32, ("E",)),
        ):
            tensor = getattr(request.layout, name)
            check_tensor(name, tensor, dtypes=(dtype,), device_type=device_type, shape=shape)
        check_num_experts(request.layout.num_tokens_per_expert.numel(), num_ranks, "num_tokens_per_expert")
    check_together(topk_idx=request.topk_idx, topk_weights=request.topk_weights)
    if request.topk_idx is not None:
        check_topk_idx(request.topk_idx, device_type, num_tokens)
        check_topk_weights(request.topk_weights, request.topk_idx.shape, device_type)
    elif request.num_worst_tokens > 0:
        raise ArgumentError("topk_idx", "None, with num_worst_tokens", "topk_idx and topk_weights given")


def check_combine(request: CombineRequest, device_type: str) -> None:
    """A high-throughput combine: shapes, dtypes and devices."""
    route = request.route
    rows = route.num_rows
    assert rows is not None
    of_x: int | str = rows if request.slots is None else "X"
    x = check_tensor("x", request.x, dtypes=SUM_DTYPES, device_type=device_type, shape=(of_x, "H"))
    check_row_bytes(x)
    if request.topk_weights is not None:
        of_weights = (rows, "K") if request.slots is None else (x.shape[0],)
        check_topk_weights(request.topk_weights, of_weights, device_type)
    for bias in request.biases:
        check_tensor(
            "bias", bias, dtypes=(x.dtype,), device_type=device_type, shape=(route.num_tokens, x.shape[1])
        )


# Values


def check_index_range(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Every entry is -1 or an expert."""
    if topk_idx.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(topk_idx))
    if low < -1 or high >= num_experts:
        raise RangeError("topk_idx", str(low if low < -1 else high), f"-1 to {num_experts - 1}")


def check_layout_values(num_tokens_per_rank: torch.Tensor, is_token_in_rank: torch.Tensor) -> None:
    """The counts are those of the matrix."""
    counted = is_token_in_rank.sum(dim=0, dtype=torch.int32)
    if not torch.equal(counted, num_tokens_per_rank):
        raise RangeError(
            "num_tokens_per_rank",
            str(num_tokens_per_rank.tolist()),
            f"is_token_in_rank's sums, {counted.tolist()}",
        )


def check_expert_counts(num_tokens_per_expert: torch.Tensor) -> None:
    """Counts are not negative."""
    if num_tokens_per_expert.numel() and int(num_tokens_per_expert.min()) < 0:
        raise RangeError("num_tokens_per_expert", str(int(num_tokens_per_expert.min())), "0 or more")


def check_capacity(counts: Sequence[Sequence[int]], limits: dict[int, int]) -> None:
    """No rank receives more rows than its `num_worst_tokens`. counts[s][r]:
    rows from s to r, as all ranks know.
    """
    for rank, limit in sorted(limits.items()):
        received = sum(row[rank] for row in counts)
        if 0 <= limit < received:
            raise CapacityError(
                "num_worst_tokens", str(limit), f"at least the {received} tokens received", rank
            )
