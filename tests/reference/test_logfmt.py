"""LogFMT: codes by exhaustive search, error bounds, which chunks are encoded, and exact packing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference.logfmt import (
    logfmt_decode,
    logfmt_encode,
    logfmt_pack,
    logfmt_qualifies,
    logfmt_roundtrip,
    logfmt_unpack,
)

GROUP = 128
# Logarithms reach 133 in magnitude, where float32 errs by 2**-18; a few such errors, as a share of the value.
SLACK = 4 * 2.0**-18


@st.composite
def rows(draw: st.DrawFn, hidden: int = GROUP) -> Tensor:
    """[hidden] bfloat16 that qualifies: magnitudes below 1, two different ones at least, some zeros."""
    top = draw(st.integers(3, 126))
    spread = draw(st.integers(0, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    exponents = np.clip(top - rng.integers(0, spread + 1, hidden), 0, 126)
    bits = rng.integers(0, 2, hidden) << 15 | exponents << 7 | rng.integers(0, 128, hidden)
    bits[rng.random(hidden) < draw(st.sampled_from([0.0, 0.1]))] &= 0x8000
    bits[::GROUP], bits[1::GROUP] = top << 7 | 3, top << 7 | 2
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def low_and_step(magnitude: Tensor) -> tuple[float, float]:
    """In float64: log2 of the smallest nonzero value that has a code, and the codes' distance in log2."""
    high = float(magnitude.max().double().log2())
    smallest = float(magnitude.min().double())
    low = max(np.log2(smallest), high - 32) if smallest > 0 else high - 32
    return low, (high - low) / 510


@settings(max_examples=60, deadline=None)
@given(rows())
def test_codes_are_the_nearest(x: Tensor) -> None:
    codes, meta, qualifies = logfmt_encode(x)
    assert qualifies.all()
    magnitude = x.double().abs()
    assert meta.tolist() == [[float(magnitude.max()), float(magnitude.min())]]
    low, step = low_and_step(magnitude)
    table = torch.cat([torch.zeros(1).double(), 2.0 ** (low + torch.arange(511).double() * step)])
    got = table[(codes & 511).long()]
    best = (magnitude.unsqueeze(1) - table).abs().amin(1)
    # Below the smallest code the threshold is the lower neighbour's middle, not half of the smallest value.
    below = magnitude < 2.0**low
    smallest = 2.0**low * (1 + 2.0**-step) / 2
    assert ((got - magnitude).abs()[~below] <= best[~below] + magnitude[~below] * SLACK).all()
    assert (got[below & (magnitude < smallest * (1 - SLACK))] == 0).all()
    assert torch.equal((codes >> 9) != 0, x.signbit())


@settings(max_examples=60, deadline=None)
@given(rows())
def test_round_trip_error(x: Tensor) -> None:
    # Neighbouring codes lie a factor 2**step apart: a value is at most (2**step - 1) / 2 of itself off, and
    # half a subnormal, 2**-150. What is below the range (amax / 2**32) may become zero or the smallest code.
    low, step = low_and_step(x.abs())
    error = (logfmt_roundtrip(x).double() - x.double()).abs()
    allowed = x.double().abs() * ((2.0**step - 1) / 2 + SLACK) + 2.0**-150
    assert (error <= torch.where(x.double().abs() < 2.0**low, 2.0**low, allowed)).all()
    assert torch.equal(logfmt_roundtrip(x).signbit(), x.signbit())


@settings(max_examples=60, deadline=None)
@given(rows())
def test_ends_have_the_end_codes(x: Tensor) -> None:
    codes = logfmt_encode(x).codes & 511
    magnitude = x.abs()
    assert (codes[magnitude == magnitude.max()] == 511).all()
    if magnitude.min() > 0 and magnitude.max() < magnitude.min() * 2**32:
        assert (codes[magnitude == magnitude.min()] == 1).all()
    assert (codes[x == 0] == 0).all()
    order = magnitude.float().argsort()
    assert (codes[order].diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(rows())
def test_codes_stand_for_rising_values(x: Tensor) -> None:
    _, meta, _ = logfmt_encode(x)
    codes = torch.arange(1024, dtype=torch.int16).view(8, GROUP)
    values = logfmt_decode(codes, meta.expand(8, 1, 2))
    assert torch.equal(values.signbit(), codes > 511)
    assert (values[codes & 511 == 0] == 0).all()
    assert (values.abs().view(2, 512).diff() >= 0).all()  # equal only where float32 itself runs out
    assert values.abs().max() == pytest.approx(float(x.abs().max()), rel=SLACK, abs=2.0**-149)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_packing_is_exact(units: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1024, (2, 16 * units), dtype=np.int16))
    words = logfmt_pack(codes)
    assert words.shape == (2, 5 * units)
    assert torch.equal(logfmt_unpack(words), codes)
    for row in range(2):  # the format of the specification, bit by bit, as one number
        for unit in range(units):
            sixteen = [int(c) for c in codes[row, 16 * unit : 16 * unit + 16]]
            number = sum((c & 511) << 9 * i for i, c in enumerate(sixteen))
            number |= sum((c >> 9) << 144 + i for i, c in enumerate(sixteen))
            got = [int(w) & 0xFFFFFFFF for w in words[row, 5 * unit : 5 * unit + 5]]
            assert got == [number >> 32 * i & 0xFFFFFFFF for i in range(5)]


