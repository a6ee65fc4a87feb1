"""FP8 casts and packed scales: each formula again in scalar float32, and what must come back exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference.formats import (
    column_major_scales,
    empty_column_major,
    fp8_cast,
    fp8_uncast,
    ue8m0_pack,
    ue8m0_unpack,
)

GROUP = 128
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # the value of every byte
E4M3_FINITE = E4M3[~E4M3.isnan()]


def nearest_e4m3(value: float) -> int:
    """The byte nearest to a finite float32, ties to the even byte, saturating; by looking at all of them."""
    sign = 0x80 if np.signbit(value) else 0
    distances = (E4M3[:127].double() - min(abs(value), 448.0)).abs()
    nearest = [byte for byte in range(127) if distances[byte] == distances.min()]
    return sign | next(byte for byte in nearest if len(nearest) == 1 or byte % 2 == 0)


@st.composite
def bf16_groups(draw: st.DrawFn) -> Tensor:
    """One group of 128 finite bfloat16 values; magnitudes from subnormal to the largest."""
    exponent = draw(st.integers(0, 254))
    spread = draw(st.integers(0, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    exponents = np.clip(exponent - rng.integers(0, spread + 1, GROUP), 0, 254)
    bits = rng.integers(0, 2, GROUP) << 15 | exponents << 7 | rng.integers(0, 128, GROUP)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(bf16_groups(), st.booleans())
def test_cast_value_by_value(x: Tensor, round_scale: bool) -> None:
    values, scale_inv = fp8_cast(x, round_scale)
    floats = x.float().numpy()
    amax = max(np.abs(floats).max(), np.float32(1e-4))
    want_inv = np.float32(amax) / np.float32(448.0)
    scale = np.float32(448.0) / np.float32(amax)
    if round_scale:
        power = int(
            np.ceil(np.log2(np.float64(want_inv)))
        )  # float64 log2 of a float32 cannot miss a power of two
        want_inv, scale = np.float32(2.0**power), np.float32(2.0**-power)
    assert scale_inv.item() == want_inv
    got = values.view(torch.uint8).tolist()
    sample = range(0, GROUP, 7)
    assert [got[i] for i in sample] == [nearest_e4m3(float(floats[i] * scale)) for i in sample]
    assert values.float().abs().max() <= 448.0


def nearest_bytes(values: np.ndarray) -> np.ndarray:
    """nearest_e4m3 for many: by counting the middles between neighbours that lie below."""
    table = E4M3[:127].double().numpy()
    middles = (table[:-1] + table[1:]) / 2  # exact in float64; middle i lies between bytes i and i + 1
    magnitude = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    below = np.searchsorted(middles, magnitude, side="left")
    on_a_tie = np.isin(magnitude, middles)
    return np.where(on_a_tie & (below % 2 == 1), below + 1, below) | np.signbit(values) * 0x80


@pytest.mark.parametrize("round_scale", [False, True])
def test_every_pair_of_mantissas(round_scale: bool) -> None:
    # One row for each mantissa of amax and each distance of exponents: all 128 mantissas below it. Any other
    # rounding of the scale or of the product, such as by way of a reciprocal, shows in some of these 262,144.
    mantissa = torch.arange(GROUP) / GROUP + 1.0
    distance = 2.0 ** -torch.arange(1.0, 17.0)
    x = (mantissa * distance.unsqueeze(1)).expand(GROUP, 16, GROUP).clone()
    x[:, :, 0] = mantissa.unsqueeze(1)  # amax
    x[:, :, 1::2] *= -1
    values, scale_inv = fp8_cast(x.to(torch.bfloat16), round_scale)
    amax = mantissa.numpy().astype(np.float32)
    inv, scale = amax / np.float32(448.0), np.float32(448.0) / amax
    if round_scale:
        inv = np.exp2(np.ceil(np.log2(inv.astype(np.float64)))).astype(np.float32)
        scale = np.float32(1.0) / inv
    assert (scale_inv.squeeze(-1).numpy() == inv[:, None]).all()
    want = nearest_bytes(x.numpy() * scale[:, None, None])
    assert (values.view(torch.uint8).numpy() == want).all()


@settings(max_examples=60, deadline=None)
@given(bf16_groups())
def test_round_trip_error(x: Tensor) -> None:
    # Rounding to 4 significant bits errs by at most 2**-4 of the value, or by half of the smallest subnormal,
    # 2**-10, in scaled units. Scaling there and back adds float32 roundings, below 2**-21 of the value.
    values, scale_inv = fp8_cast(x)
    error = (fp8_uncast(values, scale_inv).double() - x.double()).abs()
    assert (error <= x.double().abs() * (2**-4 + 2**-21) + scale_inv.double() * 2**-10).all()


def test_round_trip_is_exact_where_it_can_be() -> None:
    # Values of e4m3 times a power of two, with the largest present: the rounded scale is that power of two.
    codes = torch.arange(GROUP) % 127
    values = E4M3[codes] * torch.where(torch.arange(GROUP) % 2 == 0, 1.0, -1.0)
    for power in (-12, -3, 0, 5):
        x = (values * 2.0**power).to(torch.bfloat16)
        got, scale_inv = fp8_cast(x, round_scale=True)
        assert scale_inv.item() == 2.0**power
        assert torch.equal(got.float(), values)
        assert torch.equal(got.float().signbit(), values.signbit())
        assert torch.equal(fp8_uncast(got, scale_inv), x.float())
        packed = ue8m0_pack(scale_inv.expand(4))
        assert torch.equal(fp8_uncast(got.expand(4, GROUP).reshape(-1), packed), x.float().repeat(4))


@pytest.mark.parametrize("amax", [448.0, 449.0, 447.0, 224.0, 1e-4, 2.0**-13 * 448, 3.3895313892515355e38])
def test_rounded_scale_is_the_power_of_two_above(amax: float) -> None:
    x = torch.zeros(GROUP)
    x[5] = -amax
    exact = fp8_cast(x).scale_inv.item()
    rounded = fp8_cast(x, round_scale=True).scale_inv.item()
    assert np.frexp(rounded)[0] == 0.5
    assert rounded / 2 < exact <= rounded


def test_zeros_and_small_values_stand_on_the_floor() -> None:
    x = torch.zeros(2, GROUP, dtype=torch.bfloat16)
    x[0, 1], x[1, 0] = -0.0, 2.0**-30
    values, scale_inv = fp8_cast(x)
    assert (scale_inv == np.float32(1e-4) / np.float32(448.0)).all()
    assert values.view(torch.uint8)[0, :2].tolist() == [0, 0x80]
    # 2**-30 * 448 / 1e-4 = 0.00417: between 2 and 3 units of the smallest subnormal, 2**-9.
    assert values.view(torch.uint8)[1, 0] == 2


def test_groups_have_their_own_scales() -> None:
    x = torch.ones(3, 2 * GROUP, dtype=torch.bfloat16)
    x[1, :GROUP] = 4.0
    values, scale_inv = fp8_cast(x)
    assert values.shape == (3, 2 * GROUP)
    assert (values.float() == 448.0).all()
    ratio = scale_inv / scale_inv[0, 0]
    assert ratio.tolist() == [[1.0, 1.0], [4.0, 1.0], [1.0, 1.0]]


def test_nan_stays_nan_and_leaves_its_group_alone() -> None:
    x = torch.full((GROUP,), 2.0).to(torch.bfloat16)
    x[3], x[4] = float("nan"), -float("nan")
    x.view(torch.int16)[5] = 0x7F81  # signalling
    values, scale_inv = fp8_cast(x)
    assert values.view(torch.uint8)[3:6].tolist() == [0x7F] * 3
    assert (values.float()[6:] == 448.0).all()
    assert scale_inv.item() == np.float32(2.0) / np.float32(448.0)
    all_nan = fp8_cast(torch.full((GROUP,), float("nan")))
    assert all_nan.scale_inv.item() == np.float32(1e-4) / np.float32(448.0)
    assert (all_nan.values.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("round_scale", [False, True])
def test_infinity_takes_its_group_along(round_scale: bool) -> None:
    x = torch.full((2, GROUP), -2.0).to(torch.bfloat16)
    x[0, 3], x[0, 4] = float("inf"), -float("inf")
    values, scale_inv = fp8_cast(x, round_scale)
    assert scale_inv[0].item() == float("inf")
    assert values.view(torch.uint8)[0, :6].tolist() == [0x80, 0x80, 0x80, 0x7F, 0x7F, 0x80]
    assert values[1].float().abs().max() > 200  # the other row does not notice


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 254), min_size=4, max_size=16).map(lambda e: e[: len(e) // 4 * 4]))
def test_ue8m0_round_trip(exponents: list[int]) -> None:
    scales = torch.tensor([2.0 ** (e - 127) for e in exponents])
    packed = ue8m0_pack(scales)
    assert packed.tolist() == [
        int(np.array(exponents[i : i + 4], dtype=np.uint8).view("<i4")[0])
        for i in range(0, len(exponents), 4)
    ]
    assert torch.equal(ue8m0_unpack(packed), scales)


def test_ue8m0_all_bytes_and_odd_strides() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.int32)
    assert torch.equal(ue8m0_pack(ue8m0_unpack(every)), every)
    assert ue8m0_pack(torch.tensor([1.0, 1.5, 2.0, 3.99])).item() == 0x80807F7F - (1 << 32)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0] * 6).view(4, 6).t()
    assert torch.equal(ue8m0_unpack(ue8m0_pack(scales)), scales)
    one = torch.full((8,), 0x7F7F7F7F, dtype=torch.int32).as_strided((1, 1), (3, 5))
    assert torch.equal(ue8m0_unpack(one), torch.ones(1, 4))
    assert torch.equal(ue8m0_pack(torch.ones(8).as_strided((1, 4), (3, 1))), one)


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 1, 1), (3, 4, 1), (2, 1, 4), (2, 0, 3)])
def test_column_major(shape: tuple[int, int, int]) -> None:
    scales = torch.rand(shape)
    stored = column_major_scales(scales)
    assert torch.equal(stored, scales)
    assert stored.stride() == (shape[1] * shape[2], 1, shape[1]) or stored.numel() == 0
    assert empty_column_major(list(shape), torch.int32, torch.device("cpu")).stride() == stored.stride()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fp8_cast(torch.zeros(2, 100)), r"values: got \[2, 100\]"),
        (lambda: fp8_cast(torch.zeros(2, GROUP).half()), "x: got torch.float16"),
        (lambda: fp8_uncast(torch.zeros(2, GROUP), torch.zeros(2, 2)), r"scale_inv.*\[2, 2\].*\[2, 1\]"),
        (lambda: fp8_uncast(torch.zeros(2, GROUP), torch.zeros(2, 1).double()), "scale_inv"),
        (lambda: ue8m0_pack(torch.zeros(2, 3)), "scale_inv"),
        (lambda: ue8m0_pack(torch.zeros(2, 4).double()), "scale_inv"),
        (lambda: ue8m0_unpack(torch.zeros(2, 4)), "packed"),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
