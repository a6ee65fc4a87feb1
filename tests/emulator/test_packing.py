"""Packing of what ranks bring to the emulator's leader: tensors as they are, strides and all."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.sim.emulator.packing import pack, unpack


def returned(*things: object) -> list[object]:
    packed = [pack(thing) for thing in things]
    found = dict(unpack(b"".join(packed), [len(one) for one in packed]))
    return [found[place] for place in range(len(things))]


def views() -> list[Tensor]:
    rows = torch.arange(24, dtype=torch.float32).view(4, 6)
    halves = rows.bfloat16()
    memory = torch.arange(64, dtype=torch.uint8)
    return [
        *(rows, rows[:, ::2], rows.t(), rows[1:3, 2:4], rows[:1, ::5], rows[3:, :1].t(), rows[:, 0]),
        *(rows[0, 0], rows[:0], rows[:, :0], rows[:1].expand(3, 6), rows.t()[2:3, ::2]),
        *(halves, halves[:, 1::3], memory.view(torch.float8_e4m3fn)[8:40].view(4, 8)[:, ::2]),
        *(memory[:32].view(torch.float32), memory.view(torch.int64)[::3], memory.bool()),
        rows.clone().requires_grad_(),
    ]


def test_tensors_keep_bits_dtypes_shapes_and_strides() -> None:
    for given, got in zip(views(), returned(*views()), strict=True):
        assert isinstance(got, Tensor)
        assert (got.dtype, got.shape, got.stride()) == (given.dtype, given.shape, given.stride())
        bits = [t.detach().clone(memory_format=torch.contiguous_format).flatten() for t in (got, given)]
        assert torch.equal(*[t.view(torch.uint8) for t in bits])


def test_two_views_of_one_allocation_as_different_types() -> None:
    memory = torch.arange(32, dtype=torch.uint8)
    rows, scales = memory[:16].view(torch.float8_e4m3fn), memory[16:].view(torch.float32)
    (got,) = returned({"rows": rows, "scales": scales, "rest": (None, 7, "x")})
    assert torch.equal(got["rows"].view(torch.uint8), memory[:16])  # type: ignore[index]
    assert torch.equal(got["scales"].view(torch.uint8), memory[16:])  # type: ignore[index]
    assert got["rest"] == (None, 7, "x")  # type: ignore[index]
