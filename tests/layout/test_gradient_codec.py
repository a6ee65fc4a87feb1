"""The gradient codec: the extension, and its form in torch, have the oracle's bits; the oracle's errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deepep import _core
from deepep.collectives import device_codec
from deepep.collectives.codecs import LOSSY, FixedPoint, Messages, headroom_of, rounding_key
from deepep.reference import gradient_codec as oracle
from deepep.sim.cases.gradients import KINDS, draw_gradient

CASES = 300


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bits; any NaN is any other's equal."""
    nan = got.isnan()
    return torch.equal(nan, want.isnan()) and torch.equal(
        got[~nan].view(torch.int32), want[~nan].view(torch.int32)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", LOSSY)
def test_messages_have_the_oracles_bits(form: str, kind: str) -> None:
    rng = np.random.default_rng([1, LOSSY.index(form), KINDS.index(kind)])
    for case in range(CASES // len(KINDS)):
        values = draw_gradient(rng, int(rng.integers(0, 600)), kind)
        first = int(rng.integers(0, 2**33))
        for key in (None, rounding_key(case, 5)):
            messages = Messages(form, key=key)
            want = oracle.encode(form, values, key, first)
            assert torch.equal(messages.encode(values, first), want)
            by_torch = torch.empty_like(want)
            device_codec.encode(form, values, by_torch, key, first)
            assert torch.equal(by_torch, want)
            restored = oracle.decode(form, want, values.numel())
            base = draw_gradient(rng, values.numel(), "normal")
            for add, expected in ((False, restored), (True, base + restored)):
                for decode in (messages.decode, lambda m, into, a: device_codec.decode(form, m, into, a)):
                    into = base.clone()
                    decode(want, into, add)
                    assert same(into, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_has_the_oracles_bits(kind: str) -> None:
    rng = np.random.default_rng([2, KINDS.index(kind)])
    for _ in range(CASES // len(KINDS)):
        num_ranks, count = int(rng.integers(1, 300)), int(rng.integers(0, 600))
        values, other = (draw_gradient(rng, count, kind) for _ in range(2))
        headroom = headroom_of(num_ranks)
        assert headroom == oracle.headroom_of(num_ranks)
        exponents = FixedPoint.exponents_of(values)
        assert torch.equal(exponents, oracle.block_exponents(values))
        assert torch.equal(exponents, device_codec.block_exponents(values))
        exponents = torch.maximum(exponents, oracle.block_exponents(other))
        fixed = FixedPoint(exponents, headroom)
        want = oracle.encode_fixed(values, exponents, headroom)
        assert torch.equal(fixed.encode(values), want)
        assert torch.equal(device_codec.encode_fixed(values, exponents, headroom), want)
        total = want * num_ranks
        assert torch.equal(total.long(), want.long() * num_ranks), "the sum fits"
        restored = oracle.decode_fixed(total, exponents, headroom, num_ranks)
        assert same(fixed.decode(total, num_ranks), restored)
        assert same(device_codec.decode_fixed(total, exponents, headroom, num_ranks), restored)


@pytest.mark.parametrize(("form", "step"), [("fp8", 2.0**-3), ("fp16", 2.0**-10), ("bf16", 2.0**-7)])
def test_nothing_is_further_off_than_a_step(form: str, step: float) -> None:
    """Half a step of its own binade to nearest, one by dice; below the normal codes a step there."""
    values = torch.from_numpy(np.random.default_rng(3).standard_normal(128 * 400).astype(np.float32))
    largest = values.view(-1, 128).abs().amax(-1).repeat_interleave(128).double()
    lowest = {"fp8": 2.0**-14, "fp16": 2.0**-28, "bf16": 0.0}[form] * largest  # at least, of a scaled block
    for key, share in ((None, 0.5), (rounding_key(1), 1.0)):
        error = (
            oracle.decode(form, oracle.encode(form, values, key), values.numel()).double() - values
        ).abs()
        assert (error <= share * step * torch.maximum(values.double().abs(), lowest)).all()


@pytest.mark.parametrize("form", LOSSY)
def test_dice_are_right_on_average(form: str) -> None:
    """The mean of 4,000 roundings is within five standard errors, at most half a step each."""
    value, count = 1.0 + 2.0**-3 * 0.3 + 2.0**-10 * 0.3 + 2.0**-7 * 0.3, 4000
    step = {"fp8": 2.0**-3, "fp16": 2.0**-10, "bf16": 2.0**-7}[form]
    for sender in range(4):
        message = Messages(form, key=rounding_key(9, sender)).encode(torch.full((count,), value), 0)
        values = torch.empty(count)
        Messages(form).decode(message, values)
        assert len(values.unique()) == 2, "it takes the neighbours alone"
        assert abs(float(values.double().mean()) - value) <= 5 * step / 2 / count**0.5


def test_dice_of_ranks_are_independent() -> None:
    """Errors of eight senders of one tensor: their mean has an eighth of the variance of one."""
    values, count = torch.from_numpy(np.random.default_rng(4).standard_normal(65536).astype(np.float32)), 8
    errors = []
    for sender in range(count):
        restored = torch.empty_like(values)
        message = Messages("fp8", key=rounding_key(0, sender)).encode(values, 0)
        Messages("fp8").decode(message, restored)
        errors.append(restored - values)
    one = float(torch.stack(errors).square().mean())
    assert abs(float(torch.stack(errors).mean(0).square().mean()) / one * count - 1) < 0.1


def test_small_gradients_do_not_vanish() -> None:
    """Magnitudes far below the floor that activations' FP8 has (reference/formats.py)."""
    values = torch.from_numpy(np.random.default_rng(5).standard_normal(1280).astype(np.float32)) * 1e-30
    error = oracle.decode("fp8", oracle.encode("fp8", values), values.numel()).double() - values
    assert float(error.norm() / values.double().norm()) < 0.03  # 0.0265 for normal values


def test_an_infinity_poisons_its_block_alone() -> None:
    values = torch.ones(384)
    values[130] = torch.inf
    restored = oracle.decode("fp8", oracle.encode("fp8", values), 384)
    assert restored[128:256].isnan().all()
    assert torch.equal(restored[:128], values[:128])
    assert torch.equal(restored[256:], values[256:])


def test_a_message_may_begin_anywhere() -> None:
    values = torch.from_numpy(np.random.default_rng(6).standard_normal(300).astype(np.float32))
    for form in LOSSY:
        message = Messages(form).encode(values, 0)
        shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), message])[1:]
        into = torch.empty(300)
        Messages(form).decode(shifted, into)
        assert same(into, oracle.decode(form, message, 300))


@pytest.mark.parametrize("form", LOSSY)
def test_in_torch_it_waits_for_no_device(form: str) -> None:
    """A value read back would hold the host up until the stream is done. On "meta" there are none to read."""
    for key in (None, (1, 2)):
        values = torch.empty(300, device="meta")
        message = torch.empty(device_codec.message_bytes(form, 300), dtype=torch.uint8, device="meta")
        device_codec.encode(form, values, message, key, 5)
        device_codec.decode(form, message, values, True)


def test_sizes() -> None:
    for count, wanted in ((0, 0), (1, 2), (128, 129), (129, 131), (1 << 20, (1 << 20) + (1 << 13))):
        assert (
            _core.gradient_message_bytes("fp8", count) == wanted == device_codec.message_bytes("fp8", count)
        )
        for form in LOSSY:
            assert device_codec.message_bytes(form, count) == oracle.message_bytes(form, count)
            assert device_codec.message_bytes(form, count) == _core.gradient_message_bytes(form, count)


def test_arrays_that_do_not_fit_are_refused() -> None:
    values, message = np.zeros(10, np.float32), np.zeros(10, np.uint8)
    with pytest.raises(ValueError, match=r"message: got shape \[10\]; expected \[11\]"):
        _core.encode_gradients("fp8", values, message, True, (0, 0), 0)
    with pytest.raises(ValueError, match="format: got fp4"):
        _core.encode_gradients("fp4", values, message, True, (0, 0), 0)
    with pytest.raises(ValueError, match="headroom"):
        _core.encode_fixed(values, np.zeros(1, np.uint8), 30, np.zeros(10, np.int32))
    with pytest.raises(TypeError):
        _core.decode_gradients("fp8", message, values.astype(np.float64), False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_every_defect_of_the_codec_is_caught() -> None:
    script = Path(__file__).with_name("run_codec_mutants.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
