"""Values of a case's tensors, such that they give away a row, a scale or a weight in the wrong place.

Everything is a function of the case's seed, the rank and the tensor's name, so every process makes the
same tensors by itself and no payload has to travel to set up an example.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepep.sim.cases.case import Case

#: bfloat16 bit patterns that arithmetic treats specially: NaNs (quiet, negative, signalling), infinities,
#: signed zeros, the smallest and the largest numbers.
SPECIAL_BF16 = np.array(
    [0x7FC1, 0xFFC0, 0x7F81, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F], dtype=np.uint16
)
#: float32 likewise.
SPECIAL_F32 = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38], dtype=np.float32)

#: Channels 0 to 2 of an "ids" row are ID_BASE plus the rank and two halves of the token: numbers of about 2.
ID_BASE = 0x4000
TOKEN_BITS = 10


@dataclass(frozen=True)
class RankInputs:
    """One rank's arguments.

    Attributes:
        x: [T, H] bf16, e4m3 or uint8.
        scales: [T, P] float32 or int32 in the case's memory layout; None for bf16.
        topk_idx: [T, K] int32 or int64.
        topk_weights: [T, K] float32.
        biases: up to two [T, H] bf16.
        tokens: [T, H] bf16: x of the low-latency operations.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor
    biases: tuple[Tensor, ...]
    tokens: Tensor

    def to(self, device: torch.device) -> RankInputs:
        """The same on another device, strides included."""
        if device.type == "cpu":
            return self
        scales = None
        if self.scales is not None:
            scales = torch.empty_strided(
                self.scales.shape, self.scales.stride(), dtype=self.scales.dtype, device=device
            ).copy_(self.scales)
        return RankInputs(
            x=self.x.to(device),
            scales=scales,
            topk_idx=self.topk_idx.to(device),
            topk_weights=self.topk_weights.to(device),
            biases=tuple(bias.to(device) for bias in self.biases),
            tokens=self.tokens.to(device),
        )


def inputs(case: Case, rank: int, *, again: bool = False) -> RankInputs:
    """The arguments of `rank`; with `again` those of a second call: other values, the same routing."""
    if case.parent is not None:
        window = case.parent
        return _cut(inputs(window.case, window.ranks[rank], again=again), window.tokens[rank], case, rank)
    suffix = "'" if again else ""
    num_tokens = case.num_tokens[rank]
    payload, _, scale_type = case.options.payload.partition("+")
    tokens = _bf16_rows(case, rank, num_tokens, "x" + suffix)
    x = tokens if payload == "bf16" else _byte_rows(case, rank, "x" + suffix)
    if payload == "e4m3":
        x = x.view(torch.float8_e4m3fn)
    indices = torch.from_numpy(case.topk_idx[rank])
    return RankInputs(
        x=x,
        scales=_scales(case, rank, scale_type, "scales" + suffix) if scale_type else None,
        topk_idx=indices.to(torch.int32) if case.options.idx_dtype == "int32" else indices.clone(),
        topk_weights=_weights(case, rank),
        biases=tuple(_bf16_rows(case, rank, num_tokens, f"bias{i}") for i in range(case.options.biases)),
        tokens=tokens,
    )


def _cut(whole: RankInputs, tokens: slice, case: Case, rank: int) -> RankInputs:
    """Some tokens of another case's arguments, with the indices of this one."""
    indices = torch.from_numpy(case.topk_idx[rank])
    return RankInputs(
        x=whole.x[tokens],
        scales=None if whole.scales is None else whole.scales[tokens],
        topk_idx=indices.to(whole.topk_idx.dtype, copy=True),
        topk_weights=whole.topk_weights[tokens],
        biases=tuple(bias[tokens] for bias in whole.biases),
        tokens=whole.tokens[tokens],
    )


def other_rows(case: Case, rank: int, num_rows: int, name: str = "expert output") -> Tensor:
    """[num_rows, H] bf16: what experts might return for received rows."""
    return _bf16_rows(case, rank, num_rows, name)


def decode_id(row: npt.NDArray[np.uint16]) -> tuple[int, int]:
    """(rank, token) of an "ids" row of bf16 bits."""
    rank, low, high = (int(bits) - ID_BASE for bits in row[:3])
    return rank, low + (high << TOKEN_BITS)


def _rng(case: Case, rank: int, name: str) -> np.random.Generator:
    return np.random.default_rng((case.seed, rank, zlib.crc32(name.encode())))


