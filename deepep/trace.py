"""Routing traces: the experts that every token of a run chose, and their weights. File format: docs/trace.md.

Record with `TraceWriter`, replay by iterating over a `RoutingTrace`: each `RoutedBatch` holds, rank by
rank, the `topk_idx` and `topk_weights` that one MoE layer passed to dispatch in one step, ready to be
passed again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepep.errors import ArgumentError, ArgumentTypeError, DeepEPError
from deepep.extras import needed_for
from deepep.runtime.checks import check_int

FORMAT = "deepep.routing-trace"
VERSION = 1
#: Largest number of layers, ranks, experts or top-k entries: an expert's index fits into int32.
MAX_SIZE = 2**31 - 1
#: Most ranks that `RoutedBatch.reshard` deals tokens to.
MAX_PARTS = 1 << 16
_SIZES = ("num_steps", "num_layers", "num_ranks", "num_experts", "num_topk")
_TENSORS = {
    "topk_idx": (torch.int16, torch.int32),
    "topk_weights": (torch.float32,),
    "row_splits": (torch.int64,),
    "step": (torch.int64,),
}


_INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
_FILE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class TraceError(DeepEPError, ValueError):
    """A file is not a routing trace of a known version, or parts of a trace contradict each other."""


class TraceIndexError(TraceError, IndexError):
    """A step or a layer that a trace does not have."""


@dataclass(frozen=True)
class RoutedBatch:
    """One MoE layer's routing in one step, as lists indexed by rank."""

    step: int
    layer: int
    topk_idx: list[torch.Tensor]  # R x [T_r, K] int64, global expert or -1
    topk_weights: list[torch.Tensor]  # R x [T_r, K] float32

    def reshard(self, num_ranks: int) -> RoutedBatch:
        """The same tokens in the same order, dealt to `num_ranks` ranks in contiguous, nearly equal parts.

        num_ranks: 1 to 65536. Raises ArgumentTypeError or RangeError.
        """
        num_ranks = check_int("num_ranks", num_ranks, 1, MAX_PARTS)
        idx, weights = torch.cat(self.topk_idx), torch.cat(self.topk_weights)
        return RoutedBatch(
            self.step,
            self.layer,
            list(idx.tensor_split(num_ranks)),
            list(weights.tensor_split(num_ranks)),
        )


