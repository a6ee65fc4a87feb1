"""Adaptive format: of a bucket's gradients FP8, BF16 or all bits, by the noise that they have anyway. Pure.

Symbols: R ranks, g_r rank r's gradient, m their mean. SGD sees m plus noise of variance S / R, where S is
the variance of one rank's gradient: what different batches make of it. Rounding adds an error that is right
on average; as long as its square E is at most a share tau of S / R, every bound that holds for SGD with
variance S holds with S (1 + tau). So the fewest bits are taken whose E R / S is at most tau.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepep.collectives.codecs import BLOCK, Messages

LADDER = ("fp8", "bf16", "off")
"""Formats, from few bits to all of them."""
FIRST = "bf16"
PATIENCE = 20
"""Steps in a row that fewer bits must have been enough for, with half of the noise to spare."""
NO_NOISE = 1e-6
"""Share of the gradients' squares below which their variance is rounding of the sums, and none."""
UNCERTAIN = 3.0
"""Squares of the error of the format in use by which the variance may be smaller than it seems."""
SAMPLED, STRIDE = 64, 64
"""A bucket's first error is measured on one block of `STRIDE`, and on so many at least if it has them."""


def measure(gradient: Tensor, key: tuple[int, int] | None) -> list[float]:
    """Squares of a rank's gradient [N], and of what FP8 and BF16 change in it, by a sample of its blocks."""
    square = square_of(gradient)
    whole = gradient.numel() // BLOCK
    blocks = gradient[: whole * BLOCK].view(whole, BLOCK)
    sample = blocks[:: max(1, min(STRIDE, whole // SAMPLED))].float().flatten().contiguous()
    in_sample = square_of(sample)
    errors = []
    for name in LADDER[:-1]:
        messages, decoded = Messages(name, key=key), torch.empty_like(sample)
        messages.decode(messages.encode(sample, 0), decoded)
        error = square_of(decoded - sample)
        errors.append(error / in_sample * square if in_sample else 0.0)
    return [square, *errors]


def square_of(values: Tensor) -> float:
    """The sum of squares."""
    flat = values.detach().flatten().float()
    return sum(float(torch.dot(part, part)) for part in flat.split(1 << 16))


@dataclass(frozen=True)
class BucketNoise:
    """A bucket's numbers of one step, of all ranks together.

    variance: S. ratios: E R / S by format, infinite without any variance.
    """

    variance: float
    ratios: Mapping[str, float]

    @staticmethod
    def of(rows: Sequence[Sequence[float]], used: str, num_groups: int = 1) -> BucketNoise:
        """From every rank's `measure`, and rank 0's square of the mean that has come out, last in its row.

        used: the format in which it was reduced. num_groups: of a hierarchical reduction, whose sums of
        groups are rounded once more.
        """
        ranks = len(rows)
        total, mean_square = sum(row[0] for row in rows), rows[0][-1]
        relative = {
            name: sum(row[1 + i] for row in rows) / total if total else 0.0
            for i, name in enumerate(LADDER[:-1])
        }

        def errors(name: str, variance: float, square: float) -> float:
            share = relative.get(name, 0.0)
            between = square / num_groups + variance / ranks if num_groups > 1 else 0.0
            return share * (total / ranks**2 + square + between)

        def variance_of(square: float) -> float:
            return max(0.0, (total - ranks * square) / (ranks - 1)) if ranks > 1 else 0.0

        # The square that came out has the errors' in it.
        error = errors(used, variance_of(mean_square), mean_square)
        square = max(0.0, mean_square - error)
        variance = variance_of(square)
        # What cannot be told from the error of the format in use is not counted on.
        certain = variance - UNCERTAIN * error * ranks / max(ranks - 1, 1)
        if not certain > NO_NOISE * total:
            return BucketNoise(variance, {name: float("inf") for name in LADDER[:-1]})
        ratios = {name: errors(name, variance, square) * ranks / certain for name in LADDER[:-1]}
        return BucketNoise(variance, ratios)


@dataclass(frozen=True)
class BucketFormat:
    """The format of a bucket's next reductions.

    enough: by format, the steps in a row that it would have done for.
    """

    codec: str = FIRST
    enough: Mapping[str, int] = field(default_factory=dict)

    def after(self, noise: BucketNoise, max_noise: float) -> BucketFormat:
        """The format after a step: more bits at once, fewer after `PATIENCE` steps with half the noise."""
        fits = [name for name in LADDER if noise.ratios.get(name, 0.0) <= max_noise]
        if LADDER.index(fits[0]) > LADDER.index(self.codec):
            return BucketFormat(fits[0])
        fewer = LADDER[: LADDER.index(self.codec)]
        enough = {
            name: self.enough.get(name, 0) + 1 if noise.ratios[name] < max_noise / 2 else 0 for name in fewer
        }
        for name in fewer:
            if enough[name] >= PATIENCE:
                return BucketFormat(name)
        return BucketFormat(self.codec, enough)