def _bf16_rows(case: Case, rank: int, num_rows: int, name: str) -> Tensor:
    kind, shape = case.options.values, (num_rows, case.hidden)
    if kind == "zeros":
        bits = (_rng(case, rank, name).integers(0, 2, shape) << 15).astype(np.uint16)
    elif kind == "ids":
        bits = _id_bits(case, rank, num_rows, name)
    else:
        rng = _rng(case, rank, name)
        bits = _spread_bits(rng, shape)
        if kind == "nonfinite":
            special = rng.random(shape) < 0.05
            bits[special] = rng.choice(SPECIAL_BF16, int(special.sum()))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _id_bits(case: Case, rank: int, num_rows: int, name: str) -> npt.NDArray[np.uint16]:
    """Numbers between 2 and 4 (sums of a few are exact in float32), a row known by its first three."""
    row = np.arange(num_rows, dtype=np.uint64)[:, None]
    channel = np.arange(case.hidden, dtype=np.uint64)[None, :]
    key = np.uint64(zlib.crc32(name.encode()) ^ case.seed)
    mixed = _mix(
        (row << np.uint64(32)) + (channel << np.uint64(8)) + np.uint64(rank) + (key << np.uint64(16))
    )
    bits = (ID_BASE + (mixed & np.uint64(0x7F))).astype(np.uint16)
    bits[:, 0] = ID_BASE + rank
    bits[:, 1] = ID_BASE + (np.arange(num_rows) & ((1 << TOKEN_BITS) - 1))
    bits[:, 2] = ID_BASE + (np.arange(num_rows) >> TOKEN_BITS)
    return bits


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _spread_bits(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """Both signs, any mantissa; up to ten binary orders of magnitude inside a row, forty between rows."""
    top = 127 + rng.integers(-30, 11, (shape[0], 1))
    exponent = top - rng.integers(0, 11, shape)
    sign_and_mantissa = rng.integers(0, 256, shape)
    bits = (sign_and_mantissa >> 7 << 15) | (exponent << 7) | (sign_and_mantissa & 0x7F)
    return bits.astype(np.uint16)


def _byte_rows(case: Case, rank: int, name: str) -> Tensor:
    """[T, H] uint8: any byte, and the rank and token in the first three."""
    num_tokens = case.num_tokens[rank]
    rows = _rng(case, rank, name).integers(0, 256, (num_tokens, case.hidden), dtype=np.uint8)
    rows[:, 0] = rank
    rows[:, 1] = np.arange(num_tokens) & 0xFF
    rows[:, 2] = np.arange(num_tokens) >> 8
    return torch.from_numpy(rows)


def _scales(case: Case, rank: int, dtype: str, name: str) -> Tensor:
    """[T, P]: rank, token and column in each word, which is a finite float32 as well."""
    num_tokens, columns = case.num_tokens[rank], case.options.scale_columns
    token, column = np.arange(num_tokens)[:, None], np.arange(columns)[None, :]
    again = 1 if name.endswith("'") else 0
    words = 0x40000000 + (again << 29 >> 2) + (rank << 18) + (token << 7) + column
    plain = torch.from_numpy(words.astype(np.int32)).view(getattr(torch, dtype))
    layout = case.options.scale_layout
    if layout == "column":
        return plain.t().contiguous().t()
    if layout == "padded":
        return _inside(plain, num_tokens, columns + 3, slice(0, columns))
    if layout == "every_other":
        return _inside(plain, num_tokens, 2 * columns, slice(0, None, 2))
    return plain


def _inside(plain: Tensor, rows: int, columns: int, where: slice) -> Tensor:
    """`plain` as a view into a wider tensor whose other elements are noise."""
    wide = torch.full((rows, columns), -1, dtype=torch.int32).view(plain.dtype)
    wide[:, where] = plain
    return wide[:, where]


def _weights(case: Case, rank: int) -> Tensor:
    """[T, K] float32. Entries without an expert hold values too, which must not go anywhere."""
    shape = (case.num_tokens[rank], case.num_topk)
    kind = case.options.values
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ids":
        index = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
        return torch.from_numpy(index + 1 + 65536 * rank)
    rng = _rng(case, rank, "weights")
    weights = rng.standard_normal(shape).astype(np.float32)
    if kind == "nonfinite":
        special = rng.random(shape) < 0.1
        weights[special] = rng.choice(SPECIAL_F32, int(special.sum()))
        weights[case.topk_idx[rank] < 0] = np.nan
    return torch.from_numpy(weights)
