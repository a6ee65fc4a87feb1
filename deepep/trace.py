"""Routing traces: which experts every token of a run chose, and with which weights. The file format is
docs/trace.md.

Record with `TraceWriter`, replay by iterating over a `RoutingTrace`: each `RoutedBatch` holds, rank by
rank, the `topk_idx` and `topk_weights` that one MoE layer passed to dispatch in one step, ready to be
passed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deepep.errors import DeepEPError

FORMAT = "deepep.routing-trace"
VERSION = 1
_SIZES = ("num_steps", "num_layers", "num_ranks", "num_experts", "num_topk")
_TENSORS = {
    "topk_idx": (torch.int16, torch.int32),
    "topk_weights": (torch.float32,),
    "row_splits": (torch.int64,),
    "step": (torch.int64,),
}


class TraceError(DeepEPError, ValueError):
    """A file is not a routing trace of a known version, or its parts contradict each other."""


@dataclass(frozen=True)
class RoutedBatch:
    """One MoE layer's routing in one step, as lists indexed by rank."""

    step: int
    layer: int
    topk_idx: list[torch.Tensor]  # R x [T_r, K] int64, global expert or -1
    topk_weights: list[torch.Tensor]  # R x [T_r, K] float32

    def reshard(self, num_ranks: int) -> RoutedBatch:
        """The same tokens in the same order, dealt to `num_ranks` ranks in contiguous, nearly equal parts."""
        idx, weights = torch.cat(self.topk_idx), torch.cat(self.topk_weights)
        return RoutedBatch(
            self.step,
            self.layer,
            list(idx.tensor_split(num_ranks)),
            list(weights.tensor_split(num_ranks)),
        )


@dataclass(frozen=True)
class RoutingTrace:
    """A whole trace in memory. Rows are sorted by (step, layer, rank, token); `row_splits` says where each
    rank begins.

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
        """The routing of `layer` in the `step_index`-th recorded step."""
        if not (0 <= step_index < self.num_steps and 0 <= layer < self.num_layers):
            raise IndexError(f"no layer {layer} in recorded step {step_index}")
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
        rows = len(self.topk_idx)
        _demand(self.topk_idx.ndim == 2, "topk_idx is not [rows, K]")
        _demand(
            self.topk_weights.shape == self.topk_idx.shape,
            f"topk_weights is {list(self.topk_weights.shape)}, topk_idx {list(self.topk_idx.shape)}",
        )
        for name, allowed in _TENSORS.items():
            dtype = getattr(self, name).dtype
            _demand(dtype in allowed, f"{name} is {dtype}; allowed: {', '.join(map(str, allowed))}")
        expected = self.num_steps * self.num_layers * self.num_ranks + 1
        _demand(
            self.row_splits.shape == (expected,),
            f"row_splits is {list(self.row_splits.shape)}, expected [{expected}]",
        )
        _demand(
            self.row_splits[0] == 0 and self.row_splits[-1] == rows,
            f"row_splits does not run from 0 to {rows}",
        )
        _demand(bool((self.row_splits.diff() >= 0).all()), "row_splits descends")
        _demand(bool((self.step.diff() > 0).all()), "steps do not ascend")
        # As Python ints: a comparison in the tensor's own 16 bits would wrap the number of experts.
        lowest, highest = (int(v) for v in self.topk_idx.aminmax()) if self.topk_idx.numel() else (-1, -1)
        _demand(
            lowest >= -1 and highest < self.num_experts,
            f"topk_idx names an expert outside -1 to {self.num_experts - 1}",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace, checked, as a safetensors file."""
        from safetensors.torch import save_file

        self.validate()
        sizes = {name: str(getattr(self, name)) for name in _SIZES}
        metadata = {**self.notes, **sizes, "format": FORMAT, "version": str(VERSION)}
        save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Reads and checks a trace. Raises TraceError; OSError if the file cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                _demand(
                    metadata.get("format") == FORMAT,
                    f"{path} is not a routing trace (format {metadata.get('format')!r})",
                )
                _demand(
                    metadata.get("version") == str(VERSION),
                    f"{path} has version {metadata.get('version')}; this library reads {VERSION}",
                )
                present = set(file.keys())
                missing = [n for n in _TENSORS if n not in present]
                missing += [n for n in _SIZES if not metadata.get(n, "").isdecimal()]
                _demand(not missing, f"{path} lacks {', '.join(missing)}")
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except SafetensorError as error:
            raise TraceError(f"{path} is not a safetensors file: {error}") from error
        sizes = {name: int(metadata.pop(name)) for name in _SIZES}
        notes = {k: v for k, v in metadata.items() if k not in ("format", "version")}
        trace = cls(sizes["num_layers"], sizes["num_ranks"], sizes["num_experts"], notes=notes, **tensors)
        trace.validate()
        for name in ("num_steps", "num_topk"):
            _demand(
                sizes[name] == getattr(trace, name),
                f"{path} says {name} is {sizes[name]}, its tensors say {getattr(trace, name)}",
            )
        return trace


