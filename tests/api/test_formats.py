"""deepep.formats gives the bits of the oracle's casts, which share no code with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep import ArgumentError, ArgumentTypeError, ShapeError, formats
from deepep.reference import formats as oracle

SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-39,
    1e-4,
    448.0,
    -448.0,
    3.0e38,
    torch.inf,
    -torch.inf,
    torch.nan,
    -torch.nan,
]


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """[..., H] of any bits, or of magnitudes of all kinds; with zeros, subnormals, infinities and NaN."""
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    hidden = 128 * draw(st.sampled_from([0, 1, 4, 8]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (*lead, hidden)
    kind = draw(st.sampled_from(["bits", "scaled", "zeros"]))
    if kind == "bits":
        x = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)
    elif kind == "scaled":
        x = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-140, 120))
    else:
        x = torch.zeros(shape)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        if x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (1,), generator=generator))] = value
    return x.to(dtype)


def bits(t: torch.Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()


@settings(max_examples=400, deadline=None)
@given(rows(), st.booleans())
def test_casts_as_the_oracle(x: torch.Tensor, round_scale: bool) -> None:
    ours, theirs = formats.fp8_cast(x, round_scale=round_scale), oracle.fp8_cast(x, round_scale)
    assert bits(ours.values) == bits(theirs.values)
    assert bits(ours.scales) == bits(theirs.scale_inv)
    back = formats.fp8_uncast(*ours)
    assert bits(back) == bits(oracle.fp8_uncast(*theirs))
    if round_scale and x.shape[-1] in (512, 1024):
        packed = formats.fp8_cast(x, round_scale=True, use_ue8m0=True)
        assert bits(packed.values) == bits(ours.values)
        assert bits(packed.scales) == bits(oracle.ue8m0_pack(theirs.scale_inv))
        assert bits(formats.fp8_uncast(*packed)) == bits(back)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), st.booleans())
def test_packs_as_the_oracle(words: list[int], strided: bool) -> None:
    packed = torch.tensor(words, dtype=torch.int32).view(1, -1)
    scales = formats.ue8m0_unpack(packed)
    assert bits(scales) == bits(oracle.ue8m0_unpack(packed))
    assert bits(formats.ue8m0_pack(scales)) == bits(packed)
    any_scales = torch.tensor(words * 4, dtype=torch.int32).view(torch.float32).view(len(words), 4)
    if strided:
        any_scales = formats.column_major_scales(any_scales)
    assert bits(formats.ue8m0_pack(any_scales)) == bits(oracle.ue8m0_pack(any_scales))


def test_columns_lie_side_by_side() -> None:
    scales = torch.arange(24.0).view(2, 4, 3)
    column_major = formats.column_major_scales(scales)
    assert torch.equal(column_major, scales)
    assert column_major.stride() == (12, 1, 4) == oracle.column_major_scales(scales).stride()
    values = formats.fp8_cast(torch.randn(4, 384)).values
    assert torch.equal(
        formats.fp8_uncast(values, column_major[0]), formats.fp8_uncast(values, scales[0].contiguous())
    )


def test_the_casts_of_a_low_latency_dispatch(world_of) -> None:
    """Rows that the library casts on its way, and rows that the user casts, are the same."""

    def body(ctx) -> None:
        from deepep import Buffer, formats

        idx = torch.tensor([[0], [1], [0]])
        x = (torch.randn(3, 512) * torch.tensor([[1.0], [1e-3], [1e4]])).bfloat16()
        with Buffer(ctx.group, low_latency_mode=True, timeout=30.0) as buffer:
            for options in ({}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}):
                (values, scales), count, *_ = buffer.low_latency_dispatch(x, idx, 3, 2, **options)
                want = formats.fp8_cast(x, **options)
                for expert, tokens in ((0, [0, 2]), (1, [1])):
                    assert count[expert] == len(tokens)
                    got = values[expert, : len(tokens)].view(torch.uint8)
                    assert torch.equal(got, want.values[tokens].view(torch.uint8))
                    assert torch.equal(scales[expert, : len(tokens)], want.scales[tokens])

    world_of(1).run(body)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: formats.fp8_cast(torch.zeros(2, 128, dtype=torch.float16)), ArgumentTypeError, "x"),
        (lambda: formats.fp8_cast(torch.zeros(2, 100)), ShapeError, "x"),
        (lambda: formats.fp8_cast(torch.tensor(1.0)), ShapeError, "x"),
        (lambda: formats.fp8_cast(torch.zeros(2, 512), use_ue8m0=True), ArgumentError, "use_ue8m0"),
        (
            lambda: formats.fp8_cast(torch.zeros(2, 128), round_scale=True, use_ue8m0=True),
            ShapeError,
            "x",
        ),
        (lambda: formats.fp8_uncast(torch.zeros(2, 128), torch.ones(2, 2)), ShapeError, "scales"),
        (
            lambda: formats.fp8_uncast(torch.zeros(2, 128), torch.ones(2, 1).half()),
            ArgumentTypeError,
            "scales",
        ),
        (lambda: formats.ue8m0_pack(torch.ones(2, 3)), ShapeError, "scales"),
        (lambda: formats.ue8m0_pack(torch.ones(2, 4).double()), ArgumentTypeError, "scales"),
        (lambda: formats.ue8m0_unpack(torch.ones(2, 4)), ArgumentTypeError, "packed"),
    ],
)
def test_refusals(call, error, argument) -> None:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.argument == argument
    assert isinstance(caught.value, ValueError)