@dataclass(frozen=True)
class RoutingTrace:
    """A whole trace in memory: rows sorted by (step, layer, rank, token), ranks begin at `row_splits`.

    Iterating yields every `RoutedBatch`, steps ascending, layers ascending inside a step.
    """

    num_layers: int
    num_ranks: int
    num_experts: int
    step: torch.Tensor  # [S] int64, strictly ascending
    topk_idx: torch.Tensor  # [rows, K] int16 or int32
    topk_weights: torch.Tensor  # [rows, K] float32
    row_splits: torch.Tensor  # [S * layers * R + 1] int64, ascending from 0 to rows
    notes: Mapping[str, str] = field(default_factory=dict)  # whatever else the writer said

    @property
    def num_steps(self) -> int:
        return len(self.step)

    @property
    def num_topk(self) -> int:
        return self.topk_idx.shape[1]

    def __len__(self) -> int:
        return self.num_steps * self.num_layers

    def __iter__(self) -> Iterator[RoutedBatch]:
        return (self.batch(s, layer) for s in range(self.num_steps) for layer in range(self.num_layers))

    def batch(self, step_index: int, layer: int) -> RoutedBatch:
        """The routing of `layer` in the `step_index`-th recorded step. Raises TraceIndexError."""
        for name, index in (("step_index", step_index), ("layer", layer)):
            check_int(name, index, -(2**63), 2**63 - 1)
        if not (0 <= step_index < self.num_steps and 0 <= layer < self.num_layers):
            got = f"step_index {step_index}, layer {layer}"
            raise TraceIndexError(f"{got}: allowed: below {self.num_steps} and {self.num_layers}, from 0")
        first = (step_index * self.num_layers + layer) * self.num_ranks
        bounds = self.row_splits[first : first + self.num_ranks + 1].tolist()
        parts = [slice(bounds[r], bounds[r + 1]) for r in range(self.num_ranks)]
        return RoutedBatch(
            int(self.step[step_index]),
            layer,
            [self.topk_idx[rows].long() for rows in parts],
            [self.topk_weights[rows] for rows in parts],
        )

    def validate(self) -> None:
        """Raises TraceError if any two parts contradict each other or an index names no expert."""
        described = {}
        for name in _TENSORS:
            tensor = getattr(self, name)
            _demand(isinstance(tensor, torch.Tensor), f"{name} is {type(tensor).__name__}, not a tensor")
            _demand(_has_values(tensor), f"{name} holds no values")
            described[name] = (tensor.dtype, tuple(tensor.shape))
        sizes = {name: getattr(self, name) for name in ("num_layers", "num_ranks", "num_experts")}
        _check_description(sizes, described)
        _check_notes(self.notes)
        rows = len(self.topk_idx)
        # Compared, not subtracted: a difference of two int64 may wrap.
        _demand(
            self.row_splits[0] == 0 and self.row_splits[-1] == rows,
            f"row_splits does not run from 0 to {rows}",
        )
        _demand((self.row_splits[1:] >= self.row_splits[:-1]).all(), "row_splits descends")
        _demand((self.step[1:] > self.step[:-1]).all(), "steps do not ascend")
        # As Python ints: a comparison in the tensor's own 16 bits would wrap the number of experts.
        lowest, highest = (int(v) for v in self.topk_idx.aminmax()) if self.topk_idx.numel() else (-1, -1)
        _demand(
            lowest >= -1 and highest < self.num_experts,
            f"topk_idx names an expert outside -1 to {self.num_experts - 1}",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace, checked, as a safetensors file.

        Raises TraceError for a contradiction or where `path` is no regular file; OSError if it cannot be
        written.
        """
        with needed_for("writing a routing trace"):
            from safetensors import SafetensorError
            from safetensors.torch import save_file

        self.validate()
        target = _path(path)
        if target.exists():
            _demand_regular(target)
        sizes = {name: str(int(getattr(self, name))) for name in _SIZES}
        metadata = {**self.notes, **sizes, "format": FORMAT, "version": str(VERSION)}
        # Bytes are written as they lie in memory: what a view only promises (a negation, a shared storage) is
        # made true first.
        tensors = {name: getattr(self, name).contiguous().resolve_neg() for name in _TENSORS}
        for name in ("step", "row_splits"):
            tensors[name] = tensors[name].clone()
        try:
            save_file(tensors, target, metadata)
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Reads and checks a trace. Raises TraceError; OSError if the file cannot be read.

        The sizes in the file's head are checked against each other before a tensor is made.
        """
        with needed_for("reading a routing trace"):
            from safetensors import SafetensorError, safe_open

        source = _path(path)
        _demand_regular(source)
        try:
            with safe_open(source, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                _demand(
                    metadata.get("format") == FORMAT,
                    f"{source} is not a routing trace (format {metadata.get('format')!r:.80})",
                )
                _demand(
                    metadata.get("version") == str(VERSION),
                    f"{source} has version {metadata.get('version'):.80}; this library reads {VERSION}",
                )
                present = set(file.keys())
                missing = [n for n in _TENSORS if n not in present]
                missing += [n for n in _SIZES if not _is_number(metadata.get(n, ""))]
                _demand(not missing, f"{source} lacks {', '.join(missing)}")
                sizes = {name: int(metadata.pop(name)) for name in _SIZES}
                slices = {name: file.get_slice(name) for name in _TENSORS}
                _check_description(sizes, {n: _described(part) for n, part in slices.items()})
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except SafetensorError as error:
            raise TraceError(f"{source} is not a safetensors file: {error}") from error
        notes = {k: v for k, v in metadata.items() if k not in ("format", "version")}
        trace = cls(sizes["num_layers"], sizes["num_ranks"], sizes["num_experts"], notes=notes, **tensors)
        trace.validate()
        return trace


class TraceWriter:
    """Collects batches, in the order in which they happen, into a `RoutingTrace`.

    Sizes from 1 to 2^31 - 1; `notes` are the writer's own and may not carry the names of the format's fields.
    Raises ArgumentTypeError, RangeError or, for notes, TraceError.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_ranks: int,
        num_experts: int,
        num_topk: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.num_layers = check_int("num_layers", num_layers, 1, MAX_SIZE)
        self.num_ranks = check_int("num_ranks", num_ranks, 1, MAX_SIZE)
        self.num_experts = check_int("num_experts", num_experts, 1, MAX_SIZE)
        self.num_topk = check_int("num_topk", num_topk, 1, MAX_SIZE)
        _check_notes({} if notes is None else notes)
        self.notes = dict(notes or {})
        self._dtype = torch.int16 if self.num_experts <= 1 << 15 else torch.int32
        self._steps: list[int] = []
        self._idx: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(
        self,
        step: int,
        layer: int,
        topk_idx: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor],
    ) -> None:
        """Appends one layer's routing: layers 0, 1, .. num_layers - 1 inside each step, steps ascending.

        topk_idx: R tensors [T_r, K] of any integer dtype. topk_weights: R tensors [T_r, K]; kept as float32.
        Raises TraceError, and leaves the recording as it was.
        """
        for name, number in (("step", step), ("layer", layer)):
            _demand(_is_integer(number), f"{name} is {type(number).__name__}; allowed: an integer of 64 bits")
        step, layer = int(step), int(layer)
        due = len(self._idx) // self.num_ranks % self.num_layers
        _demand(layer == due, f"layer {layer} was added where layer {due} is due")
        last = self._steps[-1:]
        if layer == 0:
            _demand(not last or step > last[0], f"step {step} follows step {last}")
        else:
            _demand(step == last[0], f"layer {layer} of step {step} follows step {last}")
        for name, given in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            _demand(
                isinstance(given, Sequence) and len(given) == self.num_ranks,
                f"{name} is {_kind(given)}; allowed: a list of {self.num_ranks} tensors, one a rank",
            )
        pairs = [self._checked(*pair) for pair in zip(topk_idx, topk_weights, strict=True)]
        if layer == 0:
            self._steps.append(step)
        self._idx += [idx for idx, _ in pairs]
        self._weights += [weights for _, weights in pairs]

    def _checked(self, idx: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of one rank's indices and weights, as they are kept."""
        for name, tensor in (("topk_idx", idx), ("topk_weights", weights)):
            _demand(isinstance(tensor, torch.Tensor), f"{name} holds {_kind(tensor)}; allowed: tensors")
            _demand(_has_values(tensor), f"{name} holds no values")
        _demand(idx.dtype in _INTEGERS, f"topk_idx is {idx.dtype}; allowed: integers")
        _demand(weights.dtype.is_floating_point, f"topk_weights is {weights.dtype}; allowed: floating point")
        _demand(
            idx.shape == weights.shape and idx.ndim == 2 and idx.shape[1] == self.num_topk,
            f"topk_idx is {list(idx.shape)}, topk_weights {list(weights.shape)}; K is {self.num_topk}",
        )
        wide = idx.detach().to("cpu", torch.int64, copy=True)
        if wide.numel():
            lowest, highest = (int(v) for v in wide.aminmax())
            inside = lowest >= (-1 if idx.dtype != torch.uint64 else 0) and highest < self.num_experts
            _demand(inside, f"topk_idx names an expert outside -1 to {self.num_experts - 1}")
        kept = weights.detach().resolve_neg().to("cpu", torch.float32, copy=True)
        return wide.to(self._dtype), kept

    def finish(self) -> RoutingTrace:
        """The checked trace of all whole steps. Raises TraceError in the middle of a step."""
        whole = len(self._steps) * self.num_layers * self.num_ranks
        _demand(
            len(self._idx) == whole, f"step {self._steps[-1:]} lacks some of its {self.num_layers} layers"
        )
        splits = torch.tensor(
            [0] + [len(part) for part in self._idx], dtype=torch.int64, device="cpu"
        ).cumsum(0)
        no_idx = torch.empty(0, self.num_topk, dtype=self._dtype, device="cpu")
        no_weights = torch.empty(0, self.num_topk, dtype=torch.float32, device="cpu")
        trace = RoutingTrace(
            self.num_layers,
            self.num_ranks,
            self.num_experts,
            step=torch.tensor(self._steps, dtype=torch.int64, device="cpu"),
            topk_idx=torch.cat([no_idx, *self._idx]),
            topk_weights=torch.cat([no_weights, *self._weights]),
            row_splits=splits,
            notes=self.notes,
        )
        trace.validate()
        return trace


def _has_values(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor).__torch_dispatch__ == torch.Tensor.__torch_dispatch__  # no DTensor, FakeTensor
    return is_plain and not tensor.is_meta and tensor.layout == torch.strided


def _check_description(
    sizes: Mapping[str, int], tensors: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]]
) -> None:
    """Raises TraceError where sizes, and dtypes and shapes of the tensors, are not those of one trace.

    Needs no values: nothing is allocated for a file that contradicts itself.
    """
    for name, (dtype, shape) in tensors.items():
        allowed = _TENSORS[name]
        _demand(dtype in allowed, f"{name} is {dtype}; allowed: {', '.join(map(str, allowed))}")
        dims = 2 if name.startswith("topk") else 1
        _demand(len(shape) == dims, f"{name} is {list(shape)}; allowed: {dims} dimensions")
    for name, size in sizes.items():
        least = 0 if name == "num_steps" else 1
        _demand(
            _is_integer(size) and least <= size <= MAX_SIZE,
            f"{name} is {size}; allowed: {least} to {MAX_SIZE}",
        )
    (num_steps,), (num_splits,) = tensors["step"][1], tensors["row_splits"][1]
    idx_shape, weights_shape = tensors["topk_idx"][1], tensors["topk_weights"][1]
    for name, found in (("num_steps", num_steps), ("num_topk", idx_shape[1])):
        given = sizes.get(name, found)
        _demand(given == found, f"{name} is {given}, the tensors say {found}")
    _demand(1 <= idx_shape[1] <= MAX_SIZE, f"topk_idx is {list(idx_shape)}; allowed: [rows, K], K from 1")
    _demand(weights_shape == idx_shape, f"topk_weights is {list(weights_shape)}, topk_idx {list(idx_shape)}")
    expected = num_steps * sizes["num_layers"] * sizes["num_ranks"] + 1
    _demand(num_splits == expected, f"row_splits is [{num_splits}], expected [{expected}]")