class TraceWriter:
    """Collects batches, in the order in which they happen, into a `RoutingTrace`."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_ranks: int,
        num_experts: int,
        num_topk: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.num_layers, self.num_ranks = num_layers, num_ranks
        self.num_experts, self.num_topk = num_experts, num_topk
        self.notes = dict(notes or {})
        self._dtype = torch.int16 if num_experts <= 1 << 15 else torch.int32
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
        """Appends one layer's routing. Layers come as 0, 1, .. num_layers - 1 inside each step, steps
        ascending.

        topk_idx: R tensors [T_r, K] of any integer dtype. topk_weights: R tensors [T_r, K]; kept as float32.
        """
        due = len(self._idx) // self.num_ranks % self.num_layers
        _demand(layer == due, f"layer {layer} was added where layer {due} is due")
        if layer == 0:
            _demand(not self._steps or step > self._steps[-1], f"step {step} follows step {self._steps[-1:]}")
            self._steps.append(step)
        _demand(step == self._steps[-1], f"layer {layer} of step {step} follows step {self._steps[-1]}")
        _demand(
            len(topk_idx) == len(topk_weights) == self.num_ranks,
            f"{len(topk_idx)} and {len(topk_weights)} tensors for {self.num_ranks} ranks",
        )
        for idx, weights in zip(topk_idx, topk_weights, strict=True):
            _demand(
                idx.shape == weights.shape and idx.shape[1:] == (self.num_topk,),
                f"topk_idx is {list(idx.shape)}, topk_weights {list(weights.shape)}, K is {self.num_topk}",
            )
            outside = (idx < -1) | (idx >= self.num_experts)
            _demand(not outside.any(), f"topk_idx names an expert outside -1 to {self.num_experts - 1}")
            self._idx.append(idx.detach().to("cpu", self._dtype, copy=True))
            self._weights.append(weights.detach().to("cpu", torch.float32, copy=True))

    def finish(self) -> RoutingTrace:
        """The checked trace of all whole steps. Raises TraceError in the middle of a step."""
        whole = len(self._steps) * self.num_layers * self.num_ranks
        _demand(len(self._idx) == whole, f"step {self._steps[-1:]} has not seen all {self.num_layers} layers")
        splits = torch.tensor([0] + [len(part) for part in self._idx], dtype=torch.int64).cumsum(0)
        trace = RoutingTrace(
            self.num_layers,
            self.num_ranks,
            self.num_experts,
            step=torch.tensor(self._steps, dtype=torch.int64),
            topk_idx=torch.cat([torch.empty(0, self.num_topk, dtype=self._dtype), *self._idx]),
            topk_weights=torch.cat([torch.empty(0, self.num_topk), *self._weights]),
            row_splits=splits,
            notes=self.notes,
        )
        trace.validate()
        return trace


def _demand(holds: bool | torch.Tensor, complaint: str) -> None:
    if not holds:
        raise TraceError(complaint)
