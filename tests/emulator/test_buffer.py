"""Buffer on the emulator backend: the kernels behind the public calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deepep.errors import DeepEPError
from deepep.runtime import backends as registry
from deepep.sim import RankContext, World, WorldError
from deepep.sim.cases.case import Limits
from deepep.sim.emulator.leader import EmulatedFailure
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.fuzzer import Fuzzer


@pytest.mark.slow
def test_drawn_cases_agree_with_the_oracle(world_of: Callable[[int], World]) -> None:
    subject = subjects.buffer(world_of, backend="emulator")
    limits = Limits(ranks=(1, 2, 4), fixed={"mode": "ht"})
    report = Fuzzer([subject], seed=7, limits=limits).run(examples=100)
    assert report.finding is None, report.finding


def round_trip(ctx: RankContext, backend: str) -> tuple[bytes, bytes]:
    """The bits of a dispatch and a combine by `backend`."""
    from deepep import Buffer

    generator = torch.Generator().manual_seed(ctx.rank)
    x = torch.randn(9, 64, generator=generator).to(torch.bfloat16)
    topk_idx = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(9)])
    buffer = Buffer(ctx.group, explicitly_destroy=True, backend=backend)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 8)
    weights = torch.rand(9, 3, generator=generator)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    combined, _, _ = buffer.combine(recv_x, handle)
    buffer.destroy()
    return recv_x.view(torch.int16).numpy().tobytes(), combined.view(torch.int16).numpy().tobytes()


def test_the_same_bits_as_the_reference_backend(world_of: Callable[[int], World]) -> None:
    world = world_of(2)
    assert world.run(round_trip, "emulator") == world.run(round_trip, "reference")


def decode_step(
    ctx: RankContext, backend: str, hooked: bool, with_weights: bool, reduction: str
) -> list[bytes]:
    """The bits of a low-latency dispatch, and of four combines along it: one along the handle taken apart,
    one in LogFMT, one of rows that were filled in where it reads them, into memory of the caller's.
    """
    from deepep import Buffer

    generator = torch.Generator().manual_seed(ctx.rank)
    num_tokens = 5 - 2 * ctx.rank
    x = torch.randn(num_tokens, 256, generator=generator).to(torch.bfloat16)
    idx = torch.randint(-1, 6, (num_tokens, 4), generator=generator, dtype=torch.int32)
    weights = torch.rand(num_tokens, 4, generator=generator)
    buffer = Buffer(ctx.group, backend=backend, low_latency_mode=True, reduction=reduction, timeout=60.0)
    rows, count, handle, _, hook = buffer.low_latency_dispatch(
        *(x, idx, 6, 6),
        use_fp8=False,
        return_recv_hook=hooked,
        topk_weights=weights if with_weights else None,
    )
    if hook is not None:
        hook()
    made = [count, handle.recv_src_info, handle.layout_range]
    made += [rows[expert, :number] for expert, number in enumerate(count.tolist())]
    for given in (handle, tuple(handle)):
        sums, _, hook = buffer.low_latency_combine(rows, idx, weights, given, return_recv_hook=hooked)
        if hook is not None:
            hook()
        made.append(sums)
    sums, _, hook = buffer.low_latency_combine(
        rows * 0.1, idx, weights, handle, use_logfmt=True, return_recv_hook=hooked
    )
    if hook is not None:
        hook()
    made.append(sums)
    buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
    out, given = torch.empty_like(sums), torch.full_like(rows, float("nan"))
    sums, _, hook = buffer.low_latency_combine(
        given, idx, weights, handle, zero_copy=True, out=out, return_recv_hook=hooked
    )
    if hook is not None:
        hook()
    assert sums is out
    made.append(out)
    if backend == "emulator":
        assert buffer._engine._low_latency._exchange._operations == 5, "all of them on kernels"
    buffer.destroy()
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in made]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("reduction", ["expert_rank", "exact"])
def test_low_latency_gives_the_bits_of_the_reference(
    world_of: Callable[[int], World], hooked: bool, reduction: str
) -> None:
    """Weights may come with the dispatch or with the combine."""
    world = world_of(2)
    made = [
        world.run(decode_step, backend, hooked, with_weights, reduction)
        for backend in ("emulator", "reference")
        for with_weights in (False, True)
    ]
    assert all(one == made[0] for one in made)


def test_a_combine_along_other_indices_is_refused(world_of: Callable[[int], World]) -> None:
    def run(ctx: RankContext) -> str:
        from deepep import ArgumentError, Buffer

        buffer = Buffer(
            ctx.group, backend="emulator", low_latency_mode=True, reduction="expert_rank", timeout=60.0
        )
        assert "emulated kernels" in buffer.info.operations["low-latency combine"]
        x, idx = torch.ones(3, 128).bfloat16(), torch.tensor([[0, 1], [1, 0], [0, -1]])
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 4, 2, use_fp8=False)
        other = idx.flip(0) if ctx.rank == 1 else idx
        with pytest.raises(ArgumentError, match="top-k indices"):
            buffer.low_latency_combine(rows, other, torch.ones(3, 2), handle)
        sums, _, _ = buffer.low_latency_combine(rows, idx, torch.ones(3, 2), handle)
        buffer.destroy()
        return str(torch.equal(sums, torch.tensor([[2.0], [2.0], [1.0]]).expand(3, 128).bfloat16()))

    assert world_of(2).run(run) == ["True", "True"]


def test_it_is_not_chosen_unless_asked_for(world_of: Callable[[int], World]) -> None:
    def chosen(ctx: RankContext, name: str | None) -> str:
        return registry.choose(name, ctx.group)[0].name

    world = world_of(2)
    assert world.run(chosen, None) == ["reference"] * 2
    assert world.run(chosen, "emulator") == ["emulator"] * 2


def test_a_kernel_in_error_raises_on_every_rank(world_of: Callable[[int], World]) -> None:
    """All ranks get the story when kernels fail."""

    def fail(ctx: RankContext) -> None:
        from deepep.reference.wire import Wire
        from deepep.sim.emulator.leader import at_leader

        def work(given: dict[int, int], num_ranks: int) -> dict[int, int]:
            raise EmulatedFailure("data race: a story")

        at_leader(Wire.whole(ctx.group), ctx.rank, work)

    with pytest.raises(WorldError) as told:
        world_of(2).run(fail)
    failures = told.value.failures
    assert set(failures) == {0, 1}
    assert all(isinstance(error, DeepEPError) and "a story" in str(error) for error in failures.values())


def test_work_comes_to_the_leader_and_back(world_of: Callable[[int], World]) -> None:
    def meet(ctx: RankContext) -> np.ndarray:
        from deepep.reference.wire import Wire
        from deepep.sim.emulator.leader import at_leader

        def work(given: dict[int, torch.Tensor], num_ranks: int) -> dict[int, torch.Tensor]:
            return {rank: sum(given.values()) * (rank + 1) for rank in given}

        mine = torch.full((ctx.rank + 1,), 2.0).sum()
        return at_leader(Wire.whole(ctx.group), mine, work).numpy()

    assert [float(got) for got in world_of(3).run(meet)] == [12.0, 24.0, 36.0]
