"""Stripes: every byte is sent by one rank, and arrives where it was."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepep.collectives.stripes import PIECE, ByteStream, stripes


@given(
    num_bytes=st.integers(0, 5 * PIECE) | st.integers(0, 20),
    share=st.floats(0, 1),
    givers=st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_each_byte_has_one_sender(num_bytes: int, share: float, givers: list[int]) -> None:
    first = round(share * num_bytes)
    found = stripes(num_bytes, first, givers)
    spans = sorted(span for of_giver in found.values() for span in of_giver)
    assert all(0 < end - begin <= PIECE for begin, end in spans)
    ends = [0, *(end for _, end in spans)]
    assert [begin for begin, _ in spans] == ends[:-1]
    assert ends[-1] == num_bytes
    assert all(giver == givers[0] for giver in givers for begin, _ in found[giver] if begin < first)
    loads = [sum(end - max(begin, first) for begin, end in of if end > first) for of in found.values()]
    assert max(loads) - min(loads) <= 1


@given(st.data())
def test_a_span_is_read_and_written_across_tensors(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=6))
    dtypes = (torch.float64, torch.int16, torch.bool)
    tensors = [torch.ones(size, dtype=dtypes[i % 3]) for i, size in enumerate(sizes)]
    others = [torch.zeros_like(tensor) for tensor in tensors]
    source, target = ByteStream(tensors), ByteStream(others)
    assert source.num_bytes == sum(t.numel() * t.element_size() for t in tensors)
    cuts = sorted(data.draw(st.lists(st.integers(0, source.num_bytes), max_size=4)))
    ends = [0, *cuts, source.num_bytes]
    for begin, end in itertools.pairwise(ends):
        if begin < end:
            target.write((begin, end), source.read((begin, end)))
    assert all(map(torch.equal, tensors, others))
