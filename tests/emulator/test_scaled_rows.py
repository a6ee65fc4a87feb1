"""Rows in FP8 on the emulated machine: a cast and the way back have the bits of deepep.formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepep import _emulator
from deepep.formats import fp8_cast, fp8_uncast
from deepep.nn import kernels
from deepep.nn.scaled import cast_rows, expand_scaled_rows
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.rules.local_experts import sorted_pairs

#: Groups of these: zeros, the least scale, NaN, infinities, the largest number there is.
SPECIAL = (0.0, -0.0, 1e-30, 1e-5, float("nan"), float("inf"), float("-inf"), 3e38)


class Launch:
    """One kernel on a machine of one rank."""

    def __init__(self, blocks: int, warps: int, seed: int) -> None:
        schedule = draw_schedule(seed)
        self.blocks, self.warps = blocks, warps
        self.machine = _emulator.Machine(
            num_ranks=1,
            max_blocks=blocks,
            max_threads=32 * warps,
            strategy=schedule.strategy,
            seed=schedule.seed,
            expected_steps=schedule.expected_steps,
            max_steps=5_000_000,
        )

    def put(self, name: str, values: Tensor) -> int:
        raw = values.contiguous().view(torch.uint8).numpy().tobytes()
        address = self.room(name, len(raw))
        self.machine.write(0, address, raw)
        return address

    def room(self, name: str, num_bytes: int) -> int:
        address: int = self.machine.allocate(name, "device", 0, max(16, num_bytes))
        return address

    def run(self, kernel: str, args: bytes) -> None:
        own = _emulator.own_kernels()
        self.machine.launch(0, f"{kernel}_kernel", args, self.blocks, 32 * self.warps, 8192, own)
        outcome = self.machine.run()
        assert outcome.status != "failed", outcome.text
        self.machine.meet()

    def read(self, address: int, like: Tensor) -> Tensor:
        raw = self.machine.read(0, address, like.numel() * like.element_size())
        return torch.frombuffer(bytearray(raw), dtype=like.dtype).view(like.shape)


def rows_with(special: bool, tokens: int, hidden: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator) * 10.0 ** torch.randint(
        -8, 8, (tokens, 1), generator=generator
    )
    if special:
        chosen = torch.rand(tokens, hidden, generator=generator) < 0.02
        picks = torch.randint(len(SPECIAL), (tokens, hidden), generator=generator)
        x = torch.where(chosen, torch.tensor(SPECIAL)[picks], x)
    return x.bfloat16()


@pytest.mark.parametrize("special", [False, True], ids=["drawn", "special values"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "blocks", "warps"), [(1, 128, 1, 1), (3, 128, 1, 2), (5, 384, 2, 3), (9, 256, 40, 1)]
)
def test_rows_are_cast_as_by_torch(tokens: int, hidden: int, blocks: int, warps: int, special: bool) -> None:
    x = rows_with(special, tokens, hidden, seed=tokens + hidden)
    values, scales = fp8_cast(x)
    launch = Launch(blocks, warps, seed=tokens)
    out = launch.room("values", x.numel()), launch.room("scales", 4 * scales.numel())
    args = _emulator.cast_rows_args(
        num_channels=x.numel(), x=launch.put("x", x), values=out[0], scales=out[1]
    )
    launch.run("cast_rows", args)
    assert torch.equal(launch.read(out[0], values).view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(launch.read(out[1], scales), scales)


def spread(values: Tensor, scales: Tensor, blocks: int = 1, warps: int = 1, topk: int = 2) -> tuple[Any, Any]:
    """Rows as the kernel spreads them, and as torch does."""
    tokens, hidden = values.shape
    idx = torch.randint(-1, 3, (tokens, topk), generator=torch.Generator().manual_seed(tokens))
    idx[0] = 0
    pairs, slots, _ = sorted_pairs(idx, 3)
    wanted = fp8_uncast(values, scales).bfloat16()[pairs // topk]
    launch = Launch(blocks, warps, seed=tokens)
    out = launch.room("out", 2 * wanted.numel())
    args = _emulator.spread_rows_args(
        num_rows=tokens,
        row_bytes=2 * hidden,
        num_topk=topk,
        slots=launch.put("slots", slots),
        x=launch.put("x", values),
        scales=launch.put("scales", scales),
        out=out,
    )
    launch.run("spread_rows", args)
    return launch.read(out, wanted), wanted


@pytest.mark.parametrize(
    ("tokens", "hidden", "blocks", "warps"), [(1, 128, 1, 1), (5, 384, 2, 3), (9, 1280, 4, 1)]
)
def test_rows_are_restored_as_by_torch(tokens: int, hidden: int, blocks: int, warps: int) -> None:
    got, wanted = spread(*fp8_cast(rows_with(False, tokens, hidden, seed=hidden)), blocks, warps)
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("scale", [1.0, 0.7310585, 1e-4 / 448, 1e36, 1e-42, float("inf")])
def test_every_byte_is_restored(scale: float) -> None:
    """NaNs have no bits of their own."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    got, wanted = spread(values, torch.full((1, 2), scale))
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(5.0).view(torch.int16), wanted.nan_to_num(5.0).view(torch.int16))


def test_operators_launch_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that the kernels take: a launch goes to the machine, and its tensors come back."""
    launched: list[str] = []

    def launch(kernel: str, on: Tensor, **arguments: Any) -> None:
        launched.append(kernel)
        machine = Launch(2, 2, seed=1)
        tensors = {name: given for name, given in arguments.items() if isinstance(given, Tensor)}
        addresses = {name: machine.put(name, tensor) for name, tensor in tensors.items()}
        machine.run(kernel, getattr(_emulator, f"{kernel}_args")(**(arguments | addresses)))
        for name, tensor in tensors.items():
            tensor.copy_(machine.read(addresses[name], tensor))

    monkeypatch.setattr(kernels, "serve", lambda *tensors: True)
    monkeypatch.setattr(kernels, "serve_rows", lambda num_topk, *rows: True)
    monkeypatch.setattr(kernels, "launch", launch)
    x = rows_with(False, 5, 256, seed=3)
    values, scales = cast_rows(x)
    assert torch.equal(values.view(torch.uint8), fp8_cast(x).values.view(torch.uint8))
    assert torch.equal(scales, fp8_cast(x).scales)
    pairs, slots, _ = sorted_pairs(
        torch.tensor([[0, 1, -1], [-1, -1, -1], [2, 2, 1], [0, 0, 0], [1, -1, 0]]), 3
    )
    rows = expand_scaled_rows(torch.empty_like(x), values, scales, pairs, slots)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, fp8_uncast(values, scales).bfloat16()[pairs // 3])
    assert launched == ["cast_rows", "spread_rows"]


def test_rows_with_scales_are_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 256 with scales"):
        _emulator.spread_rows_args(num_rows=1, row_bytes=128, num_topk=1, slots=0, x=0, scales=16, out=0)
    with pytest.raises(ValueError, match="multiple of 128"):
        _emulator.cast_rows_args(num_channels=64, x=0, values=0, scales=0)
