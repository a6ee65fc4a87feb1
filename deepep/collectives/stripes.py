"""Stripes: the bytes of many tensors, from several ranks at once to those that have none of them yet."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepep.collectives.transport import PointToPoint, Steps, Transfer, drive, empty_message

PIECE = 4 << 20
"""Bytes of a message at most."""
_LANES = 2
"""Messages from a rank to another that are under way at a time."""

Span = tuple[int, int]


class ByteStream:
    """Tensors' bytes one after another. Tensors: contiguous, on the CPU."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._parts = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        self._begins = list(itertools.accumulate((part.numel() for part in self._parts), initial=0))

    @property
    def num_bytes(self) -> int:
        """The length of the stream."""
        return self._begins[-1]

    def read(self, span: Span) -> Tensor:
        """The bytes of a span, [end - begin] uint8."""
        return torch.cat(list(self._within(span)))

    def write(self, span: Span, message: Tensor) -> None:
        """Replaces the bytes of a span, in the tensors."""
        at = 0
        for part in self._within(span):
            part.copy_(message[at : at + part.numel()])
            at += part.numel()

    def _within(self, span: Span) -> Iterator[Tensor]:
        begin, end = span
        at = bisect.bisect_right(self._begins, begin) - 1
        while begin < end:
            part, offset = self._parts[at], begin - self._begins[at]
            taken = min(part.numel() - offset, end - begin)
            if taken:
                yield part[offset : offset + taken]
            begin, at = begin + taken, at + 1


def stripes(num_bytes: int, first: int, givers: Sequence[int]) -> dict[int, list[Span]]:
    """The pieces that each giver sends: up to `first` the first of them, what is behind it all alike."""
    share = (num_bytes - first) / len(givers)
    found = {}
    for place, giver in enumerate(givers):
        begin, end = (first + round(share * n) for n in (place, place + 1))
        spans = [(begin, end)] if place else [(0, first), (begin, end)]
        found[giver] = [(a, min(a + PIECE, b)) for begin, b in spans for a in range(begin, b, PIECE)]
    return found


def hand_over(
    net: PointToPoint, stream: ByteStream, first: int, givers: Sequence[int], takers: Sequence[int]
) -> None:
    """Makes the takers' stream the givers', by `stripes`. givers, takers: by their places in the link."""
    pieces = stripes(stream.num_bytes, first, givers)

    def lane(number: int) -> Steps:
        if net.rank in takers:
            rounds = max(map(len, pieces.values()))
            for i in range(number, rounds, _LANES):
                spans = {giver: of_giver[i] for giver, of_giver in pieces.items() if i < len(of_giver)}
                messages: list[Transfer] = [
                    (empty_message(end - begin, torch.device("cpu")), giver)
                    for giver, (begin, end) in spans.items()
                ]
                yield net.exchange([], messages, number)
                for message, giver in messages:
                    stream.write(spans[giver], message)
        else:
            for span in pieces[net.rank][number::_LANES]:
                message = stream.read(span)
                yield net.exchange([(message, taker) for taker in takers], [], number)

    drive([lane(number) for number in range(_LANES)])
