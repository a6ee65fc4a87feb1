"""Sums of any bits that a row may hold: subnormals, infinities, ties, cancellation, zeros of either sign.

Two addends are summed in bf16, more in fp32 (combine/sum_row.hpp): the oracle's fp32, rounded once, says
what either must be.
"""

from __future__ import annotations

import pytest
import torch

from deepep.reference import high_throughput as oracle

pytestmark = pytest.mark.gpu

HIDDEN = 4096


def any_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bf16 of random bits: every exponent is as likely as every other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)


def near(values: torch.Tensor, seed: int) -> torch.Tensor:
    """bf16 with exponents close to those of `values`, and mostly few bits set: sums that cancel, and ties."""
    generator = torch.Generator().manual_seed(seed)
    bits = values.view(torch.int16).to(torch.int32) & 0xFFFF
    steps = torch.randint(-10, 11, values.shape, generator=generator, dtype=torch.int32)
    exponent = ((bits >> 7 & 0xFF) + steps).clamp(0, 254)
    mantissa = torch.randint(0, 128, values.shape, generator=generator, dtype=torch.int32)
    mantissa &= torch.randint(0, 128, values.shape, generator=generator, dtype=torch.int32)
    sign = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int32)
    return (sign << 15 | exponent << 7 | mantissa).to(torch.int16).view(torch.bfloat16)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bits; a NaN is a NaN."""
    got, want = got.cpu(), want.cpu()
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got.view(torch.int16)[~nan], want.view(torch.int16)[~nan]
    )


@pytest.mark.parametrize(("ranks", "biases"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])
@pytest.mark.parametrize("tokens", [96, 700])
def test_sums_of_any_bits(ranks: int, biases: int, tokens: int) -> None:
    from harness.virtual_ranks import RankInputs, VirtualDomain

    domain = VirtualDomain(ranks, num_sms=24)
    goes = torch.ones(tokens, ranks, dtype=torch.bool)
    inputs = [
        RankInputs(
            x=torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda"),
            is_token_in_rank=goes.cuda(),
            tokens_per_rank=goes.sum(0).to(torch.int32).cuda(),
            tokens_per_expert=torch.full((ranks,), tokens, dtype=torch.int32, device="cuda"),
        )
        for _ in range(ranks)
    ]
    arrived = domain.dispatch(inputs, capacity=ranks * tokens, num_experts=ranks)
    first = any_bits((ranks * tokens, HIDDEN), 1)
    rows = [first] + [near(first, 2 + r) for r in range(1, ranks)]
    extra = [tuple(near(first[:tokens], 9) for _ in range(biases)) for _ in range(ranks)]
    want = oracle.combine(rows, [goes] * ranks, biases=extra)
    got = domain.combine(
        [r.cuda() for r in rows],
        [a.plan for a in arrived],
        hidden=HIDDEN,
        biases=[tuple(b.cuda() for b in pair) for pair in extra],
    )
    for (x, _), sums in zip(got, want, strict=True):
        assert same(x, sums.x)
        size = sums.x.to(torch.float64).abs()
        for reached in (size > 1e38, (size > 0) & (size < 2.0**-126), size == 0):
            assert reached.any()