def _check_notes(notes: object) -> None:
    allowed = "allowed: a mapping from text to text"
    _demand(isinstance(notes, Mapping), f"notes is {type(notes).__name__}; {allowed}")
    assert isinstance(notes, Mapping)
    for key, value in notes.items():
        _demand(
            isinstance(key, str) and isinstance(value, str), f"notes has {_kind(value)} at {key!r}; {allowed}"
        )
        _demand(key not in ("format", "version", *_SIZES), f"notes has {key!r}, a field of the format")


def _described(part: Any) -> tuple[torch.dtype | str, tuple[int, ...]]:
    """Dtype and shape of a tensor in a file that was not read yet."""
    code = part.get_dtype()
    return _FILE_DTYPES.get(code, code), tuple(part.get_shape())


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError("path", type(path).__name__, "a path")
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise ArgumentError("path", repr(text), "a path of text without NUL")
    return Path(text)


def _demand_regular(path: Path) -> None:
    """A FIFO would be waited for, and a device read without end. Raises OSError where nothing is."""
    _demand(stat.S_ISREG(path.stat().st_mode), f"{path} is not a regular file")


def _is_number(text: str) -> bool:
    """Decimal digits, no more than an int64 has."""
    return text.isascii() and text.isdecimal() and len(text) <= 19


def _is_integer(value: object) -> bool:
    try:
        check_int("value", value, -(2**63), 2**63 - 1)
    except ArgumentError:
        return False
    return True


def _kind(value: object) -> str:
    """A short word on a value that was not expected."""
    return f"{len(value)} tensors" if isinstance(value, list | tuple) else type(value).__name__


def _demand(holds: bool | torch.Tensor, complaint: str) -> None:
    if not holds:
        raise TraceError(complaint)
