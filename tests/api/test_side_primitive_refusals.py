"""Calls of sessions, ring and Engram storage that mean nothing are refused, and the next ones work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.refusals import raised

from deepep import ElasticBuffer, errors
from deepep.sim import World


def buffer_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    key = ("refused beside", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        how = {"num_bytes": 4 << 20, "num_cpu_bytes": 2 << 20, "num_gpu_timeout_secs": 30, **options}
        ctx.scratch[key] = ElasticBuffer(ctx.group, **how)
    return ctx.scratch[key]


def gathered(buffer: Any, t: Any) -> Any:
    """Gathers `t`, and waits for it."""
    *got, handle = buffer.all_gather(t)
    handle()
    return got


# Sessions


def test_calls_out_of_their_order(fresh_world: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer, one = buffer_of(ctx), torch.ones(4)
        outside = "ModeError", "all_gather"
        for call, name in (
            (buffer.create_agrs_session, "create_agrs_session"),
            (buffer.destroy_agrs_session, "destroy_agrs_session"),
            (lambda: buffer.all_gather(one), "all_gather"),
            (lambda: buffer.agrs_get_inplace_tensor((2,), torch.int32), "all_gather"),
        ):
            got = raised(call)
            assert (got[0], got[2]) == ("ModeError", name)
        buffer.agrs_set_config(1024, 2)
        got = raised(lambda: buffer.all_gather(one))
        assert (got[0], got[2]) == outside
        with buffer.agrs_new_session(enabled=False):
            assert raised(lambda: buffer.all_gather(one))[0] == "ModeError"
        with buffer.agrs_new_session():
            assert raised(buffer.create_agrs_session)[2] == "create_agrs_session"
            assert raised(lambda: buffer.agrs_set_config(1024, 2))[2] == "agrs_set_config"
            assert gathered(buffer, one)[0].shape == (2, 4)
        assert raised(buffer.destroy_agrs_session)[2] == "destroy_agrs_session"

    fresh_world(2).run(run)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("None", "ArgumentTypeError"),
        ("[]", "ArgumentTypeError"),
        ("[torch.ones(2), 3]", "ArgumentTypeError"),
        ("torch.ones(4, 4).t()", "LayoutError"),
        ("torch.ones(2, device='meta')", "DeviceError"),
        ("torch.ones(1 << 10)", "CapacityError"),
        ("torch.ones(5)", "MismatchError"),
        ("torch.ones(4, dtype=torch.int32)", "MismatchError"),
        ("torch.ones(2, 2)", "MismatchError"),
        ("[torch.ones(4), torch.ones(4)]", "MismatchError"),
        ("buffer.agrs_get_inplace_tensor((4,), torch.float32)[:2]", "MismatchError"),
        ("[buffer.agrs_get_inplace_tensor((4,), torch.float32)] * 2", "ArgumentError"),
    ],
)
def test_gathers_that_one_rank_gets_wrong(world_of: Callable[[int], World], bad: str, kind: str) -> None:
    """All ranks raise it, the others when they wait; the next session works."""

    def run(ctx: Any) -> Any:
        buffer = buffer_of(ctx)
        buffer.agrs_set_config(2048, 3)
        with buffer.agrs_new_session():
            given = eval(bad) if ctx.rank == 1 else torch.ones(4)
            found = raised(lambda: gathered(buffer, given))
        with buffer.agrs_new_session():
            mine = torch.full((4,), float(ctx.rank))
            assert gathered(buffer, mine)[0].tolist() == [[0.0] * 4, [1.0] * 4]
        return found

    found = world_of(2).run(run)
    assert found[0] == found[1]
    assert found[0][0] == kind


def test_a_session_has_its_bytes_and_calls(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer, shape = buffer_of(ctx), (8,)
        size = buffer.get_agrs_num_max_session_bytes(ctx.group, [shape, shape], torch.float32)
        buffer.agrs_set_config(size, 2)
        with buffer.agrs_new_session():
            gathered(buffer, [torch.ones(shape), torch.ones(shape)])
            assert raised(lambda: buffer.all_gather(torch.ones(1)))[0] == "CapacityError"
            assert raised(lambda: buffer.agrs_get_inplace_tensor(shape, torch.int8))[0] == "CapacityError"
            gathered(buffer, torch.ones(0))
            assert "at most 2" in raised(lambda: buffer.all_gather(torch.ones(0)))[1]
        with buffer.agrs_new_session():
            for _ in range(2):
                gathered(buffer, torch.ones(shape))

    world_of(2).run(run)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((0, 1), "RangeError"),
        ((1024, 0), "RangeError"),
        (("1", 1), "ArgumentTypeError"),
        ((2048, 1), "MismatchError"),
        ((1024, 2), "MismatchError"),
    ],
)
def test_sizes_are_the_same_on_all_ranks(world_of: Callable[[int], World], sizes: Any, kind: str) -> None:
    def run(ctx: Any) -> Any:
        buffer = buffer_of(ctx)
        given = sizes if ctx.rank == 1 else (1024, 1)
        return raised(lambda: buffer.agrs_set_config(*given)), raised(lambda: buffer.pp_set_config(*given))

    for found in zip(*world_of(2).run(run), strict=True):
        assert found[0] == found[1]
        assert found[0][0] == kind


def test_shapes_that_are_none(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        hint = ElasticBuffer.get_agrs_num_max_session_bytes
        for shapes, kind in (
            (3, "ArgumentTypeError"),
            ("3", "ArgumentTypeError"),
            ([(3,), 4], "ArgumentTypeError"),
            ((3, -1), "RangeError"),
            ((1 << 30, 1 << 30), "RangeError"),
        ):
            assert raised(lambda: hint(ctx.group, shapes, torch.int8))[0] == kind  # noqa: B023
        assert raised(lambda: hint(ctx.group, (3,), "int8"))[0] == "ArgumentTypeError"
        assert hint(ctx.group, [(3,), (2, 2)], torch.float32) == 256
        assert hint(ctx.group, (), torch.float32) == 128
        buffer.agrs_set_config(1024, 1)
        with buffer.agrs_new_session():
            assert raised(lambda: buffer.agrs_get_inplace_tensor(3, torch.int8))[0] == "ArgumentTypeError"
            parts = buffer.agrs_get_inplace_tensor([(3,), torch.Size([2, 2])], torch.int8)
            assert [part.shape for part in parts] == [(3,), (2, 2)]
            assert buffer.agrs_get_inplace_tensor((), torch.int8).shape == ()

    world_of(2).run(run)


def test_what_is_raised_in_a_session_ends_it(world_of: Callable[[int], World]) -> None:
    """On this rank alone; ranks whose bodies all raise are in step again."""

    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        buffer.agrs_set_config(1024, 1)
        with pytest.raises(KeyError), buffer.agrs_new_session():
            raise KeyError
        with buffer.agrs_new_session():
            assert gathered(buffer, torch.ones(2))[0].tolist() == [[1.0, 1.0]] * 2

    world_of(2).run(run)


def test_ranks_in_different_calls(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> Any:
        buffer = buffer_of(ctx)
        buffer.agrs_set_config(1024, 1)
        first = raised(buffer.create_agrs_session if ctx.rank else buffer.barrier)
        with buffer.agrs_new_session():
            second = raised(buffer.barrier if ctx.rank else lambda: gathered(buffer, torch.ones(1)))
        return first, second

    for found in zip(*world_of(2).run(run), strict=True):
        assert found[0] == found[1]
        assert found[0][0] == "MismatchError"


# The ring


def test_sends_that_mean_nothing(fresh_world: Callable[[int], World]) -> None:
    """They are raised on the rank that makes them, and the others know nothing of it."""

    def run(ctx: Any) -> None:
        buffer, t = buffer_of(ctx), torch.arange(4)
        far, near = (ctx.rank + 2) % 4, (ctx.rank + 1) % 4
        assert raised(lambda: buffer.pp_send(t, near))[0] == "ModeError"
        buffer.pp_set_config(32, 1)
        if ctx.rank == 1:
            for call in (buffer.pp_send, buffer.pp_recv):
                for arguments, kind in (
                    ((t, far), "RangeError"),
                    ((t, ctx.rank), "RangeError"),
                    ((t, 4), "RangeError"),
                    ((t, "0"), "ArgumentTypeError"),
                    ((t, near, -1), "RangeError"),
                    ((None, near), "ArgumentTypeError"),
                    ((torch.ones(2, 2).t(), near), "LayoutError"),
                    ((torch.ones(9), near), "CapacityError"),
                    ((torch.ones(2, device="meta"), near), "DeviceError"),
                ):
                    assert raised(lambda: call(*arguments))[0] == kind  # noqa: B023
        buffer.pp_send(t + ctx.rank, near)
        got = torch.zeros_like(t)
        buffer.pp_recv(got, (ctx.rank - 1) % 4)
        assert torch.equal(got, t + (ctx.rank - 1) % 4)

    fresh_world(4).run(run)


def test_a_ring_of_one_has_no_neighbours(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        buffer.pp_set_config(32, 1)
        assert "no neighbours" in raised(lambda: buffer.pp_send(torch.ones(1), 0))[1]

    world_of(1).run(run)


def test_a_tensor_unlike_the_one_sent(world_of: Callable[[int], World]) -> None:
    """It is lost, and the next one arrives."""

    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        buffer.pp_set_config(64, 3)
        if ctx.rank == 0:
            for value in range(3):
                buffer.pp_send(torch.full((4,), value, dtype=torch.int32), 1)
            return
        for wrong in (torch.zeros(4, dtype=torch.float32), torch.zeros(5, dtype=torch.int32)):
            with pytest.raises(errors.MismatchError, match="16 bytes of int32, as rank 0 sent"):
                buffer.pp_recv(wrong, 0)
            assert not wrong.any()
        got = torch.zeros(2, 2, dtype=torch.int32)
        buffer.pp_recv(got, 0)
        assert got.tolist() == [[2, 2], [2, 2]]

    world_of(2).run(run)


# Engram


def test_storage_that_means_nothing(fresh_world: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        rows, fp8 = torch.zeros(4, 16).bfloat16(), torch.zeros(4, 16).to(torch.float8_e4m3fn)
        sf, ok = torch.ones(8, 1), torch.zeros(1, 1, dtype=torch.int32)
        assert raised(lambda: buffer.engram_fetch(ok))[0] == "ModeError"
        for arguments, kind in (
            ((None,), "ArgumentTypeError"),
            ((torch.zeros(4, 16, dtype=torch.int32),), "ArgumentTypeError"),
            ((torch.zeros(4).bfloat16(),), "ShapeError"),
            ((torch.zeros(0, 16).bfloat16(),), "ShapeError"),
            ((torch.zeros(4, 9).bfloat16(),), "ShapeError"),
            ((torch.zeros(16, 4).bfloat16().t(),), "LayoutError"),
            ((rows, sf), "ArgumentError"),
            ((fp8,), "ArgumentError"),
            ((fp8, torch.ones(4, 1)), "ShapeError"),
            ((fp8, torch.ones(8, 1).bfloat16()), "ArgumentTypeError"),
            ((torch.zeros(1 << 16, 32).bfloat16(),), "CapacityError"),
        ):
            assert raised(lambda: buffer.engram_write(*arguments))[0] == kind, arguments  # noqa: B023
        own = rows if ctx.rank else rows[:3]
        assert raised(lambda: buffer.engram_write(own))[0] == "MismatchError"
        assert raised(lambda: buffer.engram_fetch(ok))[0] == "ModeError"
        buffer.engram_write(rows + 1)
        for arguments, kind in (
            ((None,), "ArgumentTypeError"),
            ((ok.long(),), "ArgumentTypeError"),
            ((ok[0],), "ShapeError"),
            ((ok, 99), "RangeError"),
            ((ok, 0, 7), "ArgumentTypeError"),
            ((ok, 0, True), "ArgumentError"),
        ):
            assert raised(lambda: buffer.engram_fetch(*arguments))[0] == kind, arguments  # noqa: B023
        for index in (-1, 8, 1 << 30):
            hook = buffer.engram_fetch(torch.tensor([[0, index]], dtype=torch.int32))
            assert raised(hook)[0] == "RangeError"
            assert raised(hook)[1] == f"rank {ctx.rank}: indices: got {index}; allowed: 0 to 7"
        assert buffer.engram_fetch(ok)()[0].tolist() == [[1.0] * 16]

    fresh_world(2).run(run)


def test_storage_is_a_part_of_the_buffer(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        for options in (
            {"num_bytes": 2 << 20, "num_cpu_bytes": 2 << 20},
            {"num_max_tokens_per_rank": 4, "hidden": 16, "num_cpu_bytes": 2 << 20},
            {"num_bytes": 4 << 20, "num_cpu_bytes": 1},
        ):
            assert raised(lambda: ElasticBuffer(ctx.group, **options))[2] == "num_cpu_bytes"  # noqa: B023
        with ElasticBuffer(ctx.group, num_bytes=2 << 20) as buffer:
            assert raised(lambda: buffer.engram_write(torch.zeros(4, 16).bfloat16()))[0] == "ModeError"

    world_of(2).run(run)


def test_size_hints() -> None:
    mib = 1 << 20
    assert ElasticBuffer.get_engram_storage_size_hint(1 << 20, 64, 4096) == (2 * mib, 128 * mib)
    assert ElasticBuffer.get_engram_storage_size_hint(1, 64, 1 << 16, torch.float8_e4m3fn) == (
        4 * mib,
        2 * mib,
    )
    assert ElasticBuffer.get_pp_buffer_size_hint(mib + 1, 3) == 14 * mib
    assert ElasticBuffer.get_agrs_buffer_size_hint(None, 2 * mib + 1) == 4 * mib
    for call in (
        lambda: ElasticBuffer.get_engram_storage_size_hint(0, 64, 1),
        lambda: ElasticBuffer.get_pp_buffer_size_hint(0, 3),
        lambda: ElasticBuffer.get_pp_buffer_size_hint(3, 0),
        lambda: ElasticBuffer.get_agrs_buffer_size_hint(None, 0),
    ):
        assert raised(call)[0] == "RangeError"