def plain(hidden: int) -> Tensor:
    """One row of two magnitudes below 1: qualifies everywhere."""
    row = torch.full((hidden,), 0.5)
    row[::2] = 0.25
    return row.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda g: g.fill_(0.25), "one magnitude"),
        (lambda g: g.fill_(0.0), "all zero"),
        (lambda g: g[3:4].fill_(-1.0), "1 is not below 1"),
        (lambda g: g[3:4].fill_(float("inf")), "an infinity"),
        (lambda g: g[3:4].fill_(float("nan")), "a NaN"),
    ],
)
@pytest.mark.parametrize(
    ("hidden", "chunk"),
    [(128, 128), (384, 384), (512, 512), (640, 512), (1024, 1024), (1536, 512), (2048, 1024)],
)
def test_chunks_qualify_together(
    spoil: Callable[[Tensor], object], why: str, hidden: int, chunk: int
) -> None:
    for group in range(hidden // GROUP):
        x = plain(hidden)
        spoil(x[group * GROUP : (group + 1) * GROUP])
        _, meta, qualifies = logfmt_encode(x.unsqueeze(0))
        want = torch.tensor([g * GROUP // chunk != group * GROUP // chunk for g in range(hidden // GROUP)])
        assert torch.equal(qualifies[0], want), why
        assert torch.equal(logfmt_qualifies(meta), qualifies), "the metadata alone tells"
        sent_raw = ~want.repeat_interleave(GROUP)
        got = logfmt_roundtrip(x.unsqueeze(0))[0]
        assert torch.equal(got[sent_raw].nan_to_num(7.0), x.float()[sent_raw].nan_to_num(7.0))


def test_by_hand() -> None:
    # amax 2**-1, amin 2**-11: 10 octaves in 510 steps, 51 an octave.
    x = torch.full((GROUP,), 2.0**-11).to(torch.bfloat16)
    x[0], x[1], x[2], x[3] = 0.5, -0.5, 0.25, -(2.0**-6)
    codes = logfmt_encode(x).codes
    assert codes[:5].tolist() == [511, 1023, 460, 512 + 256, 1]
    values = logfmt_decode(codes, logfmt_encode(x).meta)
    assert torch.equal(values[:5], torch.tensor([0.5, -0.5, 0.25, -(2.0**-6), 2.0**-11]))


def test_range_is_capped_at_32_octaves() -> None:
    x = plain(GROUP)
    x[0], x[1], x[2] = 2.0**-33, 2.0**-34, 0.0
    codes = logfmt_encode(x).codes
    assert codes[:3].tolist() == [1, 0, 0]  # amax is 2**-1: 2**-33 is the smallest that has a code


def test_no_rows() -> None:
    for hidden in (128, 1024, 1536):
        codes, meta, qualifies = logfmt_encode(torch.zeros(0, hidden, dtype=torch.bfloat16))
        assert codes.shape == (0, hidden)
        assert meta.shape == (0, hidden // GROUP, 2)
        assert qualifies.shape == (0, hidden // GROUP)
        assert logfmt_unpack(logfmt_pack(codes)).shape == (0, hidden)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: logfmt_encode(torch.zeros(GROUP)), "x: got torch.float32"),
        (lambda: logfmt_encode(torch.zeros(100, dtype=torch.bfloat16)), r"x: got \[100\]"),
        (lambda: logfmt_decode(torch.zeros(1, GROUP).short(), torch.zeros(2, 1, 2).bfloat16()), "codes"),
        (lambda: logfmt_pack(torch.zeros(8, dtype=torch.int16)), "codes"),
        (lambda: logfmt_unpack(torch.zeros(8, dtype=torch.int32)), "words"),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
